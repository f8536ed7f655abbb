"""The families of `zoo.py` as a table: what works, what is refused with which sentence, what fails."""

from typing import Any

LIMIT = {"fp32": 2e-3, "bf16": 0.2}
"""Nats over the root of the tokens, of what counts as right: the checks of a run have the same floor."""
GROUPS = ("works", "refused", "fails", "wrong")

Line = dict[str, Any]


def way_of(line: Line, way: str, dtype: str) -> tuple[str, str]:
    """What became of one way in one dtype: its group, and the sentence or figure to it."""
    found = line.get(f"{way} {dtype}", {"failed": line.get("crashed", "no result")})
    for name, group in (("refused", "refused"), ("failed", "fails")):
        if name in found:
            return group, found[name]
    if "off" in found:
        return ("works" if found["off"] <= LIMIT[dtype] else "wrong"), f"{found['off']:.0e}"
    if found["missing"] or not found["moved"]:
        return "fails", f"the export lacks {len(found['missing'])} tensors" if found["missing"] else "nothing moved"
    return "works", "yes"


def group_of(line: Line, dtypes: list[str]) -> str:
    """A family works where rows are scored right and steps are made, in some dtype, and nothing is wrong or fails."""
    all_ways = [way_of(line, way, dtype)[0] for dtype in dtypes for way in ("padded", "packed", "shared", "training")]
    for worst in ("wrong", "fails"):
        if worst in all_ways:
            return worst
    whole = [all(way_of(line, way, dtype)[0] == "works" for way in ("padded", "training")) for dtype in dtypes]
    return "works" if any(whole) else "refused"


def split(content: dict[str, Any]) -> tuple[dict[str, list[Line]], list[Line]]:
    """Lines by group, and those of which transformers makes no model from a config alone."""
    dtypes = content["settings"]["dtypes"]
    made = [line for line in content["results"] if "unmade" not in line]
    groups = {name: [line for line in made if group_of(line, dtypes) == name] for name in GROUPS}
    return groups, [line for line in content["results"] if "unmade" in line]


def zoo_short(content: dict[str, Any]) -> str:
    groups, _ = split(content)
    counts = {name: len(lines) for name, lines in groups.items()}
    total, version = sum(counts.values()), content["versions"].get("transformers", "")
    more = [f"{counts['refused']} are refused with a reason"]
    more += [f"{counts['fails']} fail"] if counts["fails"] else []
    more += [f"{counts['wrong']} are wrong"] if counts["wrong"] else []
    return (
        f"{counts['works']} of {total} families of transformers {version} score and train as their own class computes, "
        f"{' and '.join(more)}: [families](docs/families.md)."
    )


def zoo(content: dict[str, Any]) -> str:
    groups, unmade = split(content)
    dtypes = content["settings"]["dtypes"]
    counts = ", ".join(f"{len(lines)} {name}" for name, lines in groups.items())
    parts = [
        f"{sum(map(len, groups.values()))} families, {content['date']}: {counts}.",
        "",
        _works(groups["works"], dtypes),
    ]
    for name in GROUPS[1:]:
        if groups[name]:
            parts += ["", f"### {name.capitalize()}", "", _sentences(groups[name], dtypes, name)]
    if unmade:
        parts += ["", "### Not made", "", "transformers makes no model of token ids from their config alone:", ""]
        parts += [f"- `{line['family']}`: {_short(line['unmade'])}" for line in unmade]
    return "\n".join(parts)


def _works(lines: list[Line], dtypes: list[str]) -> str:
    ways = [(way, dtype) for way in ("padded", "packed", "shared", "training") for dtype in dtypes]
    head = ["family", *(f"{way} {dtype}" for way, dtype in ways)]
    rows = []
    for line in lines:
        cells = []
        for way, dtype in ways:
            group, text = way_of(line, way, dtype)
            cells.append("-" if group == "refused" else text)
        rows.append([line["family"], *cells])
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _sentences(lines: list[Line], dtypes: list[str], group: str) -> str:
    """Families with the same sentence on one line."""
    said: dict[str, list[str]] = {}
    for line in lines:
        wanted = [
            f"{way} {dtype}: {text}" if group != "refused" else text
            for way in ("padded", "training", "packed", "shared")
            for dtype in dtypes
            for found, text in (way_of(line, way, dtype),)
            if found == group
        ]
        said.setdefault(_short(_nameless(wanted[0], line["family"])), []).append(line["family"])
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {text}" for text, names in said.items())


def _nameless(text: str, family: str) -> str:
    """Without the class's name, so that families with one reason share it."""
    words = [
        "It" if number == 0 and word[:1].isupper() and ("LM" in word or "For" in word or "Model" in word) else word
        for number, word in enumerate(text.split(" "))
    ]
    return " ".join(words).replace(family, "the family")


def _short(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")[:300]

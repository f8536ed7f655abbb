"""A run's folder -> one self-contained page that says how the run went, and its plots as files.

In:  `config.yaml`, `metrics.jsonl`, `heldout.jsonl`, `answers.jsonl`, `summary.json` and `evaluation.json`; any may
     be missing, or cut off.
Out: `plots/*.png` (light) and `report.html` with every plot inside it, in a light and a dark rendering.

It reads files only, so that a report can be made of a run that still goes, was killed, or ran elsewhere.

The page is report.html.j2, autoescaped: prompts and completions are other people's text.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kto_dist.base.files import write_whole
from kto_dist.base.secrets import masked
from kto_dist.record.answered import tables_of
from kto_dist.record.cost import again, cost_of
from kto_dist.record.plots import PLOTS, Record, curve, is_finite, render
from kto_dist.record.run_folder import read_lines
from kto_dist.record.theme import DARK, LIGHT, data_uri
from kto_dist.record.verdict import FIRST, of_health, ordered, shortened, shown_range, verdict


def write_report(run: str | Path) -> Path:
    """Writes the plots and `report.html` of a run's folder; returns the page's path. Raises `OSError`."""
    run = Path(run)
    metrics, heldout = read_steps(run / "metrics.jsonl"), read_steps(run / "heldout.jsonl")
    summary = read_json(run / "summary.json")
    config, answers = run / "config.yaml", read_lines(run / "answers.jsonl")
    told = shortened(_sides_of(summary, answers))

    plots = []
    (run / "plots").mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        light, dark = (render(plot, metrics, heldout, theme) for theme in (LIGHT, DARK))
        if light is None or dark is None:
            continue
        write_whole(run / "plots" / f"{plot.name}.png", light)
        plots.append({"plot": plot, "light": data_uri(light), "dark": data_uri(dark)})

    before, after = sides(summary, heldout)
    rows = _comparison(summary, heldout)
    matters = [row for row in rows if row[0] in FIRST]
    health = [line for line in read_lines(run / "health.jsonl") if isinstance(line.get("message"), str)]
    page = (
        pages()
        .get_template("report.html.j2")
        .render(
            name=run.resolve().name,
            steps=len(metrics),
            last_step=metrics[-1]["step"] if metrics else None,
            verdict=verdict(before, after, metrics, [*of_health(health), *told]) if metrics or after else None,
            tiles=_tiles(metrics, heldout, summary),
            plots=plots,
            comparison=matters or rows,
            more=rows[len(matters) :] if matters else [],
            slices=_slices(after),
            health=[(line, _place(line, metrics)) for line in health],
            samples=_samples(summary, answers),
            answered=tables_of(read_json(run / "evaluation.json")),
            cost=cost_of(metrics, summary),
            again=again(run, summary),
            sections=_sections(summary),
            config=masked(config.read_text(encoding="utf-8")) if config.is_file() else None,
        )
    )
    write_whole(run / "report.html", page.encode("utf-8"))
    return run / "report.html"


def pages(*more: Path) -> Environment:
    """Where the templates lie, here and in `more` folders, and how values are shown in them."""
    environment = Environment(
        loader=FileSystemLoader([*more, Path(__file__).parent]),
        # Not select_autoescape: that goes by the name, and `.j2` would turn escaping off.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    return environment


def read_steps(path: Path) -> list[Record]:
    """The records of a JSON-lines file by step; the last one of a step wins. A cut-off line is left out."""
    if not path.is_file():
        return []
    records: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def show(value: Any) -> str:
    """A value for people: four digits, thousands apart, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        value = value or 0.0  # and no -0
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, str):
        return masked(value)
    return masked(json.dumps(value, ensure_ascii=False, default=str))


def _tiles(metrics: list[Record], heldout: list[Record], summary: Record) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that one looks at first."""
    rows = {name: (before, after) for name, before, after, *_ in _comparison(summary, heldout)}
    tiles = []
    for key, label in (
        ("accuracy/all", "held-out accuracy"),
        ("auc", "held-out AUC"),
        ("rewards/margin", "held-out margin"),
    ):
        if key in rows:
            before, after = rows[key]
            tiles.append((label, show(after), "" if before is None else f"before: {show(before)}"))
    for key, label in (("loss", "training loss"), ("kl_raw", "kl_raw"), ("tokens_per_second", "tokens / s")):
        _, values = curve(metrics, key)
        if values:
            last = values[-10:]
            tiles.append((label, show(sum(last) / len(last)), f"mean of the last {len(last)} steps"))
    return tiles


def sides(summary: Record, heldout: list[Record]) -> tuple[Record, Record]:
    """Held-out figures before and after, from the summary or else the evaluations; {} for a side that is not there."""
    held = summary.get("heldout")
    before, after = (held.get("before"), held.get("after")) if isinstance(held, dict) else (None, None)
    if not isinstance(before, dict) and not isinstance(after, dict) and heldout:
        before, after = (heldout[0] if len(heldout) > 1 else None), heldout[-1]
    return before if isinstance(before, dict) else {}, after if isinstance(after, dict) else {}


def _comparison(summary: Record, heldout: list[Record]) -> list[tuple[str, Any, Any, float | None, str, str]]:
    """(metric, before, after, change, intervals of before and after) on held-out rows, those that matter first."""
    before, after = sides(summary, heldout)
    rows = []
    for key in ordered([*dict.fromkeys([*before, *after])]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict | list) or isinstance(new, dict | list):
            continue  # intervals and the like
        change = new - old if is_finite(old) and is_finite(new) else None
        rows.append((key, old, new, change, shown_range(before, key), shown_range(after, key)))
    return rows


def _slices(after: Record) -> list[tuple[str, list[tuple[str, Any, Any, str, Any, str]]]]:
    """(column, rows of (value, rows, accuracy, interval, auc, interval)) of the exported model."""
    found = after.get("slices")
    if not isinstance(found, dict):
        return []

    def of(own: Record, name: str) -> tuple[Any, str]:
        figure = own.get(name)
        if not isinstance(figure, dict):
            return figure, ""
        return figure.get("value"), shown_range({"intervals": {name: figure}}, name)

    return [
        (column, [(value, own.get("rows"), *of(own, "accuracy/all"), *of(own, "auc")) for value, own in values.items()])
        for column, values in found.items()
    ]


def _sides_of(summary: Record, answers: list[Record]) -> tuple[list[Record], list[Record]]:
    """The first answers, and those of the weights that were exported; nothing of one evaluation alone."""
    best = summary.get("best")
    step = best.get("step") if isinstance(best, dict) else None
    last = next((line for line in answers if line["step"] == step), answers[-1] if answers else {})
    first = answers[0] if answers and answers[0]["step"] < last["step"] else {}
    old, new = ([one for one in _listed(line.get("answers")) if isinstance(one, dict)] for line in (first, last))
    return old, new


def _samples(summary: Record, answers: list[Record]) -> list[Record]:
    """Prompts with answers before and after: the summary's own, or those of answers.jsonl."""
    own = [sample for sample in _listed(summary.get("samples")) if isinstance(sample, dict)]
    before, after = _sides_of(summary, answers)
    old = {one.get("prompt"): one.get("answer") for one in before}
    return own or [
        {"prompt": one.get("prompt"), "before": old.get(one.get("prompt")), "after": one.get("answer")} for one in after
    ]


def _place(line: Record, metrics: list[Record]) -> float:
    """Of a step among all steps so far, in per cent."""
    last = metrics[-1]["step"] if metrics else line["step"]
    return round(100 * min(1.0, line["step"] / max(1, last)), 1)


def _sections(summary: Record) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(title, rows) of what else the summary holds; nested names are joined with dots."""
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in summary.items():
        compared = key == "heldout" and isinstance(value, dict) and not {"before", "after"}.isdisjoint(value)
        if key == "samples" or compared:
            continue
        if isinstance(value, dict):
            sections[key] = list(_leaves(value))
        else:
            sections.setdefault("run", []).append((key, value))
    return [(title, rows) for title, rows in sections.items() if rows]


def _leaves(tree: Record, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

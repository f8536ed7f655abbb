"""Every table of figures in the documents, from the files in `benchmarks/results`: nobody types a figure.

    python benchmarks/figures.py [--check]

A document holds `<!-- figures: KIND FILE ... -->` and `<!-- end -->`; what stands between is written from these files
(without `.json`) by the function of that kind. Said besides: which results are older than the code that they measure,
and what lost more than 5 % against the result before it on the same device, which the tables mark as well.

`--check` writes nothing, and ends with status 1 where a document differs.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import records
from figure_tables import KINDS, Content, draw_lengths

RESULTS = Path(__file__).resolve().parent / "results"
FOLDERS = ("", "docs", "kernels", "benchmarks", "launch")
BLOCK = re.compile(r"(<!-- figures: ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = re.compile(r"<!-- figures:")


class FigureError(Exception):
    """A document asks for what there is not."""


def read(name: str, results: Path) -> Content:
    file = results / f"{name}.json"
    if not file.exists():
        there = ", ".join(sorted(found.stem for found in results.glob("*.json")))
        raise FigureError(f"no result {name}: there are {there}")
    return json.loads(file.read_text(encoding="utf-8"))


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A document with its figures as the results have them. Raises `FigureError`."""

    def block(found: re.Match[str]) -> str:
        kind, *names = found[2].split()
        if kind not in KINDS:
            raise FigureError(f"no figures of kind {kind}: there are {', '.join(KINDS)}")
        return f"{found[1]}{KINDS[kind](*(read(name, results) for name in names))}\n{found[4]}"

    if len(OPENING.findall(text)) != len(BLOCK.findall(text)):
        raise FigureError("a block of figures has no end: close it with <!-- end --> on a line of its own")
    return BLOCK.sub(block, text)


def shown_in(text: str) -> set[str]:
    """The results that a document shows."""
    return {name for found in BLOCK.finditer(text) for name in found[2].split()[1:]}


def documents() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((records.ROOT / folder).glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a document differs")
    arguments = parser.parse_args()
    different = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        try:
            wanted = rewritten(text)
        except FigureError as error:
            sys.exit(f"{path}: {error}")
        if wanted != text:
            different.append(path)
            if not arguments.check:
                path.write_text(wanted, encoding="utf-8")
            print(f"{path.relative_to(records.ROOT)}: {'differs from its results' if arguments.check else 'written'}")
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("benchmark") == "lengths" and not arguments.check:
            draw_lengths(content, records.ROOT / "docs" / f"{file.stem}.png")
        if part := records.outdated(content):
            print(f"{file.name}: older than the code it measures ({part}): from {content['date']}")
        for key, loss in records.losses(content).items():
            print(f"{': '.join((file.name, *key))}: {loss:.0%} slower than on {content['previous']['date']}")
    if arguments.check and different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""The tables of `scaling.py`: measured beside computed, and curves that are computed alone."""

from typing import Any

GIB = 2**30


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def scaling(content: dict[str, Any]) -> str:
    """A line a run; ratios are computed over measured."""
    rows = []
    for line in content["results"]:
        apart = f"{line['no_compute']:.0%}" if "no_compute" in line else ""
        saved = f"{line['checkpoint_seconds']:.2f}" if "checkpoint_seconds" in line else ""
        seconds = line.get("calibrated_seconds", line["computed_seconds"])
        rows.append(
            [
                line["case"],
                f"{line['bytes'] / GIB:.2f}",
                f"{line['computed_bytes'] / line['bytes']:.2f}",
                f"{line['seconds_per_step']:.3f}",
                f"{seconds / line['seconds_per_step']:.2f}",
                apart,
                saved,
            ]
        )
    head = ["run", "GiB", "computed, of it", "s a step", "computed after `--measure`, of it"]
    head += ["share that one rank alone does not take", "s a checkpoint"]
    return f"*{content['device']}; {content['date']}.*\n\n{_table(head, rows)}"


def curves(content: dict[str, Any]) -> str:
    """Tokens a second and GPU, a line a number of GPUs."""
    kinds = list(dict.fromkeys(line["gpu"] for line in content["results"]))
    found = {(line["gpu"], line["gpus"]): line for line in content["results"]}
    rows = []
    for gpus in sorted({line["gpus"] for line in content["results"]}):
        cells = []
        for kind in kinds:
            line = found.get((kind, gpus))
            cells.append("does not fit" if line is None else f"{line['tokens_per_second_and_gpu']:,.0f}")
        rows.append([f"{gpus:,}", *cells])
    return f"*Computed, not measured; {content['date']}.*\n\n{_table(['GPUs', *kinds], rows)}"

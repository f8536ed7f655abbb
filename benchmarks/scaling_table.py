"""The tables of `scaling.py`: measured beside computed, and curves that are computed alone."""

from typing import Any

MIB = 2**20


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def memory(*files: dict[str, Any]) -> str:
    """A line a way to train, two columns a model: measured, and computed over measured."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for place, content in enumerate(files):
        for line in content["results"]:
            if line["memory"]:
                runs.setdefault(line["case"], {})[place] = line
    head, rows = ["run"], []
    for content in files:
        head += [f"{content['settings']['model']}: MiB", "computed, of it"]
    for case, found in runs.items():
        cells = [case]
        for place in range(len(files)):
            line = found.get(place)
            ratio = "" if line is None else f"{line['computed_bytes'] / line['bytes']:.2f}"
            cells += ["" if line is None else f"{line['bytes'] / MIB:,.0f}", ratio]
        rows.append(cells)
    return f"*{files[0]['device']}; {files[0]['date']}.*\n\n{_table(head, rows)}"


def times(*files: dict[str, Any]) -> str:
    """A line a model and run; ratios are computed over measured, medians of the turns."""
    rows = []
    for content in files:
        for line in content["results"]:
            if "calibrated_seconds" not in line:
                continue
            apart = f"{line['no_compute']:.0%}" if "no_compute" in line else ""
            saved = f"{line['checkpoint_seconds']:.2f}" if "checkpoint_seconds" in line else ""
            # what a checkpoint costs is not computed
            ratio = "" if line["checkpoints"] else f"{line['calibrated_seconds'] / line['seconds_per_step']:.2f}"
            model = content["settings"]["model"]
            turns = line["turns"]
            spread = f" ({min(turns):.3f} to {max(turns):.3f})" if len(turns) > 1 else ""
            rows.append([model, line["case"], f"{line['seconds_per_step']:.3f}{spread}", ratio, apart, saved])
    head = ["model", "run", "s a step, median (turns)", "computed after calibration, of it"]
    head += ["share that one rank alone does not take", "s a checkpoint"]
    return f"*{files[0]['device']}; {files[0]['date']}.*\n\n{_table(head, rows)}"


def gist(content: dict[str, Any]) -> list[str]:
    """A line a run, for a terminal."""
    found = []
    for line in content["results"]:
        shown = f"{line['case']:36}"
        if line["memory"] and "computed_bytes" in line:
            shown += f"{line['bytes'] / MIB:9,.1f} MiB, computed {line['computed_bytes'] / line['bytes']:.2f} of it"
        seconds = line.get("calibrated_seconds", line.get("computed_seconds"))
        if seconds is not None:
            shown += f"{line['seconds_per_step']:9.4f} s, computed {seconds / line['seconds_per_step']:.2f} of it"
        found.append(shown)
    return found


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

"""Findings as lines for a terminal: what matters first, each figure with its range."""

from collections.abc import Mapping, Sequence
from typing import Any

from kto_dist.evaluation.contest import Contest
from kto_dist.evaluation.figures import Findings
from kto_dist.evaluation.intervals import Interval
from kto_dist.record.verdict import FIRST, NO_SPREAD


def lines_of(
    found: Findings,
    sets: Sequence[str] = (),
    against: Findings | None = None,
    paired: dict[str, Interval] | None = None,
) -> list[str]:
    """A table of the figures, and below it the sets and slices. `paired`: this one minus the other."""
    head = ["held-out", "value", "95 % interval"]
    rows = [[name, _number(found.figures[name]), _range(found.intervals.get(name))] for name in _shown(found)]
    if against is not None and paired is not None:
        head += ["other", "difference", "95 % interval"]
        for row in rows:
            other, apart = against.figures.get(row[0]), paired.get(row[0])
            row += [
                "" if other is None else _number(other),
                "" if apart is None else f"{apart.value:+.4g}",
                _range(apart),
            ]
    lines = _aligned([head, *rows])
    shown = [*found.intervals.values(), *(paired or {}).values()]
    methods = sorted({interval.method for interval in shown} - {"bootstrap", "constant"})
    if methods:
        lines.append(f"({' and '.join(methods)} in place of a bootstrap: too few prompts, or a figure without spread)")
    if any(NO_SPREAD in line for line in lines):
        lines.append(f"({NO_SPREAD}: every prompt says the same, so nothing tells how sure that is)")
    cuts = [("set", {name: _of_set(found, name) for name in sets}), *found.slices.items()]
    for column, values in cuts:
        if values:
            table = [[column, "rows", "accuracy", "", "auc", ""]]
            table += [[value, f"{own['rows']:,.0f}", *_cells(own)] for value, own in values.items()]
            lines += ["", *_aligned(table)]
    return lines


def answer_lines(
    figures: Mapping[str, Interval | float],
    models: Sequence[str],
    judged: Mapping[str, Contest],
    on_policy: Mapping[str, Interval],
) -> list[str]:
    """A table of the models' answers, what the judge says of them, and what drawn answers say of the model."""
    models = ["model", *(name for name in models if name != "model")]
    sides = [*models, *(["difference"] if "words/difference" in figures else [])]
    rows = [["answers", *(cell for side in sides for cell in (side, "95 % interval"))]]
    for name in ("words", "tokens", "finished", "repeated"):
        if f"{name}/model" in figures:
            cells = [_cells_of(figures.get(f"{name}/{side}")) for side in sides]
            rows.append([name, *(cell for pair in cells for cell in pair)])
    lines = _aligned(rows)
    if "identical" in figures:
        lines.append(f"identical to the reference's: {_with_range(figures['identical'])}")
    for other, found in judged.items():
        own = found.figures()
        lines += ["", f"the model against {other}, judged by {found.judge} in both orders"]
        lines += _aligned([["", "value", "95 % interval"], *([name, *_cells_of(own[name])] for name in own)])
        if found.without_verdict:
            lines.append(f"({found.without_verdict:,} of {2 * found.first.size:,} verdicts were not given)")
    if on_policy:
        lines += ["", "answers drawn from the model, in nats"]
        lines += _aligned([["", "value", "95 % interval"], *([n, *_cells_of(each)] for n, each in on_policy.items())])
    return lines


def _cells_of(figure: Interval | float | None) -> tuple[str, str]:
    if isinstance(figure, Interval):
        return _number(figure.value), _range(figure)
    return ("" if figure is None else _number(figure)), ""


def _with_range(figure: Interval | float) -> str:
    value, sure = _cells_of(figure)
    return f"{value} ({sure})" if sure else value


def _shown(found: Findings) -> list[str]:
    return [name for name in FIRST if name in found.figures]


def _of_set(found: Findings, name: str) -> dict[str, Any]:
    own: dict[str, Any] = {"rows": found.figures[f"{name}/rows"]}
    for figure in ("accuracy/all", "auc"):
        if f"{name}/{figure}" in found.figures:
            own[figure] = found.intervals.get(f"{name}/{figure}", found.figures[f"{name}/{figure}"])
    return own


def _cells(own: dict[str, Any]) -> list[str]:
    """`own`: figure -> its interval, also as a dict, or a number where it has none."""
    cells: list[str] = []
    for name in ("accuracy/all", "auc"):
        figure = own.get(name)
        sure = Interval(**figure) if isinstance(figure, dict) else figure
        if isinstance(sure, Interval):
            cells += [_number(sure.value), _range(sure)]
        else:
            cells += ["" if sure is None else _number(sure), ""]
    return cells


def _number(value: float) -> str:
    return f"{value:.4g}"


def _range(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return NO_SPREAD if interval.method == "constant" else f"{interval.low:.3g} to {interval.high:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

"""Several runs' folders -> one page that puts them side by side: verdicts, figures, settings that differ, curves.

In:  what `report.py` reads of each. Out: one self-contained page. Nothing is tested between runs here: two models on
the same rows are compared by `kto-dist evaluate --against`, whose intervals are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.base.secrets import masked
from kto_dist.record.plots import Record, curve
from kto_dist.record.report import pages, read_json, read_steps, sides
from kto_dist.record.theme import DARK, LIGHT, Theme, data_uri, finish, picture
from kto_dist.record.verdict import FIRST, Verdict, shown_range, verdict

CURVES = (
    ("loss", "Loss", "metrics"),
    ("rewards/margin", "Margin", "metrics"),
    ("kl_raw", "kl_raw", "metrics"),
    ("accuracy/all", "Accuracy on held-out rows", "heldout"),
    ("auc", "AUC on held-out rows", "heldout"),
)
# of a run that says where it lies and what it is called, which differs always
_NAMES = {"train.output", "tracking.run_name", "data.cache"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """What a run's folder says."""

    name: str
    metrics: list[Record]
    heldout: list[Record]
    before: Record
    after: Record
    settings: dict[str, Any]
    """section.key -> value"""

    @property
    def verdict(self) -> Verdict:
        return verdict(self.before, self.after, self.metrics)


def write_side_by_side(runs: Sequence[Path], target: Path) -> Path:
    """Raises `UserError` for a folder that holds no run, `OSError` where the page cannot be written."""
    read = _named([_read(run) for run in runs])
    plots = []
    for key, title, of in CURVES:
        light, dark = (_overlay(read, key, of, theme) for theme in (LIGHT, DARK))
        if light is not None and dark is not None:
            plots.append({"title": title, "light": data_uri(light), "dark": data_uri(dark)})
    figures = [(name, [(run.after.get(name), shown_range(run.after, name)) for run in read]) for name in FIRST]
    page = (
        pages()
        .get_template("side_by_side.html.j2")
        .render(
            runs=read,
            figures=[(name, cells) for name, cells in figures if any(value is not None for value, _ in cells)],
            settings=_differing(read),
            plots=plots,
        )
    )
    write_whole(target, page.encode("utf-8"))
    return target


def _read(run: Path) -> _Read:
    config = run / "config.yaml"
    if not config.is_file() and not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} holds no run: it has neither config.yaml nor metrics.jsonl; give a run's folder")
    heldout = read_steps(run / "heldout.jsonl")
    before, after = sides(read_json(run / "summary.json"), heldout)
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = {}
    sections = tree.items() if isinstance(tree, dict) else ()
    return _Read(
        name=run.resolve().name,
        metrics=read_steps(run / "metrics.jsonl"),
        heldout=heldout,
        before=before,
        after=after,
        settings={
            f"{section}.{key}": value
            for section, keys in sections
            for key, value in (keys.items() if isinstance(keys, dict) else ())
        },
    )


def _named(read: list[_Read]) -> list[_Read]:
    """Runs of one name are numbered."""
    names = [run.name for run in read]
    seen: dict[str, int] = {}
    found = []
    for run in read:
        seen[run.name] = number = seen.get(run.name, 0) + 1
        name = run.name if names.count(run.name) == 1 else f"{run.name} ({number})"
        found.append(replace(run, name=name))
    return found


def _differing(read: Sequence[_Read]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for run in read for key in run.settings)
    table = [(key, [masked(str(run.settings.get(key, ""))) for run in read]) for key in keys if key not in _NAMES]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _overlay(read: Sequence[_Read], key: str, of: str, theme: Theme) -> bytes | None:
    """A curve of each run as PNG; None where none of them has one."""

    def draw(figure: Figure) -> bool:
        axes, drawn = figure.subplots(), False
        colours = list(theme.colours.values())
        for number, run in enumerate(read):
            steps, values = curve(run.metrics if of == "metrics" else run.heldout, key)
            if values:
                style = "-" if number < len(colours) else "--"
                marker = "o" if of == "heldout" else ""
                colour = colours[number % len(colours)]
                axes.plot(steps, values, style, color=colour, label=run.name, marker=marker, linewidth=1.6)
                drawn = True
        finish(axes, theme, key)
        return drawn

    return picture(draw, theme)

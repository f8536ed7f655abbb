"""A run's folder -> plots and one self-contained page that says how the run went.

In:  `config.yaml`, `metrics.jsonl`, `heldout.jsonl`, `summary.json`; any may be missing, short, or cut off.
Out: `plots/*.png` (light) and `report.html` with every plot inside it, in a light and a dark rendering.

It reads files only, so that a report can be made of a run that still goes, was killed, or ran elsewhere.

1. records:  JSON lines, the last one of a step wins (a resumed run repeats steps);
2. plots:    one `Plot` each, with the sentence that tells how to read it;
3. page:     report.html.j2, autoescaped: prompts and completions are other people's text.
"""

import base64
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kto_dist.tracking import without_password

Record = dict[str, Any]

_MARKERS_BELOW = 40  # points of a curve that still want a marker each
_SMOOTH_FROM = 80  # points from which a running mean is easier to read than the raw curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    paper: str
    ink: str
    grid: str
    colours: dict[str, str]  # by role; blue, orange and green stay apart for colour-blind readers


LIGHT = Theme(
    paper="#ffffff",
    ink="#3d4451",
    grid="#dfe3e8",
    colours={"desirable": "#0b66b0", "undesirable": "#c25700", "all": "#17805b", "plain": "#5b4bb3"},
)
DARK = Theme(
    paper="#1b1f27",
    ink="#c4cad4",
    grid="#363d49",
    colours={"desirable": "#5fb0f2", "undesirable": "#f5994b", "all": "#4fc79a", "plain": "#ab9df2"},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    name: str
    title: str
    how_to_read: str
    draw: Callable[[Figure, list[Record], list[Record], Theme], bool]  # False: nothing to draw


def write_report(run: str | Path) -> Path:
    """Writes the plots and `report.html` of a run's folder; returns the page's path. Raises `OSError`."""
    run = Path(run)
    metrics, heldout = read_steps(run / "metrics.jsonl"), read_steps(run / "heldout.jsonl")
    summary = _read_json(run / "summary.json")
    config = run / "config.yaml"

    plots = []
    (run / "plots").mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        light, dark = (_render(plot, metrics, heldout, theme) for theme in (LIGHT, DARK))
        if light is None or dark is None:
            continue
        _replace(run / "plots" / f"{plot.name}.png", light)
        plots.append({"plot": plot, "light": _data_uri(light), "dark": _data_uri(dark)})

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Not select_autoescape: that goes by the name, and `.j2` would turn escaping off.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    page = environment.get_template("report.html.j2").render(
        name=run.resolve().name,
        steps=len(metrics),
        last_step=metrics[-1]["step"] if metrics else None,
        tiles=_tiles(metrics, heldout, summary),
        plots=plots,
        comparison=_comparison(summary, heldout),
        samples=[sample for sample in _listed(summary.get("samples")) if isinstance(sample, dict)],
        sections=_sections(summary),
        config=without_password(config.read_text(encoding="utf-8")) if config.is_file() else None,
    )
    _replace(run / "report.html", page.encode("utf-8"))
    return run / "report.html"


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


def curve(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is a finite number: a step without the class has no such key."""
    points = [(record["step"], record[key]) for record in records if _finite(record.get(key))]
    return [step for step, _ in points], [float(value) for _, value in points]


def running_mean(values: list[float], window: int) -> list[float]:
    """Centred mean over up to `window` values; at the ends the window is cut, so that the length stays."""
    # sums = [0, a, a+b, ...], so that each mean is one subtraction
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    bounds = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[high] - sums[low]) / (high - low) for low, high in bounds]


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
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, str):
        return without_password(value)
    return without_password(json.dumps(value, ensure_ascii=False, default=str))


# ---- plots ----


def _line(
    axes: Axes,
    records: list[Record],
    key: str,
    label: str,
    colour: str,
    *,
    dashed: bool = False,
    smooth: bool = True,  # False for what has no noise: a schedule
) -> bool:
    steps, values = curve(records, key)
    if not values:
        return False
    style = "--" if dashed else "-"
    if smooth and len(values) >= _SMOOTH_FROM:
        window = max(5, len(values) // 25) | 1
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values, label = running_mean(values, window), f"{label} (mean of {window} steps)"
    marker = "o" if len(values) < _MARKERS_BELOW else ""
    axes.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)
    return True


def _points(axes: Axes, records: list[Record], key: str, label: str, colour: str) -> bool:
    steps, values = curve(records, key)
    if not values:
        return False
    axes.plot(steps, values, ":", color=colour, label=label, marker="D", markersize=6, linewidth=1.2)
    return True


def _finish(axes: Axes, theme: Theme, ylabel: str, *, xlabel: str = "step") -> None:
    axes.set_facecolor(theme.paper)
    axes.set_xlabel(xlabel, color=theme.ink, fontsize=12)
    axes.set_ylabel(ylabel, color=theme.ink, fontsize=12)
    axes.tick_params(colors=theme.ink, labelsize=11)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid, framealpha=0.8)


def _classes(prefix: str, ylabel: str, both: str) -> Callable[..., bool]:
    """Draws `prefix/desirable`, `prefix/undesirable`, and `both` with its held-out values."""

    def draw(figure: Figure, metrics: list[Record], heldout: list[Record], theme: Theme) -> bool:
        axes, colours = figure.subplots(), theme.colours
        drawn = [
            _line(axes, metrics, f"{prefix}/desirable", "desirable", colours["desirable"]),
            _line(axes, metrics, f"{prefix}/undesirable", "undesirable", colours["undesirable"]),
            _line(axes, metrics, both, both.rpartition("/")[2], colours["all"], dashed=True),
            _points(axes, heldout, both, f"{both.rpartition('/')[2]}, held-out", colours["plain"]),
        ]
        if prefix == "rewards":
            axes.axhline(0, color=theme.ink, linewidth=0.8)
        _finish(axes, theme, ylabel)
        return any(drawn)

    return draw


def _kl(figure: Figure, metrics: list[Record], heldout: list[Record], theme: Theme) -> bool:
    axes, colours = figure.subplots(), theme.colours
    drawn = [
        _line(axes, metrics, "kl_raw", "kl_raw", colours["undesirable"], dashed=True),
        _line(axes, metrics, "kl", "z0 (kl)", colours["desirable"]),
        _points(axes, heldout, "kl_raw", "kl_raw, held-out", colours["plain"]),
    ]
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    axes.annotate(
        "z0 is clamped at 0",
        (0.99, 0),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=theme.ink,
        fontsize=10,
    )
    _finish(axes, theme, "nats per completion")
    return any(drawn)


def _optimizer(figure: Figure, metrics: list[Record], _heldout: list[Record], theme: Theme) -> bool:
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = [
        _line(above, metrics, "grad_norm", "gradient norm", theme.colours["undesirable"]),
        _line(below, metrics, "learning_rate", "learning rate", theme.colours["desirable"], smooth=False),
    ]
    _finish(above, theme, "grad norm", xlabel="")
    _finish(below, theme, "lr")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.yaxis.get_offset_text().set_color(theme.ink)
    return any(drawn)


def _throughput(figure: Figure, metrics: list[Record], _heldout: list[Record], theme: Theme) -> bool:
    axes = figure.subplots()
    drawn = _line(axes, metrics, "tokens_per_second", "tokens per second", theme.colours["all"])
    axes.set_ylim(bottom=0)
    _finish(axes, theme, "tokens / s")
    return drawn


PLOTS = (
    Plot(
        name="loss",
        title="Loss per class",
        how_to_read="Each class starts at half its weight, because the policy starts as the reference. Below "
        "that, the model moved the way the thumbs point. One class falling while the other rises means that the "
        "model trades one for the other: look at the rewards, then at the class weights.",
        draw=_classes("loss", "loss", "loss"),
    ),
    Plot(
        name="rewards",
        title="Rewards per class",
        how_to_read="A reward is beta times how much likelier (in log-probability) a completion has become than "
        "under the reference; all start at 0. Desirable should end above undesirable: the gap is the margin. "
        "Both falling with a growing margin is common; desirable far below 0 means that liked answers become "
        "unlikely as well: lower train.lr, or raise kto.desirable_weight.",
        draw=_classes("rewards", "reward", "rewards/margin"),
    ),
    Plot(
        name="kl",
        title="Distance from the reference (KL)",
        how_to_read="kl_raw compares policy and reference on prompts paired with other prompts' completions; z0 "
        "is the same number clamped at 0, the point from which rewards count. kl_raw negative for long means "
        "that z0 sits at 0: rewards then count from the reference itself, which is common early in a run. A "
        "steady climb means that the model drifts away: lower train.lr or raise kto.beta. A jumpy curve wants "
        "more KL pairs or a larger batch.",
        draw=_kl,
    ),
    Plot(
        name="accuracy",
        title="Accuracy per class",
        how_to_read="The share of rows on the right side of z0: desirable above it, undesirable below. At the "
        "very start every row ties with z0, so the first points say nothing. Training rows above held-out rows "
        "by a growing gap means overfitting: stop earlier.",
        draw=_classes("accuracy", "share of rows", "accuracy/all"),
    ),
    Plot(
        name="optimizer",
        title="Gradient norm and learning rate",
        how_to_read="Both belong to the whole step, over all devices. A few spikes are normal (train.clip bounds "
        "the update); a norm that keeps growing while the learning rate doesn't comes before a diverging loss.",
        draw=_optimizer,
    ),
    Plot(
        name="throughput",
        title="Throughput",
        how_to_read="Tokens per second of the whole run, over all devices. The first steps warm up and are slow. "
        "A lasting drop comes from outside the model: the disk, the network, or another job on the machine.",
        draw=_throughput,
    ),
)


def _render(plot: Plot, metrics: list[Record], heldout: list[Record], theme: Theme) -> bytes | None:
    # 5.6 inches with 11-point text and up: at a phone's 360 pixels, that text is still 10 pixels tall.
    figure = Figure(figsize=(5.6, 3.5), dpi=160, layout="constrained", facecolor=theme.paper)
    if not plot.draw(figure, metrics, heldout, theme):
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ---- page ----


def _tiles(metrics: list[Record], heldout: list[Record], summary: Record) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that one looks at first."""
    rows = {name: (before, after) for name, before, after, _ in _comparison(summary, heldout)}
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


def _comparison(summary: Record, heldout: list[Record]) -> list[tuple[str, Any, Any, float | None]]:
    """(metric, before, after, change) on held-out rows, from the summary or else the evaluations."""
    held = summary.get("heldout")
    before, after = (held.get("before"), held.get("after")) if isinstance(held, dict) else (None, None)
    if not isinstance(before, dict) and not isinstance(after, dict) and heldout:
        before, after = (heldout[0] if len(heldout) > 1 else None), heldout[-1]
    before, after = (side if isinstance(side, dict) else {} for side in (before, after))
    rows = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        rows.append((key, old, new, new - old if _finite(old) and _finite(new) else None))
    return rows


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


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _replace(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, also to a browser that reloads meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

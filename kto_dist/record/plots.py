"""Records of a run's steps -> plots that say how it went.

In:  `metrics.jsonl` and `heldout.jsonl` as records by step; a metric may be missing from some or all of them.
Out: PNG pictures, in a light and a dark rendering; each `Plot` has the sentence that tells how to read it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kto_dist.record.theme import Theme, finish, picture

Record = dict[str, Any]

_MARKERS_BELOW = 40  # points of a curve that still want a marker each
_SMOOTH_FROM = 80  # points from which a running mean is easier to read than the raw curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    name: str
    title: str
    how_to_read: str
    draw: Callable[[Figure, list[Record], list[Record], Theme], bool]
    """(figure, metrics, heldout, theme) -> whether there was anything to draw."""


def render(plot: Plot, metrics: list[Record], heldout: list[Record], theme: Theme) -> bytes | None:
    """The picture as PNG, None where there is nothing to draw."""
    return picture(lambda figure: plot.draw(figure, metrics, heldout, theme), theme)


def curve(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is a finite number: a step without the class has no such key."""
    points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
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


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a record's value is a number that can be drawn or subtracted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        finish(axes, theme, ylabel)
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
    finish(axes, theme, "nats per completion")
    return any(drawn)


def _optimizer(figure: Figure, metrics: list[Record], _heldout: list[Record], theme: Theme) -> bool:
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = [
        _line(above, metrics, "grad_norm", "gradient norm", theme.colours["undesirable"]),
        _line(below, metrics, "learning_rate", "learning rate", theme.colours["desirable"], smooth=False),
    ]
    finish(above, theme, "grad norm", xlabel="")
    finish(below, theme, "lr")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.yaxis.get_offset_text().set_color(theme.ink)
    return any(drawn)


def _throughput(figure: Figure, metrics: list[Record], _heldout: list[Record], theme: Theme) -> bool:
    axes = figure.subplots()
    drawn = _line(axes, metrics, "tokens_per_second", "tokens per second", theme.colours["all"])
    axes.set_ylim(bottom=0)
    finish(axes, theme, "tokens / s")
    return drawn


def _pairs(figure: Figure, metrics: list[Record], heldout: list[Record], theme: Theme) -> bool:
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = [
        _line(above, metrics, "rewards/chosen", "chosen", theme.colours["desirable"]),
        _line(above, metrics, "rewards/rejected", "rejected", theme.colours["undesirable"]),
        _line(below, metrics, "accuracy/pairs", "pairs told apart", theme.colours["all"]),
        _points(below, heldout, "accuracy/pairs", "held-out", theme.colours["plain"]),
    ]
    above.axhline(0, color=theme.ink, linewidth=0.8)
    finish(above, theme, "reward", xlabel="")
    finish(below, theme, "share of pairs")
    return any(drawn)


def _reliability(figure: Figure, _metrics: list[Record], heldout: list[Record], theme: Theme) -> bool:
    found = _latest(heldout, "reliability")
    if not found:
        return False
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8)
    chance, share = [bin["chance"] for bin in found], [bin["desirable"] for bin in found]
    ends = [[each - bin["low"] for bin, each in zip(found, share, strict=True)]]
    ends.append([bin["high"] - each for bin, each in zip(found, share, strict=True)])
    axes.errorbar(
        chance,
        share,
        ends,
        fmt="o-",
        color=theme.colours["all"],
        markersize=4,
        linewidth=1.5,
        label="tenths of the rows",
    )
    finish(axes, theme, "share that is liked", xlabel="chance by the reward", whole_numbers=False)
    return True


def _histogram(figure: Figure, _metrics: list[Record], heldout: list[Record], theme: Theme) -> bool:
    found = _latest(heldout, "histogram")
    if not found:
        return False
    axes = figure.subplots()
    for name in ("desirable", "undesirable"):
        axes.stairs(found[name], found["edges"], color=theme.colours[name], label=name, fill=True, alpha=0.45)
    axes.axvline(0, color=theme.ink, linewidth=0.8)
    finish(axes, theme, "held-out rows", xlabel="reward", whole_numbers=False)
    return True


def _latest(heldout: list[Record], key: str) -> Any:
    return next((line[key] for line in reversed(heldout) if line.get(key)), None)


PLOTS = (
    Plot(
        name="loss",
        title="Loss per class",
        how_to_read="Each class starts at half its weight (ln 2 for dpo, 1 / (2 beta)² for ipo), because the policy "
        "starts as the reference. Below that, the model moved the way the thumbs point. One class falling while the "
        "other rises means that the model trades one for the other: look at the rewards, then at the class weights.",
        draw=_classes("loss", "loss", "loss"),
    ),
    Plot(
        name="rewards",
        title="Rewards per class",
        how_to_read="A reward is beta times how much likelier (in log-probability) a completion has become than "
        "under the reference; all start at 0. Desirable should end above undesirable: the gap is the margin. "
        "Both falling with a growing margin is common; desirable far below 0 means that liked answers become "
        "unlikely as well: lower train.lr, or raise objective.desirable_weight.",
        draw=_classes("rewards", "reward", "rewards/margin"),
    ),
    Plot(
        name="pairs",
        title="Pairs",
        how_to_read="Of a loss on pairs: chosen should end above rejected. Both falling is common, since the loss asks "
        "for the difference alone; chosen far below 0 means that good answers become unlikely as well: raise "
        "objective.beta, or add objective.sft_weight. A share of 0.5 is a coin.",
        draw=_pairs,
    ),
    Plot(
        name="kl",
        title="Distance from the reference (KL)",
        how_to_read="kl_raw compares policy and reference on prompts paired with other prompts' completions; z0 "
        "is the same number clamped at 0, the point from which rewards count. kl_raw negative for long means "
        "that z0 sits at 0: rewards then count from the reference itself, which is common early in a run. A "
        "steady climb means that the model drifts away: lower train.lr or raise objective.beta. A jumpy curve wants "
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
        name="histogram",
        title="Rewards of held-out rows",
        how_to_read="The last evaluation. The further the two heaps lie apart, the better the reward tells liked "
        "answers from disliked ones. Heaps far from 0 on the same side mean that the model moved away from both.",
        draw=_histogram,
    ),
    Plot(
        name="reliability",
        title="Is the reward a fair chance?",
        how_to_read="Held-out rows in tenths, by the chance of being liked that their reward stands for (sigmoid of "
        "reward - beta z0), against the share that is. On the line, the reward can be read as a chance; flatter than "
        "the line, it is too sure of itself; steeper, not sure enough. Bars hold the true share in 95 of 100 cases.",
        draw=_reliability,
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

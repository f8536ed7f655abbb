"""An audit -> plots that show whose feedback it is, how it moved, and what the cleaning did.

In:  `Audit`. Out: SVG pictures, in a light and a dark rendering; each `Plot` has the sentence that tells how to read
it. The same audit draws the same bytes.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import matplotlib as mpl
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kto_dist.feedback.findings import Audit
from kto_dist.record.theme import Theme, finish

_BARS = 12  # users, or model versions, that a plot has room for


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    name: str
    title: str
    how_to_read: str
    draw: Callable[[Figure, Audit, Theme], bool]  # False: nothing to draw


def render(plot: Plot, audit: Audit, theme: Theme) -> bytes | None:
    """The picture as SVG, None where there is nothing to draw."""
    # 5.6 inches with 11-point text and up: at a phone's 360 pixels, that text is still 10 pixels tall.
    figure = Figure(figsize=(5.6, 3.5), layout="constrained", facecolor=theme.paper)
    if not plot.draw(figure, audit, theme):
        return None
    buffer = io.BytesIO()
    # a name in a script that the font lacks shows as boxes, and stands in the page's table as it is
    with mpl.rc_context({"svg.hashsalt": plot.name}), warnings.catch_warnings():  # without a salt, ids are random
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _ratio(figure: Figure, audit: Audit, theme: Theme) -> bool:
    periods, colours, unit = audit.drift.periods, theme.colours, audit.drift.unit
    if len(periods) < 2 or unit is None:
        return False
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    days = [date.fromisoformat(period.name) for period in periods]
    shares = [period.up_share for period in periods]
    above.fill_between(
        days, [s.low for s in shares], [s.high for s in shares], color=colours["desirable"], alpha=0.2, linewidth=0
    )
    above.plot(days, [s.value for s in shares], color=colours["desirable"], marker="o", markersize=3.5, label="log")
    balance = audit.balance
    if balance.dataset.up_share is not None:
        above.axhline(balance.dataset.up_share, color=colours["all"], linestyle="--", label="dataset")
    if balance.deployment_up_share is not None:
        above.axhline(balance.deployment_up_share, color=colours["plain"], linestyle=":", label="deployment")
    above.set_ylim(0, 1)
    above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    width = {"day": 0.8, "week": 5.6, "month": 24}[unit]
    down = [period.down for period in periods]
    below.bar(days, down, width, color=colours["undesirable"], label="down")
    below.bar(days, [period.up for period in periods], width, bottom=down, color=colours["desirable"], label="up")
    finish(above, theme, "thumbs up", xlabel="", whole_numbers=False)
    finish(below, theme, "votes", xlabel="", whole_numbers=False)
    below.get_legend().remove()
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    below.yaxis.set_major_formatter(FuncFormatter(_short))
    # a margin that no calendar holds would have no ticks: the sentinel 9999-12-31 is a day as any other
    margin = 0.03 * (days[-1] - days[0]).days + width
    low, high = date2num(days[0]) - margin, date2num(days[-1]) + margin
    below.set_xlim(max(low, date2num(date.min)), min(high, date2num(date.max)))
    # a log of few days has few ticks: none within a day
    locator = AutoDateLocator(minticks=2 if (days[-1] - days[0]).days < 5 else 5, maxticks=6)
    below.xaxis.set_major_locator(locator)
    below.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    return True


def _models(figure: Figure, audit: Audit, theme: Theme) -> bool:
    models = audit.drift.models[:_BARS]
    if len(models) < 2:
        return False
    axes, places = figure.subplots(), np.arange(len(models))
    shares = [model.up_share for model in models]
    spread = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
    colour = theme.colours["desirable"]
    axes.errorbar([s.value for s in shares], places, xerr=spread, fmt="o", color=colour, capsize=4, linewidth=2)
    share = audit.balance.judgements.up_share
    if share is not None:
        axes.axvline(share, color=theme.ink, linewidth=1, linestyle="--")
    axes.set_yticks(places, [_plain(model.name, 18) for model in models])
    axes.set_ylim(max(len(models), 4) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(axes, theme, "", xlabel="thumbs up (dashed: all)", whole_numbers=False)
    return True


def _agreement(figure: Figure, audit: Audit, theme: Theme) -> bool:
    agreement, colours = audit.agreement, theme.colours
    if agreement.alpha is None:
        return False
    above, below = figure.subplots(2, 1, height_ratios=(1, 3))
    alpha = agreement.alpha
    above.errorbar(
        [alpha.value],
        [0],
        xerr=[[alpha.value - alpha.low], [alpha.high - alpha.value]],
        fmt="o",
        color=colours["desirable"],
        capsize=5,
        linewidth=2,
        label="everyone",
    )
    if agreement.alpha_without_critics is not None:
        above.plot([agreement.alpha_without_critics], [0], "D", color=colours["all"], label="without heavy downvoters")
    wanted = next((check.threshold for check in audit.checks if check.setting == "min_alpha"), None)
    if wanted is not None:
        above.axvline(wanted, color=colours["undesirable"], linestyle="--", label="wanted")
    above.set_xlim(min(0.0, alpha.low - 0.05), 1)
    above.set_yticks([])
    finish(above, theme, "", xlabel="Krippendorff's alpha", whole_numbers=False)
    above.get_legend().remove()
    above.legend(
        fontsize=10, labelcolor=theme.ink, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.95),
        borderaxespad=0, columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip

    groups = agreement.by_votes
    places = np.arange(len(groups))
    totals = np.array([group.all_up + group.split + group.all_down for group in groups], float)
    bottom = np.zeros(len(groups))
    for name, label, colour in (
        ("all_up", "all up", "desirable"),
        ("split", "split", "plain"),
        ("all_down", "all down", "undesirable"),
    ):
        part = np.array([getattr(group, name) for group in groups]) / totals
        below.bar(places, part, 0.75, bottom=bottom, color=colours[colour], label=label)
        bottom += part
    names = [str(group.votes) for group in groups]
    if groups[-1].votes == 8:
        names[-1] = "8+"
    below.set_xticks(places, names)
    below.set_ylim(0, 1)
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(below, theme, "responses", xlabel="users who judged the response", whole_numbers=False)
    below.get_legend().remove()
    below.legend(fontsize=10, labelcolor=theme.ink, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _lorenz(figure: Figure, audit: Audit, theme: Theme) -> bool:
    users = audit.users
    if users is None or users.users < 2:
        return False
    axes, colours = figure.subplots(), theme.colours
    axes.plot([0, 1], [0, 1], color=theme.ink, linewidth=1, linestyle=":", label="all users equal")
    for curve, gini, label, colour in (
        (users.lorenz_votes, users.gini_votes, "votes", "desirable"),
        (users.lorenz_downvotes, users.gini_downvotes, "downvotes", "undesirable"),
    ):
        axes.plot(curve.x, curve.y, color=colours[colour], linewidth=2, label=f"{label}, Gini {gini:.2f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(axes, theme, "their share of the votes", xlabel="users, the least active first", whole_numbers=False)
    return True


def _influence(figure: Figure, audit: Audit, theme: Theme) -> bool:
    users = audit.users
    if users is None:
        return False
    top = sorted(users.top, key=lambda user: -max(user.loss_before, user.loss_after))[:_BARS]
    axes, places, colours = figure.subplots(), np.arange(len(top)), theme.colours
    axes.barh(places - 0.2, [user.loss_before for user in top], 0.4, color=colours["undesirable"], label="before")
    axes.barh(places + 0.2, [user.loss_after for user in top], 0.4, color=colours["desirable"], label="after")
    allowed = next((check.threshold for check in audit.checks if check.setting == "max_user_share"), None)
    largest = max(max(user.loss_before, user.loss_after) for user in top)
    if allowed is not None and allowed < 1.5 * largest:
        axes.axvline(allowed, color=theme.ink, linestyle="--", linewidth=1, label="wanted at most")
    names = user_names(audit)
    axes.set_yticks(places, [names[user.user] + (" ▼" if user.named else "") for user in top])
    for label in axes.get_yticklabels():
        label.set_fontfamily("monospace")
    axes.set_ylim(max(len(top), 4) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    finish(axes, theme, "", xlabel="share of the loss (▼ heavy downvoter)", whole_numbers=False)
    axes.tick_params(axis="y", labelsize=10)
    return True


def _steps(figure: Figure, audit: Audit, theme: Theme) -> bool:
    steps = [step for step in audit.steps if step.up_removed + step.down_removed + step.unlabelled_removed > 0]
    if not steps:
        return False
    axes, places, colours = figure.subplots(), np.arange(len(steps)), theme.colours
    left = np.zeros(len(steps))
    for name, label, colour in (
        ("down_removed", "thumbs down", colours["undesirable"]),
        ("up_removed", "thumbs up", colours["desirable"]),
        ("unlabelled_removed", "no label", theme.grid),
    ):
        part = np.array([getattr(step, name) for step in steps], float)
        if part.any():
            axes.barh(places, part, 0.7, left=left, color=colour, label=label)
        left += part
    axes.set_yticks(places, [_plain(step.step.replace("_", " "), 18) for step in steps])
    axes.set_ylim(max(len(steps), 4) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    finish(axes, theme, "", xlabel="votes removed", whole_numbers=False)
    return True


def _lengths(figure: Figure, audit: Audit, theme: Theme) -> bool:
    lengths = audit.lengths
    if lengths.up is None and lengths.down is None:
        return False
    axes = figure.subplots()
    for counts, label, colour in (
        (lengths.up_counts, "thumbs up", "desirable"),
        (lengths.down_counts, "thumbs down", "undesirable"),
    ):
        if sum(counts):
            share = np.array(counts) / sum(counts)
            axes.stairs(share, lengths.edges, color=theme.colours[colour], fill=True, alpha=0.25)
            axes.stairs(share, lengths.edges, color=theme.colours[colour], linewidth=1.8, label=label)
    axes.set_xscale("log")
    used = np.flatnonzero(np.array(lengths.up_counts) + np.array(lengths.down_counts))
    axes.set_xlim(lengths.edges[used[0]] / 1.3, lengths.edges[used[-1] + 1] * 1.3)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(axes, theme, "rows of the class", xlabel="characters of the answer", whole_numbers=False)
    return True


def user_names(audit: Audit) -> dict[str, str]:
    """What the page calls each listed user: the start of the hash; a number where the ids aren't hashed."""
    listed = audit.users.top if audit.users else ()
    if audit.user_ids_hashed:
        return {user.user: user.user[:10] for user in listed}
    return {user.user: f"user {number}" for number, user in enumerate(listed, 1)}


def _plain(text: str, length: int) -> str:
    # matplotlib reads a pair of dollars as mathematics
    text = "".join(sign if sign.isprintable() else " " for sign in text).replace("$", r"\$")
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _short(value: float, _place: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


RATIO = Plot(
    name="ratio",
    title="Thumbs up over time",
    how_to_read="The share of thumbs up in the log with its 95 % interval, the number of votes below. The dashed line "
    "is the share in the dataset. A step up or down means that something changed: the model, the interface, or who "
    "votes. Training on both sides of a step mixes two standards.",
    draw=_ratio,
)
MODELS = Plot(
    name="models",
    title="Thumbs up by model version",
    how_to_read="The share of thumbs up that each version's answers got, with 95 % intervals. Versions far apart mean "
    "that a label says as much about the version as about the answer.",
    draw=_models,
)
AGREEMENT = Plot(
    name="agreement",
    title="Agreement between users",
    how_to_read="Alpha is 1 where users always agree and 0 where they agree as often as chance. The bars show, for "
    "responses that so many users judged, how often they were of one mind.",
    draw=_agreement,
)
LORENZ = Plot(
    name="concentration",
    title="How unevenly users vote",
    how_to_read="The further a curve sags below the dotted line, the fewer users gave most of the votes. Where the "
    "curve of downvotes sags more, dislike comes from few.",
    draw=_lorenz,
)
INFLUENCE = Plot(
    name="influence",
    title="Share of the loss, before and after",
    how_to_read="How much each of the most influential users steers the training: if every vote counted fully "
    "(before), and in the dataset, after cleaning, cap and shrinking (after).",
    draw=_influence,
)
STEPS = Plot(
    name="steps",
    title="What each step removed",
    how_to_read="Votes that a step of the cleaning took, by label. A step that takes much more of one class changes "
    "the ratio; the table has the figures.",
    draw=_steps,
)
LENGTHS = Plot(
    name="lengths",
    title="Lengths by class",
    how_to_read="Where the two shapes lie apart, length tells the classes apart, and the model may learn length in "
    "place of quality.",
    draw=_lengths,
)
PLOTS = (STEPS, RATIO, MODELS, AGREEMENT, LORENZ, INFLUENCE, LENGTHS)

"""The look that every page's plots share, in a light and a dark rendering."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    paper: str
    ink: str
    grid: str
    colours: dict[str, str]
    """By role; blue, orange and green stay apart for colour-blind readers."""


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


def picture(draw: Callable[[Figure], bool], theme: Theme) -> bytes | None:
    """What `draw` puts on an empty figure, as PNG; None where it says that there was nothing to draw."""
    # 5.6 inches with 11-point text and up: at a phone's 360 pixels, that text is still 10 pixels tall.
    figure = Figure(figsize=(5.6, 3.5), dpi=160, layout="constrained", facecolor=theme.paper)
    if not draw(figure):
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def finish(axes: Axes, theme: Theme, ylabel: str, *, xlabel: str = "step", whole_numbers: bool = True) -> None:
    """Labels, grid and legend in the pages' look, once everything is drawn."""
    axes.set_facecolor(theme.paper)
    axes.set_xlabel(xlabel, color=theme.ink, fontsize=12)
    axes.set_ylabel(ylabel, color=theme.ink, fontsize=12)
    axes.tick_params(colors=theme.ink, labelsize=11)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    if whole_numbers:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid, framealpha=0.8)

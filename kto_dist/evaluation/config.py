"""The `evaluate` section, and which way each held-out figure gets better."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from kto_dist.base.config import Positive, Section

_CLASSES = ("desirable", "undesirable")
BETTER: dict[str, Literal["higher", "lower"]] = {
    "auc": "higher",
    "accuracy/all": "higher",
    **{f"accuracy/{name}": "higher" for name in _CLASSES},
    "rewards/margin": "higher",
    "loss": "lower",
    **{f"loss/{name}": "lower" for name in _CLASSES},
    "brier": "lower",
    **{f"brier/{name}": "lower" for name in _CLASSES},
}
"""The figures by which one model is better than another."""


class EvaluateConfig(Section):
    """Held-out rows while training."""

    every_steps: Positive | None = Field(None, description="optimizer steps between evaluations; null: first and last")


def better_way(name: str, sets: Sequence[str] = ()) -> Literal["higher", "lower"]:
    """Of `heldout/<figure>` or `heldout/<set>/<figure>`. Raises `ValueError` for what is no such name."""
    figure = name.removeprefix("heldout/")
    of, _, rest = figure.partition("/")
    if figure not in BETTER and of in sets:
        figure = rest
    if not name.startswith("heldout/") or figure not in BETTER:
        known = ", ".join(f"heldout/{each}" for each in BETTER)
        more = f", and heldout/SET/... of {', '.join(sets)}" if sets else ""
        raise ValueError(f"{name!r} is no held-out figure by which models are compared: known are {known}{more}")
    return BETTER[figure]

"""The table of losses: what the rest of the system has to know of each, whatever its formula.

The formulas are in the table of kto_kernels (`losses.py`, with their sources), under the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Takes = Literal["all", "desirable", "pairs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One loss over thumbs."""

    name: str
    title: str
    """For people, with its source."""
    takes: Takes
    """Which rows a step takes: all, the desirable ones, or pairs of a desirable and an undesirable one of a prompt."""
    unit: int
    """Rows that share one coefficient in the head: 1, or 2 for the rows of a pair."""
    has_z0: bool
    """Whether z0 enters it: then every step has KL pairs, and a global batch needs two rows."""
    start: Callable[[float], float] | None
    """beta -> its value at step 0, where the policy is the reference, for a row of weight 1; None: minus the
    log-prob."""
    settings: frozenset[str]
    """Of the `objective` section, those that it uses."""

    @property
    def per_token(self) -> bool:
        """Whether it is a mean over a row's tokens: a loss of log-probs, which would else grow with the answer."""
        return self.start is None


_EVERY = frozenset({"router_loss"})  # it is the model's, whatever the loss
_CLASSES = _EVERY | {"desirable_weight", "undesirable_weight"}

LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="kto",
            title="Kahneman-Tversky Optimization (arXiv 2402.01306)",
            takes="all",
            unit=1,
            has_z0=True,
            start=lambda beta: 0.5,
            settings=_CLASSES | {"beta", "kl_pairs_per_step", "sft_weight"},
        ),
        Loss(
            name="apo_zero_unpaired",
            title="Anchored Preference Optimization, unpaired (arXiv 2408.06266)",
            takes="all",
            unit=1,
            has_z0=False,
            start=lambda beta: 0.5,
            settings=_CLASSES | {"beta", "sft_weight"},
        ),
        Loss(
            name="dpo",
            title="Direct Preference Optimization (arXiv 2305.18290)",
            takes="pairs",
            unit=2,
            has_z0=False,
            start=lambda beta: 0.6931471805599453,  # ln 2
            settings=_EVERY | {"beta", "pairs", "label_smoothing", "sft_weight"},
        ),
        Loss(
            name="ipo",
            title="Identity Preference Optimization (arXiv 2310.12036)",
            takes="pairs",
            unit=2,
            has_z0=False,
            start=lambda beta: 0.25 / beta**2,
            settings=_EVERY | {"beta", "pairs", "sft_weight"},
        ),
        Loss(
            name="sft",
            title="supervised fine-tuning on the desirable answers",
            takes="desirable",
            unit=1,
            has_z0=False,
            start=None,
            settings=_EVERY,
        ),
    )
}

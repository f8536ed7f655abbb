"""The table of losses: each is a curve of one margin.

A unit is the sequences that share one coefficient: one for losses on single completions, two for losses on pairs. With
d = sign, +1 for what is to become more likely and -1 for what is to become less,

    margin = sum over the unit's sequences of d * (logp - ref_logp - z0)
    dloss/dlogp = -slope * d

so the gradients of a unit's sequences differ in d alone, and a head that knows the margin knows them all. z0 and
ref_logp are 0 for losses without them; d is the sign over the sequence's tokens where the margin is one of means. A new
loss is a row here; a new curve is a branch in `triton_sequences` as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this slope (at beta 1; the sigmoid's largest is 1/4) a sequence hardly moves the policy any more.
SATURATED_SLOPE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Loss as a function of the margin. Everything fp64."""

    name: str
    value: Callable[[Tensor, float | Tensor], Tensor]
    """(margin, beta) -> loss"""
    slope: Callable[[Tensor, Tensor, float | Tensor], Tensor]
    """(margin, loss, beta) -> minus its derivative in the margin"""
    steepness: Callable[[Tensor], Tensor]
    """(loss) -> how large the slope is at beta 1"""


# 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where the sigmoid is near 1; likewise -log sigmoid(x)
_SIGMOID = Curve(
    name="sigmoid",
    value=lambda margin, beta: torch.sigmoid(-beta * margin),
    slope=lambda margin, loss, beta: beta * loss * (1 - loss),
    steepness=lambda loss: loss * (1 - loss),
)
_LOGISTIC = Curve(
    name="logistic",
    value=lambda margin, beta: -torch.nn.functional.logsigmoid(beta * margin),
    slope=lambda margin, loss, beta: beta * -torch.expm1(-loss),
    steepness=lambda loss: -torch.expm1(-loss),
)
_LINEAR = Curve(
    name="linear",
    value=lambda margin, beta: -margin,
    slope=lambda margin, loss, beta: torch.ones_like(loss),
    steepness=torch.ones_like,
)
# a target that the margin is to reach, and to stay at
_SQUARED = Curve(
    name="squared",
    value=lambda margin, beta: (margin - 0.5 / beta).square(),
    slope=lambda margin, loss, beta: 1.0 / beta - 2.0 * margin,
    steepness=lambda loss: 2.0 * loss.sqrt(),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One row of the table."""

    name: str
    unit: int
    """sequences that share one coefficient, one after the other: 1, or 2 for a pair"""
    has_z0: bool
    has_reference: bool
    curve: Curve
    averaged: bool = False
    """whether the margin is one of means over a sequence's tokens"""

    def saturated(self, losses: Tensor) -> Tensor:  # (S,) -> (S,) bool
        """Sequences for which the curve is so flat that they hardly move the policy any more."""
        return self.curve.steepness(losses) < SATURATED_SLOPE

    def directions(self, sign: Tensor, lengths: Tensor) -> Tensor:  # (S,), (S,) -> (S,) fp64
        """d of each sequence; one without tokens has nothing to average."""
        return sign.double() / lengths.clamp(min=1) if self.averaged else sign.double()

    def margins(
        self,
        logps: Tensor,  # (S,)
        ref_logps: Tensor,  # (S,)
        directions: Tensor,  # (S,) fp64
        z0: Tensor,  # ()
    ) -> Tensor:  # (S / unit,) fp64, of each unit
        margin = logps.double()
        if self.has_reference:
            margin = margin - ref_logps.double()
        if self.has_z0:
            margin = margin - z0.detach().double()
        return self.by_unit(directions * margin)

    def by_unit(self, values: Tensor) -> Tensor:  # (S,) -> (S / unit,), sums
        return values if self.unit == 1 else values.view(-1, self.unit).sum(1)

    def by_sequence(self, values: Tensor) -> Tensor:  # (S / unit,) -> (S,), each as often as its unit has sequences
        return values if self.unit == 1 else values.repeat_interleave(self.unit)


LOSSES = {
    loss.name: loss
    for loss in (
        # Eq. 7 and 8 of arXiv 2402.01306
        Loss(name="kto", unit=1, has_z0=True, has_reference=True, curve=_SIGMOID),
        # arXiv 2408.06266, unpaired
        Loss(name="apo_zero_unpaired", unit=1, has_z0=False, has_reference=True, curve=_SIGMOID),
        # Eq. 7 of arXiv 2305.18290
        Loss(name="dpo", unit=2, has_z0=False, has_reference=True, curve=_LOGISTIC),
        # Eq. 17 of arXiv 2310.12036, beta its tau; of means over tokens, as its authors confirmed to TRL
        Loss(name="ipo", unit=2, has_z0=False, has_reference=True, curve=_SQUARED, averaged=True),
        # -logp, for sequences of sign +1; beta plays no part
        Loss(name="sft", unit=1, has_z0=False, has_reference=False, curve=_LINEAR),
    )
}


def pick_loss(name: str, sequences: int, soft: bool = False) -> Loss:
    """Raises `ValueError` for a name that the table lacks, for sequences that make no whole units, and for a loss on
    pairs with `soft` labels: which of the two is the better one is what makes a pair."""
    if name not in LOSSES:
        raise ValueError(f"loss ({name!r}) must be one of {', '.join(LOSSES)}")
    loss = LOSSES[name]
    if sequences % loss.unit:
        raise ValueError(
            f"loss ({name!r}) takes units of {loss.unit} sequences, and there are {sequences}: give the sequences of a "
            "unit one after the other"
        )
    if soft and loss.unit > 1:
        raise ValueError(
            f"loss ({name!r}) takes units of {loss.unit} sequences, of which each has one label: give no other_weight"
        )
    return loss

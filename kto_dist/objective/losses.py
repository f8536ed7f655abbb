"""The table of losses: what the rest of the system has to know of each, whatever its formula.

The formulas are in the table of kto_kernels (`losses.py`, with their sources), under the same names.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One loss over thumbs."""

    name: str
    unit: int
    """Rows that share one coefficient in the head: 1, or 2 for the rows of a pair."""
    has_z0: bool
    """Whether z0 enters it: then every step has KL pairs, and a global batch needs two rows."""
    start: float
    """Its value at step 0, where the policy is the reference, for a row of weight 1."""


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(name="kto", unit=1, has_z0=True, start=0.5),
        Loss(name="apo_zero_unpaired", unit=1, has_z0=False, start=0.5),
    )
}

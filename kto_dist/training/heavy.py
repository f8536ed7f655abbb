"""Rows that weigh more than all others of their step together: such a step is about one row alone."""

from dataclasses import dataclass

import numpy as np

from kto_dist.data.batch import Plan, step_rows
from kto_dist.data.examples import Examples

NAMED = 20
"""Rows that are told one by one; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeavyRow:
    row: int
    """Of the training set."""
    step: int
    """In which it was met first, from 1."""
    share: float
    """Of the step's weight."""


def heavy_rows(plan: Plan, train: Examples, class_weights: tuple[float, float]) -> list[HeavyRow]:
    """Of the first epoch, in the order of its steps. Of two rows one always outweighs the other: that says nothing."""
    up = train.probability
    weight = train.weights * (up * class_weights[1] + (1 - up) * class_weights[0])
    fewest = min(plan.global_batch, plan.rows)
    if weight.max(initial=0.0) <= (fewest - 1) * weight.min(initial=np.inf):
        return []
    found = []
    for step in range(min(plan.steps, plan.steps_per_epoch)):
        rows = step_rows(plan, step)
        own = weight[rows]
        place = int(own.argmax())
        if rows.size > 2 and own[place] > own.sum() / 2:
            found.append(HeavyRow(row=int(rows[place]), step=step + 1, share=float(own[place] / own.sum())))
    return found


def warning(found: list[HeavyRow]) -> str:
    """For at least one."""
    first = found[0]
    more = f", and so do {len(found) - 1:,} more rows in theirs (summary.json names them)" if len(found) > 1 else ""
    return (
        f"training row {first.row:,} has {first.share:.0%} of the weight of step {first.step}, more than all others "
        f"together{more}: the step follows that row alone; check the column of weights, or raise train.global_batch"
    )

"""Before the first update the policy is its reference: the check of that, and what it was that differed.

In:  a step's rows with their log-probs and the reference's. Out: nothing, or a `UserError` with the cause as observed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from kto_kernels import LOSSES as KERNELS
from torch import Tensor

from kto_dist.base.errors import UserError
from kto_dist.model.checks import CAP, Rounding
from kto_dist.objective.objective import Objective
from kto_dist.training.step import StepWork

OF_SEVERAL, OF_ONE = 2.0, 8.0
"""Deviations that are rounding: beyond what the furthest of so many rows reaches by chance; in one row of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartCheck:
    """Before the first update every reward is 0; anything else means a wrong reference, template or precision."""

    policy_dtype: str
    """With the precision of its logits where the two differ."""
    reference_dtype: str
    rounding: Rounding
    """What was measured of the policy."""
    packed: bool
    store: str
    from_store: int
    """Reference log-probs that an earlier run scored."""
    alone: Callable[[int], Tensor]
    """Collective. (1,) log-prob of a row of the training set, scored by itself."""

    @property
    def limit(self) -> float:
        """Nats per square root of a row's tokens, of what is rounding in most rows: their root mean square."""
        return self.rounding.limit if self.policy_dtype == self.reference_dtype else self._cap

    def check(self, work: StepWork, objective: Objective, losses: Tensor, logps: Tensor) -> None:
        """Collective. `losses`, `logps`: (B,) of the step's rows. Raises `UserError`, on every rank alike."""
        self._check_logps(work, logps)
        self._check_losses(work, objective, losses)

    def _check_logps(self, work: StepWork, logps: Tensor) -> None:
        root = torch.from_numpy(work.answers).clamp(min=1).double().sqrt()
        off = (logps - work.labels.ref_logps).abs() / root
        mean, worst = float(off.square().mean().sqrt()), int(off.nan_to_num(torch.inf).argmax())
        limit, of_one = self.row_limits(off)
        far = int((~(off <= limit)).sum())
        if far <= 1:
            limit = of_one
        single = not float(off[worst]) <= limit
        if not single and mean <= self.limit:
            return
        row, stored = int(work.rows[worst]), float(work.labels.ref_logps[worst])
        beyond = far if single else int((~(off <= self.limit)).sum())
        once = float(self.alone(row))
        raise UserError(
            f"before the first update the policy must equal its reference, but the log-probs of {beyond} of {len(off)} "
            f"rows differ, the worst by {float(off[worst]):.3g} nats per square root of its tokens (limit "
            f"{limit:.2g}, of all rows' root mean square {self.limit:.2g}: policy in {self.policy_dtype}, reference in "
            f"{self.reference_dtype}). " + self._cause(row, once, stored, root[worst])
        )

    def row_limits(self, off: Tensor) -> tuple[float, float]:  # (B,) nats per square root of each row's tokens
        """Of what is rounding in single rows, by the spread of the step's own: in several of them, and in one alone.

        Their deviation is taken as 1.48 times the median of what they are off by, as of a normal distribution: some
        wrong rows do not move it, and where all are wrong their root mean square says so. The furthest of B sound rows
        lies at about sqrt(2 ln B) deviations. The limit of the checks of leaks is the floor: few or short rows tell
        little of a spread.

        Rounding has a longer tail than that: of 250 rows of SmolLM2-135M, with a deviation of 0.05, the worst was 0.18
        off between two ways of bf16 and 0.27 between one and fp32, and 0.217 was seen in a step of 8, whose rows tell
        little of a deviation. So one row alone may be half as far again, or OF_ONE deviations off (docs/notes.md).
        With experts a row may jump.
        """
        if self.rounding.jumps:
            return self._cap, self._cap
        deviation = 1.48 * float(off.nan_to_num(torch.inf).median())
        several = math.sqrt(2 * math.log(max(2, len(off)))) + OF_SEVERAL
        of_several = max(self.limit, several * deviation)
        return min(self._cap, of_several), min(self._cap, max(1.5 * self.limit, OF_ONE * deviation, of_several))

    @property
    def _cap(self) -> float:
        return CAP[torch.bfloat16 if "bfloat16" in self.policy_dtype + self.reference_dtype else torch.float32]

    def _check_losses(self, work: StepWork, objective: Objective, losses: Tensor) -> None:
        tokens, kind = torch.from_numpy(work.answers).clamp(min=1), KERNELS[objective.loss.name]
        # what a unit's margin may be off by, where its rows and the KL pairs are
        directions = kind.directions(torch.ones(len(tokens)), tokens)
        off = self._cap * kind.by_unit(directions * tokens.double().sqrt())
        if objective.loss.has_z0 and work.kl_answers.size:
            off = off + self._cap * float(np.sqrt(work.kl_answers.max()))
        at, below, above = (kind.curve.value(margin, objective.beta) for margin in (0 * off, -off, off))
        room = kind.by_sequence(torch.maximum((below - at).abs(), (above - at).abs())) + 1e-9
        refs, start = work.labels.ref_logps, objective.loss.start
        wanted = -refs if start is None else torch.full_like(refs, start(objective.beta))
        assert ((losses - wanted).abs() <= room).all(), "the loss at step 0 is not what the table of losses says"

    def _cause(self, row: int, once: float, stored: float, root: Tensor) -> str:
        """Collective. What the worst row does when it is scored again by itself, where it was `once`."""
        twice = float(self.alone(row))
        if not abs(once - twice) <= self.limit * float(root):
            return "Scored twice it has two log-probs: the policy is random, with dropout or noise left on"
        if abs(once - stored) <= self.limit * float(root):
            remedy = "set train.packing=false" if self.packed else "rows of one batch change each other in this family"
            return f"By itself the row agrees, so it sees its neighbours in a micro-batch: {remedy}"
        if self.policy_dtype != self.reference_dtype:
            return (
                "The two compute in different precisions: set reference.dtype and reference.device to auto, or "
                "train.dtype to the reference's"
            )
        if self.from_store:
            return (
                f"The policy gives it {once:.6g} by itself as well, so the reference store ({self.store}) holds values "
                "of other text or weights, or the reference is another model (then name it in reference.path): check "
                "these, and delete the store's folder of this model to score again"
            )
        return (
            f"The policy gives it {once:.6g} by itself as well, and the reference {stored:.6g} in this very run: the "
            "two compute in different ways. Set reference.attention, reference.packing and reference.kernels as the "
            "policy's, and reference.share_prefixes=false"
        )

"""Before the first update the policy is its reference: the check of that, and what it was that differed.

In:  a step's rows with their log-probs and the reference's. Out: nothing, or a `UserError` with the cause as observed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kto_dist.base.errors import UserError
from kto_dist.model.checks import CAP, Rounding
from kto_dist.objective.objective import Objective
from kto_dist.training.step import StepWork


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
        mean = float(off.square().mean().sqrt())
        worst = int(off.nan_to_num(torch.inf).argmax())
        # among many rows the worst rounds further than those that were measured
        if float(off[worst]) <= self._cap and mean <= self.limit:
            return
        beyond = int((~(off <= self.limit)).sum())
        raise UserError(
            f"before the first update the policy must equal its reference, but the log-probs of {beyond} of {len(off)} "
            f"rows differ, the worst by {float(off[worst]):.3g} nats per square root of its tokens (limit "
            f"{self.limit:.2g}: policy in {self.policy_dtype}, reference in {self.reference_dtype}). "
            + self._cause(int(work.rows[worst]), float(logps[worst]), float(work.labels.ref_logps[worst]), root[worst])
        )

    @property
    def _cap(self) -> float:
        return CAP[torch.bfloat16 if "bfloat16" in self.policy_dtype + self.reference_dtype else torch.float32]

    def _check_losses(self, work: StepWork, objective: Objective, losses: Tensor) -> None:
        tokens = torch.from_numpy(work.answers).clamp(min=1)
        # what a row may be off by, where it, the others of its unit and the KL pairs are
        off = self._cap * tokens.double().sqrt().reshape(-1, objective.loss.unit).sum(1)
        if objective.loss.has_z0 and work.kl_answers.size:
            off = off + self._cap * float(np.sqrt(work.kl_answers.max()))
        slope = 1.0 if objective.loss.per_token else objective.beta
        room = (slope * off).repeat_interleave(objective.loss.unit) + 1e-9
        refs, value = work.labels.ref_logps, objective.loss.start
        wanted = -refs if value is None else torch.full_like(refs, value)
        assert ((losses - wanted).abs() <= room).all(), "the loss at step 0 is not what the table of losses says"

    def _cause(self, row: int, together: float, stored: float, root: Tensor) -> str:
        """Collective. What the worst row does when it is scored again, twice and by itself."""
        once, twice = (float(self.alone(row)) for _ in range(2))
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

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
        mean, limit = float(off.square().mean().sqrt()), self.row_limit(off)
        worst = int(off.nan_to_num(torch.inf).argmax())
        alone = not float(off[worst]) <= limit
        if not alone and mean <= self.limit:
            return
        row, together, stored = int(work.rows[worst]), float(logps[worst]), float(work.labels.ref_logps[worst])
        beyond = int((~(off <= (limit if alone else self.limit))).sum())
        once = float(self.alone(row))
        # both sides round: by itself the row lies between the two then, and is far from neither
        between = max(abs(once - together), abs(once - stored)) <= limit * float(root[worst])
        if between and alone and beyond == 1 and mean <= self.limit and float(off[worst]) <= self._cap:
            return
        raise UserError(
            f"before the first update the policy must equal its reference, but the log-probs of {beyond} of {len(off)} "
            f"rows differ, the worst by {float(off[worst]):.3g} nats per square root of its tokens (limit "
            f"{limit:.2g}, of all rows' root mean square {self.limit:.2g}: policy in {self.policy_dtype}, reference in "
            f"{self.reference_dtype}). " + self._cause(row, once, stored, root[worst])
        )

    def row_limit(self, off: Tensor) -> float:  # (B,) nats per square root of each row's tokens
        """Of what is rounding in a single row, by the spread of the step's own rows.

        Their deviation is taken as 1.48 times the median of what they are off by, as of a normal distribution: some
        wrong rows do not move it, and where all are wrong their root mean square says so. The furthest of B sound rows
        lies at about sqrt(2 ln B) deviations; with two more, steps of 16 rows and more are refused for nothing once in
        thousands. The limit of the checks of leaks is the floor: few or short rows tell little of a spread.

        SmolLM2-135M in bf16 has a deviation of 0.04, and its worst of 16 and of 32 rows were 0.13 and 0.10 off, so the
        floor of 0.2 holds there, and 0.3 in one row is found (docs/notes.md). With experts a single row may jump. One
        row beyond the limit is scored by itself once more: where policy and reference round to different sides, each by
        less than the limit, it is sound (0.217 was seen of 8 tokens).
        """
        if self.rounding.jumps:
            return self._cap
        deviation = 1.48 * float(off.nan_to_num(torch.inf).median())
        chance = math.sqrt(2 * math.log(max(2, len(off)))) + 2
        return min(self._cap, max(self.limit, chance * deviation))

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

"""From a step's micro-batches to z0 and to the loss, with the sums that the metrics need.

Knows a model only as something to call, and nothing of ranks: what is summed here is this rank's share. The caller
adds up over ranks and divides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from kto_kernels import LogitTransform, kto_head
from torch import Tensor

from kto_dist.data.batch import MicroBatch
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import Forward, completion_logps, score
from kto_dist.model.profile import part
from kto_dist.objective.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised, apart from the data."""

    loss: Loss
    beta: float
    transform: LogitTransform
    logits_bytes: int | None
    """Memory that the LM head's logits may take at a time; None: by the device."""
    logits_dtype: torch.dtype | None
    """None: fp32 where the device's matmul gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is known of P pairs ahead of the forward; `MicroBatch.position` points into it."""

    ref_logps: Tensor
    """(P,) fp64"""
    sign: Tensor
    """(P,) fp64, +1 desirable, -1 undesirable"""
    weight: Tensor
    """(P,) fp64, class weight times row weight"""

    def to(self, device: torch.device) -> "Labels":
        ref_logps, sign, weight = (getattr(self, name).to(device) for name in ("ref_logps", "sign", "weight"))
        return Labels(ref_logps=ref_logps, sign=sign, weight=weight)


def labels_of(
    examples: Examples,
    rows: np.ndarray,
    ref_logps: np.ndarray,
    class_weights: tuple[float, float],
) -> Labels:
    """`class_weights`: (undesirable, desirable)."""
    desirable = examples.desirable[rows]
    weight = np.asarray(class_weights)[desirable.astype(int)] * examples.weights[rows]
    return Labels(
        ref_logps=torch.from_numpy(ref_logps),
        sign=torch.from_numpy(np.where(desirable, 1.0, -1.0)),
        weight=torch.from_numpy(weight),
    )


@torch.no_grad()
def kl_sums(forward: Forward, batches: Iterable[MicroBatch], ref_logps: Tensor, objective: Objective) -> Tensor:
    """(2,) fp64: sum and count of log pi - log pi_ref over this rank's KL pairs. `ref_logps` (K,) of all pairs."""
    total = torch.zeros(2, dtype=torch.float64, device=ref_logps.device)
    for batch in batches:
        batch = batch.to(ref_logps.device)
        logps = completion_logps(forward, batch, objective.transform, objective.logits_bytes, objective.logits_dtype)
        total[0] += (logps - ref_logps[batch.position]).sum()
        total[1] += logps.numel()
    return total


def loss_and_rows(
    forward: Forward,
    batch: MicroBatch,  # on the device
    labels: Labels,
    z0: Tensor,  # () fp64
    objective: Objective,
) -> tuple[Tensor, Tensor]:  # () sum of weighted losses; (S, 2) fp64 loss and log-prob of each, without gradient
    """One micro-batch's share of the step's loss: divide the sum over all of them by the rows of the step."""
    ref_logps, sign, weight = (getattr(labels, name)[batch.position] for name in ("ref_logps", "sign", "weight"))

    def head(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with part("the head (within the forwards)"):
            result = kto_head(
                hidden,
                lm_head,
                batch.target,
                batch.lengths,
                ref_logps=ref_logps,
                sign=sign,
                row_weight=weight,
                z0=z0,
                beta=objective.beta,
                loss=objective.loss.name,
                bias=bias,
                transform=objective.transform,
                budget=objective.logits_bytes,
                logits_dtype=objective.logits_dtype,
            )
        # plain tensors: ZeRO-3 hooks into whatever a module returns
        return result.loss, result.logps, result.losses

    loss, logps, losses = score(forward, batch, head)
    return loss, torch.stack([losses.detach(), logps.detach()], dim=1).double()

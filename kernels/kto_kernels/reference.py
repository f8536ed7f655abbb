"""The definition of every op, in plain PyTorch with autograd: what the fast ones are compared with.

N completion rows (every row predicts one token), S sequences, H hidden size, V vocabulary size. Arithmetic is done
in fp32, or in fp64 where the inputs are fp64. No chunking: the whole (N, V) is materialised.
"""

import torch
from torch import Tensor

from kto_kernels.head import HeadOutput
from kto_kernels.kto_loss import kto_loss, sequence_logps
from kto_kernels.losses import LOSSES
from kto_kernels.transform import IDENTITY, LogitTransform


def token_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
) -> Tensor:  # (N,) fp32 or fp64, log pi(target | prefix)
    logits = _logits(hidden, weight, bias, transform)
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:  # (N, V)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return transform(logits if bias is None else logits + bias.to(dtype))


def kto_head(
    hidden: Tensor,  # (N, H), the rows of S sequences, one sequence after the other
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,) int64
    lengths: Tensor,  # (S,) int64, rows of each sequence, sum N; 0 is allowed
    *,
    ref_logps: Tensor,  # (S,) fp64, log-prob of each completion under the reference
    sign: Tensor,  # (S,) +1 desirable, -1 undesirable
    row_weight: Tensor,  # (S,) class weight times row weight
    z0: Tensor,  # () the step's KL estimate, clamped at 0, no gradient
    beta: float,
    loss: str = "kto",
    nll_weight: Tensor | None = None,  # (S,) weight of each completion's -logp beside the loss
    other_weight: Tensor | None = None,  # (S,) weight of each completion's loss with the other sign
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
) -> HeadOutput:
    logps = sequence_logps(token_logps(hidden, weight, target, bias=bias, transform=transform), lengths)
    losses = kto_loss(logps, ref_logps, sign, z0=z0, beta=beta, loss=loss, lengths=lengths)
    entropies = None
    if entropy:
        logps_of_all = _logits(hidden, weight, bias, transform).log_softmax(-1)
        entropies = sequence_logps(-(logps_of_all.exp() * logps_of_all).sum(-1), lengths).detach()
    loss_sum = (row_weight * losses).sum()
    if other_weight is not None:
        loss_sum = loss_sum + (other_weight * kto_loss(logps, ref_logps, -sign, z0=z0, beta=beta, loss=loss)).sum()
    if nll_weight is not None:
        loss_sum = loss_sum - (nll_weight * logps).sum()
    return HeadOutput(kind=LOSSES[loss], loss=loss_sum, logps=logps.detach(), losses=losses.detach(), entropy=entropies)

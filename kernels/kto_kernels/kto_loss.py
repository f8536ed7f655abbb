"""From token log-probs to the loss: the sum over a sequence, and the value of each sequence.

S sequences. Everything is fp64: an fp32 ulp at a log-prob of 1e5 is 0.008, which beta would pass on to the loss.
"""

import torch
from torch import Tensor

from kto_kernels.losses import pick_loss


def sequence_lengths(
    sequence: Tensor,  # (N,) int64, the sequence that each row belongs to, 0 to sequences - 1, non-decreasing
    sequences: int,
) -> Tensor:  # (sequences,) int64 on the CPU
    """What the functions below take, from one id a row; a sequence that no row names is empty.

    Raises `ValueError` for ids out of order or out of range. Reads the ids on the host.
    """
    ids = sequence.cpu()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= sequences):
        raise ValueError(f"sequence ids ({int(ids.min())} to {int(ids.max())}) must lie in 0 to {sequences - 1}")
    if bool((ids[1:] < ids[:-1]).any()):
        raise ValueError("sequence ids must not decrease: sort the rows, so that each sequence's follow one another")
    return torch.bincount(ids, minlength=sequences)


def sequence_logps(
    token_logps: Tensor,  # (N,) rows of S sequences, one sequence after the other
    lengths: Tensor,  # (S,) int64, sum N; an empty sequence keeps its place and sums to 0
) -> Tensor:  # (S,) fp64
    """The log-prob of each completion: the sum over its tokens."""
    lengths = lengths.to(token_logps.device, non_blocking=True)
    sequence = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=lengths.device), lengths, output_size=token_logps.numel()
    )
    zeros = torch.zeros(lengths.numel(), dtype=torch.float64, device=token_logps.device)
    return zeros.index_add(0, sequence, token_logps.double())


def kto_loss(
    logps: Tensor,  # (S,) log-probs of the completions under the policy
    ref_logps: Tensor,  # (S,) the same under the reference
    sign: Tensor,  # (S,) +1 desirable, -1 undesirable
    *,
    z0: Tensor,  # () the step's KL estimate, clamped at 0; no gradient flows into it
    beta: float | Tensor,
    loss: str = "kto",
    lengths: Tensor | None = None,  # (S,) tokens of each completion, for a loss of means over them (`ipo`)
) -> Tensor:  # (S,) fp64, unweighted
    """`kto`: 1 - v of each sequence, where v = sigmoid(beta * d * (r - z0)) and r = logps - ref_logps.

    The others of the table, with their sources: `losses.LOSSES`. Where several sequences make a unit, as the two of a
    pair, each carries the unit's loss: the mean over sequences is the mean over units.
    Raises `ValueError` for another `loss`, for sequences that make no whole units, and without `lengths` that it needs.
    """
    row = pick_loss(loss, logps.numel())
    if row.averaged and lengths is None:
        raise ValueError(f"loss ({loss!r}) is of means over a completion's tokens: give their number as lengths")
    directions = sign.double() if lengths is None else row.directions(sign, lengths.to(sign.device))
    return row.by_sequence(row.curve.value(row.margins(logps, ref_logps, directions, z0), beta))

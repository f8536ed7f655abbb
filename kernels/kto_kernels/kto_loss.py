"""From token log-probs to the KTO loss: the sequence sum, the value of each sequence, and its slope.

S sequences. Everything is fp64: an fp32 ulp at a log-prob of 1e5 is 0.008, which beta would pass on to the loss.
"""

import torch
from torch import Tensor

LOSSES = ("kto", "apo_zero_unpaired")

# Below this slope of the sigmoid (its largest is 1/4) a sequence hardly moves the policy any more.
SATURATED_SLOPE = 0.01


def check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss ({loss!r}) must be one of {', '.join(LOSSES)}")


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
) -> Tensor:  # (S,) fp64, unweighted
    """1 - v of each sequence, where v = sigmoid(beta * d * (r - z0)) and r = logps - ref_logps.

    `kto` is Eq. 7 and 8 of arXiv 2402.01306; `apo_zero_unpaired` drops z0 (arXiv 2408.06266, unpaired).
    Raises `ValueError` for another `loss`.
    """
    check_loss(loss)
    log_ratio = logps.double() - ref_logps.double()
    anchor = z0.detach().double() if loss == "kto" else 0.0
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where the sigmoid is near 1
    return torch.sigmoid(-beta * sign.double() * (log_ratio - anchor))


def kto_slope(
    losses: Tensor,  # (S,) fp64, what `kto_loss` returned
    sign: Tensor,  # (S,)
    *,
    beta: float | Tensor,
) -> Tensor:  # (S,) fp64
    """Minus the derivative of `kto_loss` in logps: with l = sigmoid(u), dl/du = l * (1 - l)."""
    return beta * sign.double() * losses * (1 - losses)

"""Segment sum, KTO value and slope as one Triton kernel: a program a sequence, sums in row order, so they repeat."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["first"])
def _sequence_kernel(
    token_logps,  # (N,)
    starts,  # (S + 1,) int64
    ref_logps,  # (S,) fp64, and so are those below
    sign,
    row_weight,
    z0,  # ()
    beta,  # ()
    scales,  # (N,)
    logps,
    losses,
    slopes,
    row_slope,  # (N,)
    first,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = first + tl.program_id(0)
    begin = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    rows = tl.arange(0, BLOCK)
    logp = tl.full((), 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        logp += tl.sum(tl.load(token_logps + start + rows, mask=start + rows < end, other=0.0).to(tl.float64), axis=0)
    d = tl.load(sign + sequence)
    margin = d * (logp - tl.load(ref_logps + sequence) - tl.load(z0))
    # 1 - sigmoid(beta * margin), which keeps its digits where the sigmoid is near 1
    loss = 1.0 / (1.0 + tl.exp(margin * tl.load(beta)))
    tl.store(logps + sequence, logp)
    tl.store(losses + sequence, loss)
    weighted = tl.load(row_weight + sequence) * d * loss * (1.0 - loss) * tl.load(beta)
    tl.store(slopes + sequence, weighted)
    for start in range(begin, end, BLOCK):
        inside = start + rows < end
        of_rows = tl.zeros((BLOCK,), tl.float64) + weighted
        if HAS_SCALES:
            of_rows *= tl.load(scales + start + rows, mask=inside, other=0.0)
        tl.store(row_slope + start + rows, of_rows.to(row_slope.dtype.element_ty), mask=inside)


def sequence_pass(
    token_logps: Tensor,
    starts: Tensor,
    terms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # ref_logps, sign, row_weight, z0, beta
    scale: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor],  # logps, losses, slopes
    row_slope: Tensor,
    first: int,
    last: int,
) -> None:
    """The contract of `sequences.sequence_pass`, its records spread out."""
    if last > first:
        with torch.cuda.device_of(token_logps):
            _sequence_kernel[(last - first,)](
                token_logps,
                starts,
                *terms,
                token_logps if scale is None else scale,
                *found,
                row_slope,
                first,
                HAS_SCALES=scale is not None,
                BLOCK=1024,
                num_warps=4,
            )

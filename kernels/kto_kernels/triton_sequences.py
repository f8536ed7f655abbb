"""Segment sum, loss and slope as one Triton kernel: a program a unit, sums in row order, so they repeat."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kto_kernels.losses import Loss


@triton.jit
def _value_and_slope(margin, beta, CURVE: tl.constexpr):
    """`losses.Curve` in Triton."""
    if CURVE == "sigmoid":
        value = 1.0 / (1.0 + tl.exp(margin * beta))
        slope = beta * value * (1.0 - value)
    elif CURVE == "logistic":
        t = tl.exp(-tl.abs(margin * beta))
        # log(1 + t) * t / ((1 + t) - 1) keeps the digits of log1p(t) where t is small
        rounded = 1.0 + t
        small = rounded == 1.0
        log1p = tl.where(small, t, tl.log(rounded) * t / tl.where(small, 1.0, rounded - 1.0))
        value = tl.maximum(-margin * beta, 0.0) + log1p
        slope = beta * tl.where(margin > 0, t, 1.0) / rounded
    elif CURVE == "squared":
        off = margin - 0.5 / beta
        value = off * off
        slope = -2.0 * off
    else:
        tl.static_assert(CURVE == "linear")
        value = -margin
        slope = tl.full((), 1.0, tl.float64)
    return value, slope


@triton.jit(do_not_specialize=["first"])
def _sequence_kernel(
    token_logps,  # (N,)
    starts,  # (S + 1,) int64
    ref_logps,  # (S,) fp64, and so are those below
    sign,
    row_weight,
    z0,  # ()
    beta,  # ()
    nll_weight,  # (S,)
    other_weight,  # (S,)
    scales,  # (N,)
    logps,
    losses,
    slopes,
    others,
    row_slope,  # (N,)
    first,
    UNIT: tl.constexpr,
    CURVE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_Z0: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = first + tl.program_id(0) * UNIT
    rows = tl.arange(0, BLOCK)
    margin = tl.full((), 0.0, tl.float64)
    weight = tl.full((), 0.0, tl.float64)
    for member in tl.static_range(UNIT):
        sequence = unit + member
        begin = tl.load(starts + sequence)
        end = tl.load(starts + sequence + 1)
        logp = tl.full((), 0.0, tl.float64)
        for start in range(begin, end, BLOCK):
            tokens = tl.load(token_logps + start + rows, mask=start + rows < end, other=0.0)
            logp += tl.sum(tokens.to(tl.float64), axis=0)
        tl.store(logps + sequence, logp)
        if HAS_REFERENCE:
            logp -= tl.load(ref_logps + sequence)
        if HAS_Z0:
            logp -= tl.load(z0)
        margin += tl.load(sign + sequence) * logp
        weight += tl.load(row_weight + sequence)
    value, slope = _value_and_slope(margin, tl.load(beta), CURVE)
    slope *= weight
    if HAS_OTHER:
        # units of one sequence: the loss with the other sign, whose slope pulls the other way
        other, other_slope = _value_and_slope(-margin, tl.load(beta), CURVE)
        tl.store(others + unit, other)
        slope -= tl.load(other_weight + unit) * other_slope
    for member in tl.static_range(UNIT):
        sequence = unit + member
        tl.store(losses + sequence, value)
        tl.store(slopes + sequence, slope)
        signed = tl.load(sign + sequence) * slope
        if HAS_NLL:
            signed += tl.load(nll_weight + sequence)
        begin = tl.load(starts + sequence)
        end = tl.load(starts + sequence + 1)
        for start in range(begin, end, BLOCK):
            inside = start + rows < end
            of_rows = tl.zeros((BLOCK,), tl.float64) + signed
            if HAS_SCALES:
                of_rows *= tl.load(scales + start + rows, mask=inside, other=0.0)
            tl.store(row_slope + start + rows, of_rows.to(row_slope.dtype.element_ty), mask=inside)


def sequence_pass(
    loss: Loss,
    token_logps: Tensor,
    starts: Tensor,
    terms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # ref_logps, sign, row_weight, z0, beta
    nll_weight: Tensor | None,
    other_weight: Tensor | None,
    scale: Tensor | None,
    found: tuple[Tensor, Tensor, Tensor, Tensor | None],  # logps, losses, slopes, others
    row_slope: Tensor,
    first: int,
    last: int,
) -> None:
    """The contract of `sequences.sequence_pass`, its records spread out."""
    logps, losses, slopes, others = found
    if last > first:
        with torch.cuda.device_of(token_logps):
            _sequence_kernel[((last - first) // loss.unit,)](
                token_logps,
                starts,
                *terms,
                terms[0] if nll_weight is None else nll_weight,
                terms[0] if other_weight is None else other_weight,
                token_logps if scale is None else scale,
                logps,
                losses,
                slopes,
                slopes if others is None else others,
                row_slope,
                first,
                UNIT=loss.unit,
                CURVE=loss.curve.name,
                HAS_REFERENCE=loss.has_reference,
                HAS_Z0=loss.has_z0,
                HAS_NLL=nll_weight is not None,
                HAS_OTHER=other_weight is not None,
                HAS_SCALES=scale is not None,
                BLOCK=1024,
                num_warps=4,
            )

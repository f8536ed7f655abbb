"""The row pass as one Triton kernel: a program a row; one read of it, with gradients a second one and a write.

A row of 128,256 fp32 logits is half a megabyte, so that on a large GPU a second read may hit the L2 cache. Arithmetic
is fp32 (fp64 for fp64 logits) whatever is loaded. Nothing is compiled anew when the number of rows changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kto_kernels.transform import LogitTransform

# 16 logits a thread of 8 warps: meant to keep wide loads in flight without spilling registers; not tuned on a GPU.
_BLOCK = 4096


@triton.jit
def _transformed(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP is not None:
        # tanh|u| = (1 - t) / (1 + t) with t = exp(-2|u|), which cannot overflow
        t = tl.exp(-2.0 * tl.abs(z) / SOFTCAP)
        t = (1.0 - t) / (1.0 + t)
        z = tl.where(z < 0, -t, t) * SOFTCAP
    if TEMPERATURE != 1.0:
        z = z / TEMPERATURE
    return z


@triton.jit(do_not_specialize_on_alignment=["target"])
def _row_kernel(
    logits,  # (n, V)
    gradient,  # (n, V), may be logits
    target,  # (n,) int64
    bias,  # (V,)
    logps,  # (n,)
    entropies,  # (n,)
    V,
    logits_stride,
    gradient_stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: 65,536 rows of 128,256 logits have more elements than int32 can count
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    goal = tl.load(target + row)
    columns = tl.arange(0, BLOCK)

    # read before the loops: where the gradient takes the logits' place, another warp may overwrite it in the second
    goal_z = tl.load(logits + goal).to(WIDE)
    if HAS_BIAS:
        goal_z += tl.load(bias + goal).to(WIDE)
    goal_z = _transformed(goal_z, SCALE, SOFTCAP, TEMPERATURE)

    # largest logit so far, and the sum over exp(z - largest)
    largest = tl.full((), float("-inf"), WIDE)
    total = tl.full((), 0.0, WIDE)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        z = tl.load(logits + start + columns, mask=inside, other=0.0).to(WIDE)
        if HAS_BIAS:
            z += tl.load(bias + start + columns, mask=inside, other=0.0).to(WIDE)
        z = _transformed(z, SCALE, SOFTCAP, TEMPERATURE)
        # after the transform: a softcap would turn -inf into a number
        z = tl.where(inside, z, float("-inf"))
        now = tl.maximum(largest, tl.max(z, axis=0))
        # a bias of -inf may rule out all columns so far, and -inf minus itself is no number
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
        largest = now

    # goal_z - largest first: it is exact where the log-prob is near 0
    tl.store(logps + row, (goal_z - largest) - tl.log(total))

    if GRADIENT or ENTROPY:
        gradient += row * gradient_stride
        moment = tl.full((), 0.0, WIDE)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = tl.load(logits + start + columns, mask=inside, other=0.0).to(WIDE)
            if HAS_BIAS:
                z += tl.load(bias + start + columns, mask=inside, other=0.0).to(WIDE)
            z = _transformed(z, SCALE, SOFTCAP, TEMPERATURE)
            p = tl.where(inside, tl.exp(z - largest) / total, 0.0)
            if ENTROPY:
                moment += tl.sum(tl.where(p > 0, p * (z - largest), 0.0), axis=0)
            if GRADIENT:
                g = tl.where(start + columns == goal, p - 1.0, p)
                if SOFTCAP is not None:
                    # d tanh(u) = 1 - tanh(u)^2
                    capped = z * (TEMPERATURE / SOFTCAP)
                    g = g * (1.0 - capped * capped)
                if SCALE != TEMPERATURE:
                    g = g * (SCALE / TEMPERATURE)
                tl.store(gradient + start + columns, g.to(gradient.dtype.element_ty), mask=inside)
        if ENTROPY:
            tl.store(entropies + row, tl.log(total) - moment)


def row_pass(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gradient: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The contract of `rows.row_pass`."""
    rows, vocabulary = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = logits.new_empty(rows, dtype=wide)
    entropies = torch.empty_like(logps) if entropy else None
    if rows:
        assert logits.stride(1) == 1 and (gradient is None or gradient.stride(1) == 1)
        with torch.cuda.device_of(logits):
            _row_kernel[(rows,)](
                logits,
                logits if gradient is None else gradient,
                target,
                logits if bias is None else bias,
                logps,
                logps if entropies is None else entropies,
                vocabulary,
                logits.stride(0),
                logits.stride(0) if gradient is None else gradient.stride(0),
                SCALE=transform.scale,
                SOFTCAP=transform.softcap,
                TEMPERATURE=transform.temperature,
                HAS_BIAS=bias is not None,
                GRADIENT=gradient is not None,
                ENTROPY=entropy,
                WIDE=tl.float64 if wide == torch.float64 else tl.float32,
                BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
                num_warps=8,
            )
    return logps, entropies

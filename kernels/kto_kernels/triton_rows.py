"""The row pass as one Triton kernel: a program a row, one read of it and, with gradients, one write.

exp(z) / sum(exp(z)) needs the whole row before its first element, hence two reads. Here the sum is taken out: what is
written is sum(exp(z - goal)) times the gradient, where `goal` is the target's own logit, and the sum goes with the row,
for whoever scales by the loss's slope anyway. That is safe as long as no other logit lies far above the target's. Where
one does (a log-prob below -24) the row is done again relative to its largest logit, at the cost of two more reads.

Arithmetic is fp32 (fp64 for fp64 logits) whatever is loaded. Nothing is compiled anew when the number of rows changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kto_kernels.transform import LogitTransform

# Columns a program takes at a time and its warps: 16 logits a thread.
BLOCK, WARPS, STAGES = 4096, 8, 1

# Largest sum(exp(z - goal)), about e^24. Far from where bf16 ends (e^88): dH is made of such values before it is
# scaled, and fp32 keeps seven digits of exp(x) while |x| is small.
_LARGEST_SUM = tl.constexpr(2.6e10)
# Below it the target's logit was none (a bias of -inf), and the others are far below 0.
_SMALLEST_SUM = tl.constexpr(1e-10)


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


@triton.jit
def _carried_back(g, z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """d/d(transformed) -> d/d(logit); z is transformed."""
    if SOFTCAP is not None:
        # d tanh(u) = 1 - tanh(u)^2
        capped = z * (TEMPERATURE / SOFTCAP)
        g = g * (1.0 - capped * capped)
    if SCALE != TEMPERATURE:
        g = g * (SCALE / TEMPERATURE)
    return g


@triton.jit
def _load(logits, bias, place, V, SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr):
    inside = place < V
    z = tl.load(logits + place, mask=inside, other=0.0).to(WIDE)
    if HAS_BIAS:
        z += tl.load(bias + place, mask=inside, other=0.0).to(WIDE)
    z = _transformed(z, SCALE, SOFTCAP, TEMPERATURE)
    # after the transform: a softcap would turn -inf into a number
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _from_the_largest(
    logits,
    gradient,
    bias,
    V,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row once more: its largest logit, the sum over exp(z - largest) and its moment; the gradient is written."""
    columns = tl.arange(0, BLOCK)
    # largest logit so far, and the sum over exp(z - largest)
    origin = tl.full((), float("-inf"), WIDE)
    total = tl.full((), 0.0, WIDE)
    for start in range(0, V, BLOCK):
        z = _load(logits, bias, start + columns, V, SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, WIDE)
        now = tl.maximum(origin, tl.max(z, axis=0))
        # a bias of -inf may rule out all columns so far
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(origin - shift) + tl.sum(tl.exp(z - shift), axis=0)
        origin = now
    moment = tl.full((), 0.0, WIDE)
    if GRADIENT or ENTROPY:
        for start in range(0, V, BLOCK):
            place = start + columns
            z = _load(logits, bias, place, V, SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, WIDE)
            e = tl.exp(z - origin)
            if ENTROPY:
                moment += tl.sum(tl.where(e > 0, e * (z - origin), 0.0), axis=0)
            if GRADIENT:
                g = _carried_back(e, z, SCALE, SOFTCAP, TEMPERATURE)
                tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=place < V)
    return origin, total, moment


@triton.jit(do_not_specialize_on_alignment=["target", "logps", "scales", "entropies"])
def _row_kernel(
    logits,  # (n, V)
    gradient,  # (n, V), other memory than the logits': a row may be read again
    target,  # (n,) int64
    bias,  # (V,)
    logps,  # (n,)
    scales,  # (n,) what the row's gradient is still to be multiplied by
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
    STAGES: tl.constexpr,
):
    # int64: 65,536 rows of 128,256 logits have more elements than int32 can count
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient += row * gradient_stride
    goal = tl.load(target + row)
    columns = tl.arange(0, BLOCK)

    goal_z = tl.load(logits + goal).to(WIDE)
    if HAS_BIAS:
        goal_z += tl.load(bias + goal).to(WIDE)
    goal_z = _transformed(goal_z, SCALE, SOFTCAP, TEMPERATURE)

    # -inf minus itself is no number
    origin = tl.where(goal_z == float("-inf"), 0.0, goal_z)
    sums = tl.zeros((BLOCK,), WIDE)
    moments = tl.zeros((BLOCK,), WIDE)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        place = start + columns
        z = _load(logits, bias, place, V, SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, WIDE)
        e = tl.exp(z - origin)
        sums += e
        if ENTROPY:
            moments += tl.where(e > 0, e * (z - origin), 0.0)
        if GRADIENT:
            g = _carried_back(e, z, SCALE, SOFTCAP, TEMPERATURE)
            tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=place < V)
    total = tl.sum(sums, axis=0)
    moment = tl.sum(moments, axis=0)

    if (total > _LARGEST_SUM) | (total < _SMALLEST_SUM):
        origin, total, moment = _from_the_largest(
            logits, gradient, bias, V, SCALE, SOFTCAP, TEMPERATURE, HAS_BIAS, GRADIENT, ENTROPY, WIDE, BLOCK
        )

    # goal_z - origin first: it is exact where the log-prob is near 0
    tl.store(logps + row, (goal_z - origin) - tl.log(total))
    if GRADIENT:
        # over what a loop has put there: leaving it out would cost the loop its wide stores
        tl.debug_barrier()
        g = _carried_back(tl.exp(goal_z - origin) - total, goal_z, SCALE, SOFTCAP, TEMPERATURE)
        tl.store(gradient + goal, g.to(gradient.dtype.element_ty))
        tl.store(scales + row, 1.0 / total)
    if ENTROPY:
        tl.store(entropies + row, tl.log(total) - moment / total)


def row_pass(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gradient: Tensor | None,
    logps: Tensor,
    scale: Tensor | None,
    entropy: Tensor | None,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
    stages: int = STAGES,
) -> None:
    """The contract of `rows.row_pass`; `gradient` and `scale` come together."""
    rows, vocabulary = logits.shape
    assert (gradient is None) == (scale is None)
    assert logits.stride(1) == 1 and (gradient is None or gradient.stride(1) == 1)
    assert gradient is None or gradient.data_ptr() != logits.data_ptr()
    if not rows:
        return
    with torch.cuda.device_of(logits):
        _row_kernel[(rows,)](
            logits,
            logits if gradient is None else gradient,
            target,
            logits if bias is None else bias,
            logps,
            logps if scale is None else scale,
            logps if entropy is None else entropy,
            vocabulary,
            logits.stride(0),
            logits.stride(0) if gradient is None else gradient.stride(0),
            SCALE=transform.scale,
            SOFTCAP=transform.softcap,
            TEMPERATURE=transform.temperature,
            HAS_BIAS=bias is not None,
            GRADIENT=gradient is not None,
            ENTROPY=entropy is not None,
            WIDE=tl.float64 if logps.dtype == torch.float64 else tl.float32,
            BLOCK=min(block, triton.next_power_of_2(vocabulary)),
            STAGES=stages,
            num_warps=warps,
        )

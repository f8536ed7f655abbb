"""LM head and log-softmax gather over chunks of rows: the log-prob of every token, in bounded memory.

In:  hidden states of the completion rows, the head's weight, the targets.
Out: log pi(target | prefix) of each row, differentiable in hidden, weight and bias, whatever the gradient of each row.

Without gradients it costs one N*H*V matmul. With them, forward also makes the hidden states' gradient (two in all
where the head is frozen); the weight's needs the incoming gradient first, so backward makes the logits again (four),
unless one chunk holds all rows and is kept (three). `kto_head` knows what comes in ahead, and always takes three.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kto_kernels.chunks import evenly
from kto_kernels.logits import LogitPass, Plan, plan_chunks
from kto_kernels.matmul import one_dtype, pick_logits_dtype, scaled_rows
from kto_kernels.rows import pick_backend
from kto_kernels.transform import IDENTITY, LogitTransform
from kto_kernels.weight_sums import WeightSums


def token_logps(
    hidden: Tensor,  # (N, H) fp64, fp32 or bf16
    weight: Tensor,  # (V, H) same dtype
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    budget: int | None = None,  # bytes that one chunk's logits and their gradient may take; None: by the device
    logits_dtype: torch.dtype | None = None,  # None: fp32, but bf16 for bf16 on the CPU
    backend: str = "auto",  # "torch" or "triton"; auto: triton on CUDA where it is installed
) -> Tensor:  # (N,) fp32 (fp64 for fp64 input), log pi(target | prefix)
    """Same value as `kto_kernels.reference.token_logps`, in bounded memory; N = 0 gives an empty result.

    The target's logit and the log-sum-exp always come from the same logits. Under autocast hidden and weight are cast
    as a matmul would. Targets must lie in 0..V-1: a GPU does not check. Raises `ValueError` for two dtypes, and for a
    `logits_dtype` or a `backend` that cannot be had.
    """
    hidden, weight = one_dtype(hidden, weight)
    backend = pick_backend(backend, hidden.device)
    plan = plan_chunks(hidden, weight, pick_logits_dtype(logits_dtype, hidden), backend, budget)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, target, transform, plan, differentiable)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        transform: LogitTransform,
        plan: Plan,
        differentiable: bool,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (differentiable and wants for wants in ctx.needs_input_grad[:3])
        ctx.chunks = list(evenly(0, len(hidden), plan.rows))
        # one chunk's gradient is kept; more are made again, because they do not fit the budget
        keep = len(ctx.chunks) == 1 and (wants_weight or wants_bias)
        largest, gradient = _largest(ctx.chunks), wants_hidden or keep
        logits = LogitPass(hidden, weight, bias, target, transform, plan, largest=largest, gradient=gradient)
        unscaled = torch.empty_like(hidden) if wants_hidden else None
        for start, stop in ctx.chunks:
            logits.run(start, stop)
            if unscaled is not None:
                torch.mm(logits.gradient(stop - start), weight, out=unscaled[start:stop])
        kept = logits.gradient(len(hidden)) if keep else None
        ctx.save_for_backward(hidden, weight, bias, target, unscaled, kept, logits.rows.scale)
        ctx.settings = (transform, plan)
        return logits.rows.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_logps.device.type, enabled=False):
            return *_gradients(ctx, grad_logps), *[None] * 4


def _gradients(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias."""
    hidden, weight, bias, target, unscaled, kept, scale = ctx.saved_tensors
    _, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    transform, plan = ctx.settings
    factor = -grad_logps  # G is the gradient of -log pi
    sums = WeightSums(weight=wants_weight, bias=wants_bias, chunks=len(ctx.chunks), backend=plan.backend)
    if wants_weight or wants_bias:
        logits = None
        if kept is None:
            largest = _largest(ctx.chunks)
            logits = LogitPass(hidden, weight, bias, target, transform, plan, largest=largest, gradient=True)
            scale = logits.rows.scale
        for start, stop in ctx.chunks:
            if logits is not None:
                logits.run(start, stop)
            gradient = kept if logits is None else logits.gradient(stop - start)
            own = factor[start:stop]
            sums.add(gradient, hidden[start:stop], own if scale is None else own * scale[start:stop])
    grad_hidden = None
    if unscaled is not None:
        grad_hidden = scaled_rows(unscaled, factor if scale is None else factor * scale, plan.backend)
    grad_weight, grad_bias = sums.result(weight)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


def _largest(chunks: list[tuple[int, int]]) -> int:
    return max((stop - start for start, stop in chunks), default=0)

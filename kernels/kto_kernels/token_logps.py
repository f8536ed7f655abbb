"""LM head and log-softmax gather over chunks of rows: the log-prob of every token, in bounded memory.

In:  hidden states of the completion rows, the head's weight, the targets.
Out: log pi(target | prefix) of each row, differentiable in hidden, weight and bias, whatever the gradient of each row.

Without gradients it costs one N*H*V matmul. With them, forward also makes the hidden states' gradient (two in all
where the head is frozen); the weight's needs the incoming gradient first, so backward makes the logits again (four),
unless one chunk holds all rows and is kept (three). `kto_head` knows what comes in ahead, and always takes three.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kto_kernels.matmul import (
    LogitBuffers,
    add_product,
    logits_of,
    one_dtype,
    pick_logits_dtype,
    rows_per_chunk,
    weighted_sum,
)
from kto_kernels.rows import pick_backend, row_pass
from kto_kernels.transform import IDENTITY, LogitTransform


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
    logits_dtype = pick_logits_dtype(logits_dtype, hidden)
    backend = pick_backend(backend, hidden.device)
    rows = rows_per_chunk(hidden, weight, logits_dtype, budget)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, target, transform, rows, logits_dtype, backend, any(wanted))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, rows, logits_dtype, backend, differentiable):
        wants_hidden, wants_weight, wants_bias = (differentiable and wants for wants in ctx.needs_input_grad[:3])
        ctx.chunks = [slice(start, min(start + rows, len(hidden))) for start in range(0, len(hidden), rows)]
        # one chunk's gradient is kept; more are made again, because they do not fit the budget
        ctx.keep = len(ctx.chunks) == 1 and (wants_weight or wants_bias)
        logps = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        unscaled = torch.empty_like(hidden) if wants_hidden else None
        buffers = LogitBuffers(hidden, weight, min(rows, len(hidden)), logits_dtype, with_gradient=differentiable)
        kept = None
        for chunk in ctx.chunks:
            logits, gradient = buffers.take(chunk.stop - chunk.start)
            logits_of(hidden[chunk], weight, logits)
            logps[chunk] = row_pass(
                logits,
                target[chunk],
                bias=bias,
                transform=transform,
                gradient=gradient if wants_hidden or ctx.keep else None,
                entropy=False,
                backend=backend,
            ).logps
            if wants_hidden:
                torch.mm(gradient, weight, out=unscaled[chunk])
            if ctx.keep:
                kept = gradient
        ctx.save_for_backward(hidden, weight, bias, target, unscaled, kept)
        ctx.settings = (transform, logits_dtype, backend)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        with torch.autocast(grad_logps.device.type, enabled=False):
            return _TokenLogps._gradients(ctx, grad_logps)

    @staticmethod
    def _gradients(ctx, grad_logps):
        hidden, weight, bias, target, unscaled, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        transform, logits_dtype, backend = ctx.settings
        scale = -grad_logps  # G is the gradient of -log pi
        grad_hidden = (unscaled * scale[:, None]).to(hidden.dtype) if wants_hidden else None
        grad_weight = grad_bias = None
        if wants_bias:
            grad_bias = torch.zeros_like(bias, dtype=grad_logps.dtype)
        if wants_weight or wants_bias:
            size = max((chunk.stop - chunk.start for chunk in ctx.chunks), default=0)
            buffers = None if ctx.keep else LogitBuffers(hidden, weight, size, logits_dtype, with_gradient=True)
            for chunk in ctx.chunks:
                if ctx.keep:
                    gradient = kept
                else:
                    logits, gradient = buffers.take(chunk.stop - chunk.start)
                    logits_of(hidden[chunk], weight, logits)
                    row_pass(
                        logits,
                        target[chunk],
                        bias=bias,
                        transform=transform,
                        gradient=gradient,
                        entropy=False,
                        backend=backend,
                    )
                if wants_weight:
                    scaled = (hidden[chunk] * scale[chunk, None]).to(hidden.dtype)
                    grad_weight = add_product(grad_weight, gradient.T, scaled)
                if wants_bias:
                    grad_bias += weighted_sum(gradient, scale[chunk])
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None

"""LM head and log-softmax gather over chunks of rows, so that logits never exceed a fixed memory budget.

In:  hidden states of the completion rows, the head's weight, the targets.
Out: log pi(target | prefix) of each row, differentiable in hidden, weight and bias.

Backward makes each chunk's logits again: four N*H*V matmuls in all, one without gradients. The gradient of the
weight is summed over chunks in fp32 whatever the weight's dtype, and leaves in one piece, so that tied embeddings and
ZeRO see one dense gradient.
"""

import torch
from torch import Tensor

from kto_kernels.transform import IDENTITY, LogitTransform

DEFAULT_BUDGET = 256 * 2**20


def token_logps(
    hidden: Tensor,  # (N, H) fp64, fp32 or bf16
    weight: Tensor,  # (V, H) same dtype
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    budget: int = DEFAULT_BUDGET,  # bytes that one chunk's logits may take
) -> Tensor:  # (N,) fp32 (fp64 for fp64 input), log pi(target | prefix)
    """Same value as `kto_kernels.reference.token_logps`, in bounded memory; N = 0 gives an empty result.

    Logits are fp32, except for bf16 inputs on the CPU, whose matmul rounds them to bf16; the target's logit and the
    log-sum-exp always come from the same logits.
    """
    return _TokenLogps.apply(hidden, weight, bias, target, transform, _rows_per_chunk(hidden, weight, budget))


def _rows_per_chunk(hidden: Tensor, weight: Tensor, budget: int) -> int:
    bytes_per_logit = max(hidden.element_size(), 4)
    return max(1, budget // (weight.shape[0] * bytes_per_logit))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    if hidden.dtype == torch.bfloat16 and hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, weight.T)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if bias is not None:
        logits.add_(bias)
    return transform(logits)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """total + left @ right; in `dtype` where nothing is added any more, else in fp32 (fp64 for fp64)."""
    if left.dtype == torch.bfloat16 and left.is_cuda:
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = torch.mm(left, right)
    if total is not None:
        return total.add_(product)
    return product.to(dtype or torch.promote_types(product.dtype, torch.float32))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, transform, rows):
        normaliser = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        logps = torch.empty_like(normaliser)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = _logits(hidden[chunk], weight, bias, transform)
            normaliser[chunk] = logits.logsumexp(-1)
            logps[chunk] = logits.gather(-1, target[chunk, None])[:, 0] - normaliser[chunk]
            del logits  # before the next chunk's are made, or two chunks are alive at once
        ctx.save_for_backward(hidden, weight, bias, target, normaliser)
        ctx.transform, ctx.rows = transform, rows
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, target, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if wants_bias else None
        for start in range(0, hidden.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = _logits(hidden[chunk], weight, bias, ctx.transform)
            # The derivative of a softcap needs the logits; else they become their own gradient, in place.
            grad = logits.clone() if ctx.transform.softcap is not None else logits
            # d logp / d logits = onehot(target) - softmax, times the gradient that comes in
            scale = grad_logps[chunk, None]
            grad.sub_(normaliser[chunk, None]).exp_().mul_(-scale).scatter_add_(1, target[chunk, None], scale)
            grad = ctx.transform.derivative_(grad, logits)
            del logits
            if wants_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if wants_weight:
                one_chunk = ctx.rows >= hidden.shape[0]
                grad_weight = _add_product(grad_weight, grad.T, hidden[chunk], weight.dtype if one_chunk else None)
            del grad
        if wants_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = grad_bias.to(bias.dtype) if wants_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None

"""Layers of a model as a CPU runs them best: the same values, in fewer passes over memory.

1. `quicken`     puts them into a model where it runs on a CPU; its modules, weights and hooks stay as they are
2. `rms_norm`    the usual norm, whose backward autograd would make of a dozen passes, and keep fp32 copies for
3. `linear`      in fp32 by oneDNN, where that is faster than MKL (`kto_kernels.onednn`)

Forwards round as the plain layers do, so that nothing has to be scored again.
"""

import inspect
from functools import partial
from typing import Any

import torch
from kto_kernels import onednn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def quicken(lm: PreTrainedModel) -> None:
    """Changes the forwards of this model's own modules."""
    for module in lm.modules():
        if type(module) is nn.Linear:
            module.forward = partial(linear, module)  # type: ignore[method-assign]
        elif _is_usual_norm(type(module)):
            module.forward = partial(rms_norm, module)


def _is_usual_norm(kind: type) -> bool:
    """Families have classes of their own for it, with the same text."""
    if "RMSNorm" not in kind.__name__:
        return False
    try:
        return inspect.getsource(vars(kind)["forward"]) == inspect.getsource(LlamaRMSNorm.forward)
    except (OSError, TypeError, KeyError):  # no text to be had, or another class's
        return False


def rms_norm(module: Any, hidden: Tensor) -> Tensor:
    # in fp64 families compute it in fp32 all the same, and there the order of its sums would be seen
    if hidden.device.type != "cpu" or hidden.dtype == torch.float64 or not torch.is_grad_enabled():
        return type(module).forward(module, hidden)
    return _RMSNorm.apply(hidden, module.weight, module.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        wide_weight, given = weight.to(torch.float32), gradient.to(torch.float32)
        normed = hidden.to(torch.float32) * scale
        both = normed * given
        of_weight = both.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_hidden = None
        if ctx.needs_input_grad[0]:
            shared = both.mul_(wide_weight).mean(-1, keepdim=True)
            torch.mul(given, wide_weight, out=both)
            of_hidden = both.addcmul_(normed, shared, value=-1.0).mul_(scale).to(hidden.dtype)
        return of_hidden, of_weight, None


def linear(module: nn.Linear, rows: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if rows.dtype != weight.dtype or not onednn.pays(rows):
        return functional.linear(rows, weight, bias)
    flat: Tensor = _Linear.apply(rows.reshape(-1, rows.shape[-1]), weight, bias)
    # a view made here, unlike one made within, may be changed in place, as llama4 does
    return flat.view(*rows.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return onednn.linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        of_rows = onednn.product(gradient, weight) if wants_rows else None
        of_weight = onednn.product(gradient.T, rows) if wants_weight else None
        return of_rows, of_weight, gradient.sum(0) if wants_bias else None

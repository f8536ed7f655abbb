"""A linear layer with LoRA as one node of autograd: peft's values, in fewer passes over memory.

peft adds `lora_B(lora_A(x)) * scaling` in three steps, each with a tensor as large as the layer's output, and autograd
sums two gradients of x. Here the small matmuls add to the large ones' results: forward and backward, each is written
once. The layer's own weight has no gradient, so its third matmul falls away.

Layers whose weights are gathered by hooks (ZeRO-3) keep peft's forward, and so do DoRA's.
"""

from functools import partial
from typing import Any

import torch
from kto_kernels import onednn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel


def quicken_adapter(lm: PreTrainedModel) -> None:
    """Changes the forwards of this model's own layers; modules, weights and hooks stay as they are."""
    modules: list[Any] = [module for module in lm.modules() if _is_plain(module)]
    for module in modules:
        module.forward = partial(_forward, module)


def _is_plain(module: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(module) is Linear and not module.lora_variant and type(module.base_layer) is nn.Linear


def _forward(layer: Any, rows: Tensor) -> Tensor:
    (name,) = layer.lora_A.keys()
    base, inner, outer = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    if hasattr(base.weight, "ds_id") or layer.disable_adapters or layer.merged or rows.dtype != base.weight.dtype:
        plain: Tensor = type(layer).forward(layer, rows)
        return plain
    flat: Tensor = _Adapted.apply(
        rows.reshape(-1, rows.shape[-1]), base.weight, base.bias, inner, outer, layer.scaling[name]
    )
    # a view made here, unlike one made within, may be changed in place, as llama4 does
    return flat.view(*rows.shape[:-1], len(base.weight))


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # (N, I)
        weight: Tensor,  # (O, I), frozen
        bias: Tensor | None,  # (O,), frozen
        inner: Tensor,  # (R, I), peft's A
        outer: Tensor,  # (O, R), peft's B
        scaling: float,
    ) -> Tensor:  # (N, O)
        wide = onednn.linear(rows, weight, bias) if onednn.pays(rows) else functional.linear(rows, weight, bias)
        narrow = rows @ inner.T
        ctx.save_for_backward(rows, weight, inner, outer, narrow)
        ctx.scaling = scaling
        return wide.addmm_(narrow, outer.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner, outer, narrow = ctx.saved_tensors
        through = (gradient @ outer).mul_(ctx.scaling)  # (N, R)
        of_rows = None
        if ctx.needs_input_grad[0]:
            of_rows = onednn.product(gradient, weight) if onednn.pays(gradient) else gradient @ weight
            of_rows.addmm_(through, inner)
        return of_rows, None, None, through.T @ rows, (gradient.T @ narrow).mul_(ctx.scaling), None

"""Fused kernels for a model's layers: norms, rotary embedding and gated MLPs of Liger, put into one model.

1. `pick_kernels`   a setting, a model's config and a device -> "liger" or "none"
2. `fuse`           puts them into a loaded model; its losses stay out, since the LM head is ours

Rounding differs from the plain layers', so policy and reference use the same, and the reference's fingerprint says so.
"""

import inspect
import sys
import weakref
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base.errors import UserError


def _missing(config: PretrainedConfig, device: torch.device) -> str | None:
    """Why Liger's layers cannot be had there, or None."""
    if device.type != "cuda":
        return f"they run on GPUs, not on {device.type}"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'kto_dist[gpu]')"
    if str(config.model_type) not in _families():
        return f"Liger knows no layers of {config.model_type}"
    return None


def _families() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def pick_kernels(setting: str, name: str, config: PretrainedConfig, device: torch.device, *, like: str = "auto") -> str:
    """`auto`: none where `like` is, else Liger's where they can be had. Raises `UserError`."""
    if name == "none" or (name == "auto" and like == "none"):
        return "none"
    reason = _missing(config, device)
    if name == "auto":
        return "liger" if reason is None else "none"
    if reason:
        raise UserError(f"{setting} ({name}) cannot be had: {reason}; use auto or none")
    return name


def fuse(lm: PreTrainedModel) -> None:
    """Layers of this model alone.

    Liger also changes names in the family's module: classes, so that later models have its layers, which is undone at
    once, and the function of the rotary embedding, which layers look up as they run: it stays until the last model that
    was fused is gone.
    """
    apply = _families()[str(lm.config.model_type)]
    # of the losses each family has its own selection
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    off = {name: False for name in losses if name in inspect.signature(apply).parameters}
    before = lm.__dict__.get("forward"), type(lm).forward
    places = (sys.modules[type(lm).__module__], nn)
    for place in places:
        for name, held in _held.get(place, {}).items():
            setattr(place, name, held.plain)
    names = {place: dict(vars(place)) for place in places}
    apply(model=lm, **off)
    assert before == (lm.__dict__.get("forward"), type(lm).forward), "Liger replaced the model's own forward"
    for place in places:
        for name, plain in names[place].items():
            fused = vars(place)[name]
            if fused is plain:
                continue
            if isinstance(plain, FunctionType):
                held = _held.setdefault(place, {}).setdefault(name, _Held(plain, fused))
                held.models += 1
                weakref.finalize(lm, held.release, place, name)
            else:
                setattr(place, name, plain)
    for place in places:
        for name, held in _held.get(place, {}).items():
            setattr(place, name, held.fused)


class _Held:
    """A function of a family's module, replaced while models that need it live."""

    def __init__(self, plain: FunctionType, fused: Any):
        self.plain, self.fused, self.models = plain, fused, 0

    def release(self, place: ModuleType, name: str) -> None:
        self.models -= 1
        if not self.models:
            setattr(place, name, self.plain)
            del _held[place][name]


_held: dict[ModuleType, dict[str, _Held]] = {}

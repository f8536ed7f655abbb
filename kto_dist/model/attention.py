"""Attention as a table: what each implementation takes, and where it can be had.

1. `ATTENTIONS`       varlen, flash_attention_2, sdpa, eager, the best first
2. `pick_attention`   a setting, a model's config, a device and a dtype -> a name of the table
3. `pick_packing`     whether sequences lie end to end: wherever none pays for another, and the family can
4. `varlen`           causal attention of each sequence to itself, by their bounds: no mask, no padding

`varlen` is registered with transformers under its name and without a mask function, so that no mask is built. Bounds
reach it through the decoder's keyword arguments (`cu_seq_lens_q`, `max_length_q`), as flash_attention_2's do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import import_utils

from kto_dist.base.errors import UserError
from kto_dist.model.slices import by_slices


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What an implementation is asked to serve."""

    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    elsewhere: bool = False
    """On another machine, which has the packages that are missing here."""

    @property
    def family(self) -> str:
        return str(self.config.model_type)

    @property
    def supports(self) -> Callable[[str], bool]:
        """Whether the family's class states that it can: `supports("sdpa")`."""
        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        return lambda what: known is None or bool(getattr(known, f"_supports_{what}", False))

    @property
    def flash_kernels(self) -> list[str] | None:
        """The flash attentions that give the family's numbers, where its class names them; None: any does."""
        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        return getattr(known, "_compatible_flash_implementations", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    name: str
    variable_length: bool
    """Takes the bounds of sequences that lie end to end, and computes nothing between them."""
    takes_mask: bool
    """Takes a mask of any form, (R, 1, T, T)."""
    missing: Callable[[Place], str | None]
    """Why it cannot be had there, or None."""


def switch_length(config: PretrainedConfig, max_length: int) -> int | None:
    """Beyond how many tokens a row turns with other frequencies (longrope), if rows may be as long; else None.

    transformers asks for the longest row of a forward, and turns all its rows alike: a short row would be scored by
    the lengths of those beside it.
    """
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, dict)]
    lengths = [
        int(rope["original_max_position_embeddings"])
        for rope in (ropes, *nested)
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
    ]
    return min(lengths) if lengths and min(lengths) < max_length else None


def cannot_pack(config: PretrainedConfig, max_length: int) -> str | None:
    """Why sequences that lie end to end would see each other in this family, or None."""
    text = config.get_text_config()
    family = str(text.model_type)
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is not None and getattr(known, "_is_stateful", False):
        return f"{family} carries a state along the row"
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"{family} has layers ({', '.join(sorted(others))}) that run on over the end of a sequence"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", "") == "alibi":
        return f"{family} counts positions along the row (ALiBi)"
    for name in CHOSEN:
        chosen = getattr(text, name, None)
        if chosen and chosen < max_length:
            return f"{family} attends to {chosen} chosen tokens or blocks of a row ({name}), whosever they are"
    return _UNPACKABLE.get(family)


# How many tokens, or blocks of tokens, sparse attention chooses among all of a row.
CHOSEN = ("index_topk", "indexer_budget", "index_topk_blocks", "keep_window_size")

# What no config and no class says of a family in transformers 5.23; each was seen (tests/test_attention.py).
_ALONG_THE_ROW = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "opt", "pegasus"),
    *("plbart", "prophetnet", "trocr", "xglm"),
)
_UNPACKABLE = {family: f"{family} counts positions along the row" for family in _ALONG_THE_ROW}
_LOST_ON_THE_WAY = {
    "nemotron": "nemotron hands no keyword arguments to its layers",
    "phimoe": "phimoe tells its window to a mask alone",
}


def _no_flash(place: Place) -> str | None:
    """What varlen on a GPU and flash_attention_2 share."""
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel takes bf16 and fp16, not {str(place.dtype).removeprefix('torch.')}"
    if _capability(place.device) < (8, 0):
        return "its kernel needs a GPU of compute capability 8.0 (Ampere) or newer"
    size = _head_size(place.config)
    return f"its kernel takes heads of 256 at the most, not {size}" if size > 256 else None


def _capability(device: torch.device) -> tuple[int, int]:
    """Without a GPU here one is planned for, and those that plans know are Ampere or newer."""
    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):
        return (8, 0)


def _head_size(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    read = [largest(text, name) for name in ("head_dim", "global_head_dim", "v_head_dim")]
    nope, rope = (getattr(text, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope"))
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not any(read) and not nope + rope and heads and hidden:
        read.append(hidden // heads)
    return max([nope + rope, *(size for size in read if size)])


def largest(config: PretrainedConfig, name: str) -> int | None:
    """A field, where layers have their own of it (gemma4) the largest one."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        layers: Iterable[PretrainedConfig] = config.per_layer_config
        return max((getattr(layer, name, None) or 0 for layer in layers), default=None)


def _no_varlen(place: Place) -> str | None:
    text = place.config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap:
        return f"{place.family} caps attention scores (attn_logit_softcapping {softcap})"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return f"{place.family}'s attention is not causal"
    # a row is longer than whatever sparse attention chooses, as far as this table knows
    if reason := cannot_pack(place.config, 2**31) or _LOST_ON_THE_WAY.get(place.family):
        return reason
    # Where flash attention is supported, windows come as arguments and not in a mask; where sdpa is, there are no
    # sinks; with an attention backend, the keyword arguments reach the layers.
    if not all(place.supports(what) for what in ("flash_attn", "sdpa", "attention_backend")):
        return f"{place.family} in transformers hands its attention to no other function, or more than q, k and v"
    if place.device.type == "cpu":
        return None
    return _no_flash(place) if place.device.type == "cuda" else f"it has no kernel for {place.device.type}"


def _no_flash_attention_2(place: Place) -> str | None:
    if place.device.type != "cuda":
        return f"it runs on GPUs, not on {place.device.type}"
    if not (place.elsewhere or import_utils.is_flash_attn_2_available()):
        return "the package flash-attn is not installed"
    if not place.supports("flash_attn"):
        return f"{place.family} in transformers does not take it"
    others = place.flash_kernels
    if others is not None and "flash_attention_2" not in others:
        return f"{place.family} in transformers takes {' or '.join(others)} alone, as attention with sinks does"
    return _no_flash(place)


def _no_sdpa(place: Place) -> str | None:
    return None if place.supports("sdpa") else f"{place.family} in transformers does not take it"


ATTENTIONS = {
    attention.name: attention
    for attention in (
        Attention(name="varlen", variable_length=True, takes_mask=True, missing=_no_varlen),
        Attention(name="flash_attention_2", variable_length=True, takes_mask=False, missing=_no_flash_attention_2),
        Attention(name="sdpa", variable_length=False, takes_mask=True, missing=_no_sdpa),
        Attention(name="eager", variable_length=False, takes_mask=False, missing=lambda place: None),
    )
}


def pick_attention(
    setting: str,
    name: str,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    like: str = "auto",
    elsewhere: bool = False,
) -> str:
    """`auto`: as `like` where that can be had, else the first of the table that can. `elsewhere`: as `Place` has it.
    Raises `UserError`."""
    place = Place(config=config, device=device, dtype=dtype, elsewhere=elsewhere)
    if name == "auto":
        wanted = [*((like,) if like != "auto" else ()), *ATTENTIONS]
        return next(each for each in wanted if ATTENTIONS[each].missing(place) is None)
    reason = ATTENTIONS[name].missing(place)
    if reason:
        could = [each for each, row in ATTENTIONS.items() if row.missing(place) is None]
        raise UserError(f"{setting} ({name}) cannot be had: {reason}; use auto, or {' or '.join(could)}")
    return name


def refuse_sinks(lm: nn.Module, attention: str, path: str) -> None:
    """Raises `UserError` for a loaded model whose attention has sinks, a learned logit beside those of the positions,
    and would be computed by what leaves them out: transformers hands them to every attention, and those that do not
    know them say nothing. Of its own families the table knows it ahead, of code that a model brings along nobody does.
    """
    sinks = [name for name, _ in lm.named_parameters() if "sink" in name.rpartition(".")[2]]
    if sinks and attention != "eager":
        raise UserError(
            f"the attention of {path} has sinks ({sinks[0]}), which {attention} would leave out without a word: set "
            "model.attention=eager"
        )


def pick_packing(setting: str, value: str | bool, attention: str, config: PretrainedConfig, max_length: int) -> bool:
    """`auto` packs where attention has a variable length: a mask would compute foreign tokens only to hide them.

    Raises `UserError` where packing is asked for and the family cannot.
    """
    reason = cannot_pack(config, max_length)
    if value == "auto":
        return ATTENTIONS[attention].variable_length and reason is None
    if value and reason:
        raise UserError(
            f"packed sequences would see each other, since {reason}: set {setting}=false, which pads instead"
        )
    return bool(value)


def varlen(
    module: nn.Module,
    query: Tensor,  # (R, heads, T, size)
    key: Tensor,  # (R, key heads, T, size)
    value: Tensor,  # (R, key heads, T, value size)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,) int32 into the R * T positions
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # (R, T, heads, value size)
    """What transformers' layers call. `sliding_window` counts the token itself, as theirs does."""
    if attention_mask is not None:
        # a mask of one's own (`reference.prefix`), which says all: nobody else makes one for this attention
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=False)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    strange = [name for name in ("softcap", "s_aux", "position_bias", "cache") if others.get(name) is not None]
    strange += ["dropout"] if others.get("dropout") else []
    strange += [] if causal else ["is_causal=False"]
    if strange:
        raise UserError(
            f"{type(module).__name__} asks its attention for {', '.join(strange)}, which varlen does not know: "
            "set model.attention to sdpa or eager"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError(
            f"{type(module).__name__} got no bounds of sequences (cu_seq_lens_q): varlen is for forwards that give "
            "them; where there are none, as in `generate`, call set_attn_implementation('sdpa') first"
        )
    form = _on_cuda if query.device.type == "cuda" else _on_cpu
    return form(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


AttentionInterface.register("varlen", varlen)

# torch 2.11 has no grouped heads there: keys are repeated by hand
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    rows, heads, width, size = query.shape
    query, key, value = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = size**-0.5 if scale is None else scale
    extra = value.shape[-1]
    if extra != size:
        # the kernel knows one size of head
        value = functional.pad(value, (0, size - extra))
    if not _GROUPED and key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # to the left are positions besides the token itself
    seen = (window - 1 if window else -1, 0)
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=seen, **_GROUPED)
    assert isinstance(out, Tensor)
    return out[..., :extra].reshape(rows, width, heads, extra).contiguous()


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    rows, _, width, size = query.shape
    scale = size**-0.5 if scale is None else scale
    query, key, value = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return by_slices(query, key, value, bounds.diff().tolist(), scale, window).unflatten(0, (rows, width))

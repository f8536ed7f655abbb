"""A Hugging Face causal language model, made to score completions: dtype, the transform of its logits, and the head.

In:  a model that `loading` has loaded. Out: `ScoringModel`, whose forward runs the decoder, keeps only the hidden
states that predict completion tokens, and hands them to a `Head` together with the LM head's weight.

The head runs *inside* `lm_head.forward`, so that whatever hooks a sharding engine has put on that module gather the
weight for it and release it after, in forward and in backward. Nothing here knows about ranks or DeepSpeed.
"""

from collections.abc import Callable
from typing import Any

import torch
from kto_kernels import LogitTransform, sequence_logps, token_logps
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base.errors import UserError
from kto_dist.data.batch import MicroBatch
from kto_dist.model.attention import ATTENTIONS
from kto_dist.model.cpu_layers import quicken
from kto_dist.model.lora_layers import quicken_adapter
from kto_dist.model.router import Router

Head = Callable[[Tensor, Tensor, Tensor | None], Any]
# (N, H) hidden states of completion rows, (V, H) weight, (V,) bias or None -> tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device multiplies matrices in bf16, and fp32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
    return torch.bfloat16 if fast else torch.float32


def pick_logits(setting: str, name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """None, the kernels' own choice, for `auto`. Raises `UserError` for a precision that the matmul cannot give."""
    if name == "auto":
        return None
    if DTYPES[name] != dtype and not (device.type == "cuda" and name == "fp32"):
        raise UserError(
            f"{setting} ({name}) cannot be had from a {str(dtype).removeprefix('torch.')} model on {device.type}: its "
            "matmul returns what it is given, and only CUDA can return fp32 from bf16; use auto"
        )
    return DTYPES[name]


# Where model families keep what they do to the logits after the matmul. Each value multiplies, divides or caps.
_MULTIPLIERS = {
    "logit_scale": ("cohere", "cohere2", "cohere2_moe", "cohere_compass"),
    "lm_head_multiplier": ("falcon_h1",),
    "logits_scaling": ("hyperclovax",),
}
_DIVISORS = ("logits_scaling",)  # the Granite families, minicpm3
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    text = config.get_text_config()
    scale = 1.0
    for name, families in _MULTIPLIERS.items():
        if text.model_type in families and getattr(text, name, None) is not None:
            scale *= float(getattr(text, name))
    for name in _DIVISORS:
        if getattr(text, name, None) and text.model_type not in _MULTIPLIERS.get(name, ()):
            scale /= float(getattr(text, name))
    softcaps = [getattr(text, name) for name in _SOFTCAPS if getattr(text, name, None)]
    return LogitTransform(scale=scale, softcap=softcaps[0] if softcaps else None)


class ScoringModel(nn.Module):
    """`lm` with one forward: tokens of a micro-batch and a head -> what the head returns."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm: PreTrainedModel = lm
        self.transform = logit_transform(lm.config)
        self._decoder = _decoder_of(lm)
        if not torch.cuda.is_available():
            quicken(lm)
        if hasattr(lm, "peft_config"):
            quicken_adapter(lm)
        lm_head = lm.get_output_embeddings()
        if hasattr(lm_head, "base_layer"):  # what peft puts in a layer's place
            raise UserError(
                f"{type(lm).__name__}'s LM head is adapted ({type(lm_head).__name__}): the fused head multiplies by "
                "one weight and makes the gradient of all of it; leave lm_head out of the adapter's target_modules"
            )
        if not isinstance(lm_head, nn.Linear):
            raise UserError(
                f"{type(lm).__name__} has no linear LM head ({type(lm_head).__name__}): it cannot be trained here"
            )
        plain_forward = lm_head.forward

        def forward(hidden: Tensor, head: Head | None = None) -> Any:
            if head is None:
                return plain_forward(hidden)
            # mamba's last norm leaves fp32, as its residual stream is, and its own forward casts here as well
            return head(hidden.to(lm_head.weight.dtype), lm_head.weight, lm_head.bias)

        lm_head.forward = forward  # type: ignore[method-assign, assignment]
        # cuDNN's attention builds a plan for every new shape, in milliseconds of the host, and micro-batches have many
        torch.backends.cuda.enable_cudnn_sdp(False)

    def forward(
        self,
        input_ids: Tensor,  # (R, T)
        position_ids: Tensor | None,  # (R, T)
        attention_mask: Tensor | None,  # (R, T), or (R, 1, T, T)
        bounds: Tensor,  # (S + 1,) int32, `MicroBatch.bounds`
        longest: int,
        gather: Tensor | None = None,  # (N,) rows of the flattened hidden states
        head: Head | None = None,
        router: Router | None = None,
    ) -> Any:
        """Without a head: the model's own logits (R, T, V), for checks; without positions the family counts its own.

        With `router`: what the head returns, and what that makes of the routers' logits.
        """
        tokens: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        width = input_ids.shape[1]
        if ATTENTIONS[self.lm.config._attn_implementation].variable_length:
            tokens |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            tokens |= {"max_length_q": longest, "max_length_k": longest}
            if attention_mask is not None and attention_mask.dim() == 2:
                # padding has bounds of its own
                tokens["attention_mask"] = None
        if tokens["attention_mask"] is not None:
            tokens |= _widened(tokens, -width % round_width(input_ids.device))
        if head is None:
            return self.lm(**tokens).logits[:, :width]
        decoder = getattr(self.lm, self._decoder)
        found = decoder(**tokens) if router is None else decoder(**tokens, output_router_logits=True)
        hidden = found[0][:, :width]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, gather)
        result = self.lm.get_output_embeddings()(rows, head=head)
        if router is None:
            return result
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not len(rows):  # a micro-batch without sequences
            is_token = torch.zeros_like(input_ids)
        is_token = functional.pad(is_token, (0, tokens["input_ids"].shape[1] - width))
        return result, router(found.router_logits, is_token.reshape(-1) > 0)


def _decoder_of(lm: PreTrainedModel) -> str:
    """The attribute that holds the model below its head. llama4's prefix names that of its multimodal kin."""
    for name in (lm.base_model_prefix, "model", "transformer", "decoder"):
        if isinstance(getattr(lm, name, None), nn.Module):
            return name
    raise UserError(f"{type(lm).__name__} keeps no decoder apart from its LM head: it cannot be trained here")


ROUND_WIDTH = {"cuda": 64}
"""By kind of device: where rows are padded there, they are as wide as a multiple of this. Few widths, so that kernels
and memory of one shape serve many micro-batches."""


def round_width(device: torch.device) -> int:
    return ROUND_WIDTH.get(device.type, 1)


def _widened(tokens: dict[str, Any], more: int) -> dict[str, Any]:
    """With more padding at the end of every row."""
    if not more:
        return {}
    wider = {name: functional.pad(tokens[name], (0, more)) for name in ("input_ids", "position_ids")}
    mask = tokens["attention_mask"]
    if mask.dim() == 2:
        return {**wider, "attention_mask": functional.pad(mask, (0, more))}
    mask = functional.pad(mask, (0, more, 0, more))
    # as in `prefix.lay_out`, padding sees itself: a softmax over nothing is not a number
    mask.diagonal(dim1=-2, dim2=-1)[..., -more:] = True
    return {**wider, "attention_mask": mask}


Forward = Callable[..., Any]
# a ScoringModel, or an engine around one


def score(forward: Forward, batch: MicroBatch, head: Head, router: Router | None = None) -> Any:
    """Runs the model on a micro-batch that lies on the model's device."""
    more = {} if router is None else {"router": router}
    return forward(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        bounds=batch.bounds,
        longest=batch.longest,
        gather=batch.gather,
        head=head,
        **more,
    )


def completion_logps(
    forward: Forward,
    batch: MicroBatch,
    transform: LogitTransform,
    budget: int | None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """(S,) fp64: the log-prob of every completion of a micro-batch. `budget`: bytes of logits at a time."""
    return score(forward, batch, logps_head(batch, transform, budget, logits_dtype))


def logps_head(
    batch: MicroBatch, transform: LogitTransform, budget: int | None, logits_dtype: torch.dtype | None = None
) -> Head:
    """Of hidden states the log-prob of every completion, (S,) fp64."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logps = token_logps(
            hidden, weight, batch.target, bias=bias, transform=transform, budget=budget, logits_dtype=logits_dtype
        )
        return sequence_logps(logps, batch.lengths)

    return head

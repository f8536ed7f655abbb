"""The policy's model, how ZeRO shards it, and the checks of both that need no torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kto_dist.base.config import Place, Positive, PositiveFloat, Section, Text
from kto_dist.base.errors import UserError


class ModelConfig(Section):
    """The policy, and the reference where `reference.path` is empty."""

    path: Place = Field(description="Hugging Face folder or hub name of the model to align")
    gguf_file: str | None = Field(None, description="GGUF file inside `path`, unpacked to dense weights at load")
    attention: Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="attention implementation; auto: the first of these that device, dtype and family have"
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto", description="fused kernels of layers; auto: Liger's on GPUs where installed and known for the family"
    )
    quantization: Literal["none", "nf4", "fp4"] = Field(
        "none", description="keep linear layers but the LM head in 4 bits (bitsandbytes), for an adapter beside them"
    )
    gradient_checkpointing: bool = Field(False, description="recompute each decoder layer in backward, to save memory")
    trust_remote_code: bool = Field(
        False, description="run the Python code that a model's folder brings along (auto_map): read it first"
    )


class AdapterConfig(Section):
    """Training a few added weights in place of the model's own, which stay as they are."""

    type: Literal["none", "lora", "dora"] = Field("none", description="none: all of the model's weights are trained")
    rank: Positive | None = Field(None, description="of the added matrices; null: 16, or that of `start`")
    alpha: PositiveFloat | None = Field(
        None, description="what they add is multiplied by alpha / rank; null: twice the rank, or that of `start`"
    )
    targets: Literal["all-linear"] | tuple[Text, ...] | None = Field(
        None,
        description="names of layers, as [q_proj, v_proj], or of parameters of experts; null: all-linear, which is all "
        "linear layers but the LM head, or those of `start`",
    )
    start: Place | None = Field(
        None, description="folder of an adapter to go on with; the reference is then the model with it"
    )
    merged: bool = Field(False, description="export the whole model with the adapter merged into it as well")

    @model_validator(mode="after")
    def _is_one(self) -> "AdapterConfig":
        if self.type == "none":
            given = [name for name in ("rank", "alpha", "targets", "start") if getattr(self, name) is not None]
            if given or self.merged:
                raise ValueError(
                    f"{', '.join([*given, *(['merged'] if self.merged else [])])} of an adapter, and type is none: set "
                    "type to lora or dora, or leave them out"
                )
        if self.targets == ():
            raise ValueError("targets ([]) must name a layer at least: leave it out for all linear layers")
        return self


class DeepspeedConfig(Section):
    """How ZeRO shards the policy."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="what is sharded: 0 nothing (fp32 only; bf16 uses 1), 1 optimizer, 2 + gradients, 3 + weights"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where optimizer states live")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="where ZeRO-3 keeps the weights")
    nvme_path: Place | None = Field(None, description="fast local disk for offload to nvme")
    config: Place | None = Field(None, description="JSON file of further DeepSpeed options, merged and checked")

    @model_validator(mode="after")
    def _offload_is_possible(self) -> "DeepspeedConfig":
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters ({self.offload_parameters}) needs zero_stage 3, not {self.zero_stage}: "
                "lower stages keep whole weights on every device"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer ({self.offload_optimizer}) needs zero_stage 1, 2 or 3, not 0")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(f"offload_optimizer (nvme) needs zero_stage 3, not {self.zero_stage}")
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(self, name) == "nvme" and not self.nvme_path:
                raise ValueError(f"{name} (nvme) needs nvme_path: a folder on a fast local disk")
        return self


def check_model_path(name: str, path: str) -> None:
    """Raises `UserError` for what can only be a folder, and is none: a hub's name has one slash at the most."""
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).exists():
        raise UserError(f"{name} ({path}) does not exist: check the path; relative ones start at {Path.cwd()}")


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's own DeepSpeed options (`deepspeed.config`). Raises `UserError`."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed.config ({path}) does not exist: give a JSON file, or null") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"deepspeed.config ({path}) is not readable as JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"deepspeed.config ({path}) must hold a JSON object of DeepSpeed options")
    return options

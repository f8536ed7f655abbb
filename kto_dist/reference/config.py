"""The `reference` section: the frozen model, where it runs and where its log-probs are kept."""

from typing import Literal

from pydantic import Field, model_validator

from kto_dist.base.config import Place, Positive, Section


class ReferenceConfig(Section):
    """The frozen reference, scored once into a store; attention and kernels follow the policy, all else is its own."""

    path: Place | None = Field(None, description="the reference model; null: the policy's own starting weights")
    gguf_file: str | None = Field(None, description="GGUF file inside `reference.path`")
    trust_remote_code: bool = Field(False, description="as `model.trust_remote_code`, for `reference.path`")
    store: Place = Field("runs/reference", description="folder of the log-prob store, shared by any number of runs")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the reference runs, whatever the policy runs on; auto: a GPU where there is one"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device does it well")
    attention: Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="attention implementation; auto: as `model.attention`"
    )
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto", description="fused kernels of layers; auto: as `model.kernels`"
    )
    quantization: Literal["auto", "none", "nf4", "fp4"] = Field("auto", description="auto: as `model.quantization`")
    zero_stage: Literal["auto", 0, 3] = Field(
        "auto", description="0: a whole copy on every device; 3: sharded over the ranks; auto: 3 when offloaded, else 0"
    )
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="where ZeRO-3 keeps the parameters")
    nvme_path: Place | None = Field(None, description="fast local disk for offload: nvme")
    tokens_per_batch: Positive = Field(8192, description="tokens a device scores at a time")
    packing: Literal["auto"] | bool = Field("auto", description="rows end to end without padding, as `train.packing`")
    share_prefixes: Literal["auto"] | bool = Field(
        "auto", description="score a prompt once for all of its completions; auto: on the CPU, where it saves work"
    )
    logits_mebibytes: Positive | None = Field(
        None, description="most memory that the LM head's logits take at a time; null: 512 on the CPU, 2048 on a GPU"
    )
    logits_dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="as `train.logits_dtype`")

    @model_validator(mode="after")
    def _offload_is_possible(self) -> "ReferenceConfig":
        if self.offload == "nvme" and not self.nvme_path:
            raise ValueError("offload (nvme) needs nvme_path: a folder on a fast local disk")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload ({self.offload}) needs zero_stage 3 or auto: only ZeRO-3 moves parameters away")
        if self.packing is True and self.share_prefixes is True:
            raise ValueError(
                "packing and share_prefixes are both true, and a row holds either pairs end to end or completions of "
                "one prompt: leave one on auto"
            )
        if self.trust_remote_code and not self.path:
            raise ValueError("trust_remote_code is for reference.path, which is not set: set model.trust_remote_code")
        if self.gguf_file and not self.path:
            raise ValueError(f"gguf_file ({self.gguf_file}) needs reference.path, the folder that holds it")
        return self

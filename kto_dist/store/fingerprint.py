"""Which reference a log-prob belongs to: decided by the content of a model, never by its name or place.

The tokenizer, the chat template and the longest row are no part of it, and cannot be: a pair's key is a hash of its
token ids. Another tokenizer or template gives other token ids, hence other keys, and what is not found is scored; where
they give the same token ids after all, the log-prob is the same as well.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.store.hashes import HASHING, Hashing, file_digests


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What decides the reference's log-probs: never a path, never parameters in memory."""

    weights: str
    """sha256 over the names, types, shapes and bytes of the tensors, however they are spread over files"""
    config: str
    """sha256 of the model's configuration"""
    dtype: str
    logits: str
    """Precision of the logits, which depends on the device."""
    attention: str
    kernels: str | None = None
    """Fused kernels of layers, whose rounding differs."""
    quantisation: str | None = None
    """How the weights are kept in memory, where it is not as in their files."""
    scoring: int | None = None
    """How often a fault was mended in how such a model is scored."""
    adapter: str | None = None
    """sha256 of the adapter that the model has, where it has one."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, str | int]:
        """What is None is absent: a store from before a field existed keeps its name."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


# By family, how often a fault in how it is scored was mended: what was stored before is then scored again.
SCORING: dict[str, int] = {
    # its routers' threshold (`router_jitter_noise`) was set to 0
    "phimoe": 1,
    # hidden states were halved on the way where there are many layers
    "rwkv": 1,
}

# Families that keep parameters in fp32: in bf16 they were kept so, and the policy's are rounded.
_KEPT_IN_FP32 = {
    *("bailing_hybrid", "beam", "deepseek_v4", "ernie4_5_moe", "flint", "hy_v4", "inkling_text", "inkling2_text"),
}

# Families whose completions of one prompt saw each other in bf16, by less than what counted as rounding.
_SHARED_STATE = {
    *("bailing_hybrid", "bamba", "blt", "falcon_h1", "llama4", "llama4_text", "minimax", "olmo_hybrid", "qwen4_exp"),
    *("qwen4_exp_text", "recurrent_gemma", "zamba", "zamba2"),
}


def scoring(model_config: dict[str, Any], dtype: str) -> int | None:
    """How often a fault was mended in how such a model is scored; None for never."""
    family = str(model_config.get("model_type"))
    faults = SCORING.get(family, 0)
    faults += dtype == "bfloat16" and family in _SHARED_STATE
    faults += dtype == "bfloat16" and family in _KEPT_IN_FP32
    # Rows were turned by the frequencies of the longest one of their micro-batch. Which rows a store has had beside
    # each other is not known: short ones are scored again as well.
    faults += '"longrope"' in json.dumps(model_config, default=str)
    return int(faults) or None


# What names a file or a tool, not the function that the model computes.
_IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def fingerprint(
    folder: Path,
    gguf_file: str | None,
    model_config: dict[str, Any],
    *,
    dtype: str,
    logits: str,
    attention: str,
    kernels: str | None = None,
    quantisation: str | None = None,
    adapter: Path | None = None,
    hashing: Hashing = HASHING,
) -> Fingerprint:
    """Hashes the weight files of a model folder, or remembers their hashes.

    Raises `UserError` where there are none, or they cannot be read.
    """
    # a GGUF file says itself how it is packed; its config only tells how to unpack it
    dropped = _IRRELEVANT | ({"quantization_config"} if gguf_file else set())
    kept = {key: value for key, value in model_config.items() if key not in dropped}
    return Fingerprint(
        weights=weights_digest(folder, gguf_file, hashing),
        config=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
        dtype=dtype,
        logits=logits,
        attention=attention,
        kernels=kernels,
        quantisation=quantisation,
        scoring=scoring(model_config, dtype),
        adapter=None if adapter is None else adapter_digest(adapter, hashing),
    )


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What decides how an adapter's tensors are used; their names say where.
_OF_ADAPTER = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


def adapter_digest(folder: Path, hashing: Hashing = HASHING) -> str:
    """sha256 over an adapter's tensors and how they are used; remembered. Raises `UserError`."""
    parts = [f"{label} {digest}" for label, digest in file_digests([folder / ADAPTER_WEIGHTS], hashing)[0].items()]
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        used = json.dumps({name: config.get(name) for name in _OF_ADAPTER}, sort_keys=True)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from None
    return hashlib.sha256("\n".join([used, *sorted(parts)]).encode()).hexdigest()


def weights_digest(folder: Path, gguf_file: str | None, hashing: Hashing = HASHING) -> str:
    """sha256 over a model's tensors, however they are spread over files; remembered. Raises `UserError`."""
    files = [folder / gguf_file] if gguf_file else weight_files(folder)
    parts = [f"{label} {digest}" for digests in file_digests(files, hashing) for label, digest in digests.items()]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads, in its order of preference; other weights may lie beside them."""
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"the model's folder ({folder}) holds an adapter, whose base model lies elsewhere: merge the two "
            "(`kto-dist merge`) and give the result's folder; or give the base model, and the adapter in adapter.start"
        )
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).exists():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.exists():
            try:
                return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is no index of weight files: fetch or export the model again") from None
    raise UserError(
        f"the model's folder ({folder}) holds no weights: it needs model.safetensors, "
        "pytorch_model.bin, or the index of several such files"
    )

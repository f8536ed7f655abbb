"""Tiny mixtures of experts with random weights, for tests of routers and of adapters on experts."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 12},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def mixture(kind: str, **more: Any) -> PreTrainedModel:
    """A tiny one whose routers are far from even."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 258,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(kind, **{**settings, **MIXTURES[kind], **more})
    # the other ways of experts know no fp64
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def save_mixture(folder: Path, kind: str, **more: Any) -> Path:
    """A model folder as `from_pretrained` wants it."""
    mixture(kind, **more).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

"""Families with quirks of their own, trained as tiny random models: an idle rank changes nothing, and they export."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_tokenizer
from tiny_runs import metrics_of, tiny_config, train_all
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}
# name -> model type, settings, dtype, ZeRO stage
RUNS = {
    # a parameter acts from token to token
    "rwkv": ("rwkv", {}, "fp32", 2),
    # its residual stream, and so its last norm, is fp32
    "mamba": ("mamba", {"state_size": 8}, "bf16", 2),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}, "bf16", 1),
    # the name of its decoder is that of its multimodal kin
    "llama4": ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}, "fp32", 3),
    # routers have a threshold that reads as noise
    "phimoe": ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.3}, "fp32", 2),
    # routers in fp32
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS, "bf16", 3),
}


def saved(folder: Path, kind: str, settings: dict) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **settings})).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_family_trains_and_exports_as_it_is_and_an_idle_rank_changes_nothing(tmp_path, tiny_log, name):
    kind, settings, dtype, stage = RUNS[name]
    model = saved(tmp_path / "model", kind, settings)
    found = {}
    for ranks in (1, 2):
        config = tiny_config(
            tmp_path / str(ranks),
            model,
            tiny_log,
            objective__loss="apo_zero_unpaired",
            train__global_batch=1,
            data__max_length=32,
            train__max_steps=2,
            train__dtype=dtype,
            reference__dtype=dtype,
            deepspeed__zero_stage=stage,
        )
        summary = run_ranks(train_all, ranks, [config])[0][0]
        found[ranks] = metrics_of(config)
        exported = AutoModelForCausalLM.from_pretrained(summary["export"])
        assert exported.config.model_type == kind
    rounding = 1e-4 if dtype == "fp32" else 2e-2
    assert found[1][0]["loss"] == pytest.approx(0.5, abs=1e-4 if dtype == "fp32" else 0.02)
    for one, two in zip(found[1], found[2], strict=True):
        for figure in ("loss", "grad_norm"):
            assert two[figure] == pytest.approx(one[figure], rel=rounding), (one["step"], figure)

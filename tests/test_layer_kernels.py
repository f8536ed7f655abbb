"""Liger's layers are put into one model, leave every other as it was, and are part of the reference's fingerprint.

What the layers compute needs a GPU: `benchmarks/device_tests.py` runs what is marked for one.
"""

import gc

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from kto_dist.base.errors import UserError
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.model.kernels import fuse, pick_kernels
from kto_dist.model.loading import load_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA = AutoConfig.for_model("llama")
ROTATION = modeling_llama.apply_rotary_pos_emb


def kinds(lm):
    """What the layers call themselves, without those that no kernel is for."""
    return {module._get_name() for module in lm.modules()} - {"Linear", "Embedding", "ModuleList", "SiLUActivation"}


def test_norms_mlps_and_rotation_are_ligers_and_the_head_is_ours():
    lm = tiny_llama()
    before = kinds(lm)
    fuse(lm)
    assert kinds(lm) - before == {"LigerRMSNorm", "LigerSwiGLUMLP"}
    assert before - kinds(lm) == {"LlamaRMSNorm", "LlamaMLP"}
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert "forward" not in vars(lm) and type(lm).forward.__module__ == modeling_llama.__name__
    assert ScoringModel(lm).lm.get_output_embeddings()._get_name() == "Linear"


def test_other_models_keep_their_own_layers_and_the_rotation_comes_back_with_the_last_fused_one():
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = tiny_llama()(input_ids=ids).logits
    first, second = tiny_llama(), tiny_llama()
    fuse(first)
    assert not any(kind.startswith("Liger") for kind in kinds(tiny_llama()))
    fuse(second)
    del first
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is not ROTATION
    del second
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is ROTATION
    with torch.no_grad():
        assert torch.equal(tiny_llama()(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(("kernels", "fused"), [("liger", True), ("none", False)])
def test_a_model_is_loaded_with_the_kernels_that_were_picked(tiny_model, kernels, fused):
    lm = load_model(str(tiny_model), gguf_file=None, dtype=torch.float32, attention="varlen", kernels=kernels)
    assert any(kind.startswith("Liger") for kind in kinds(lm)) is fused


@pytest.mark.parametrize(
    ("kind", "device", "like", "picked"),
    [
        ("llama", GPU, "auto", "liger"),
        ("llama", GPU, "none", "none"),
        ("llama", CPU, "auto", "none"),
        ("opt", GPU, "auto", "none"),
        ("opt", GPU, "liger", "none"),
    ],
)
def test_auto_takes_kernels_on_a_gpu_where_the_family_is_known_and_the_policy_has_them(kind, device, like, picked):
    assert pick_kernels("reference.kernels", "auto", AutoConfig.for_model(kind), device, like=like) == picked


def test_kernels_that_cannot_be_had_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(UserError, match=r"model.kernels \(liger\) cannot be had: they run on GPUs, not on cpu"):
        pick_kernels("model.kernels", "liger", LLAMA, CPU)
    with pytest.raises(UserError, match="Liger knows no layers of opt; use auto or none"):
        pick_kernels("model.kernels", "liger", AutoConfig.for_model("opt"), GPU)
    monkeypatch.setattr("kto_dist.model.kernels.find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed"):
        pick_kernels("model.kernels", "liger", LLAMA, GPU)
    assert pick_kernels("model.kernels", "auto", LLAMA, GPU) == "none"


@pytest.mark.gpu
def test_fused_layers_give_what_plain_layers_give():
    ids = torch.arange(3, 60, device=GPU)[None]
    plain, fused = tiny_llama().to(GPU), tiny_llama().to(GPU)
    wanted = plain(input_ids=ids).logits
    wanted.square().sum().backward()
    fuse(fused)
    found = fused(input_ids=ids).logits
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-3 * other.grad.norm(), name

"""Completion log-probs are those of the model's own logits: for every family, packed or padded, without dropout."""

import numpy as np
import pytest
import torch
from families import COMMON, FAMILIES, GPT, HEADS, VOCABULARY, from_own_logits, scored, sequences, tiny
from tiny import save_tiny, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.data.batch import collate
from kto_dist.model import causal_lm
from kto_dist.model.causal_lm import (
    ScoringModel,
    completion_logps,
    logit_transform,
    pick_dtype,
    score,
)
from kto_dist.model.loading import check_context, load_config, load_model, load_tokenizer, set_modes, without_noise

CPU = torch.device("cpu")


def same(found, wanted):
    # a log-prob of some -60 nats in fp32: 2e-5 is five of its ulps
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(name, packed):
    lm = tiny(FAMILIES[name])
    wanted = from_own_logits(lm, sequences())
    same(scored(ScoringModel(lm), sequences(), packed), wanted)


@pytest.mark.parametrize("name", HEADS)
def test_whatever_a_family_does_to_its_logits_is_in_the_transform(name):
    lm = tiny(HEADS[name])
    wanted = from_own_logits(lm, sequences())
    same(scored(ScoringModel(lm), sequences(), False), wanted)


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("llama", {}, (1.0, None)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("gemma2", {"final_logit_softcapping": None}, (1.0, None)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("falcon_h1", {"lm_head_multiplier": 0.04}, (0.04, None)),
    ],
)
def test_the_transform_is_read_from_the_config(kind, settings, wanted):
    transform = logit_transform(AutoConfig.for_model(kind, **settings))
    assert (transform.scale, transform.softcap, transform.temperature) == (*wanted, 1.0)


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("name", ("llama", "llama_tied", "gpt2"))
def test_gradients_are_those_of_the_models_own_logits(name, packed):
    lm = tiny(FAMILIES[name]).double()
    for prompt, completion in sequences():
        logits = lm(input_ids=torch.tensor(np.concatenate([prompt, completion]))[None], use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logps.gather(-1, torch.tensor(completion)[:, None]).sum().backward()
    wanted = {parameter: value.grad.clone() for parameter, value in lm.named_parameters()}
    lm.zero_grad()
    model = ScoringModel(lm)
    batch = collate(sequences(), np.arange(4), packed=packed)
    completion_logps(model, batch, model.transform, 7 * VOCABULARY * 8).sum().backward()
    for parameter, value in lm.named_parameters():
        # norms and rotations are fp32 in some families even where the weights are fp64
        assert (value.grad - wanted[parameter]).norm() <= 1e-6 * wanted[parameter].norm() + 1e-12, parameter


def test_only_completion_rows_reach_the_head():
    model = ScoringModel(tiny(FAMILIES["llama"]))
    batch = collate(sequences(), np.arange(4), packed=False)
    rows = score(model, batch, lambda hidden, weight, bias: hidden.shape[0])
    assert rows == sum(len(completion) for _, completion in sequences())


def test_where_widths_are_rounded_up_padded_rows_score_the_same(monkeypatch):
    model, widths = ScoringModel(tiny(FAMILIES["llama"])), []
    model.lm.get_input_embeddings().register_forward_pre_hook(lambda layer, inputs: widths.append(inputs[0].shape[1]))
    expected = scored(model, sequences(), packed=False)
    monkeypatch.setitem(causal_lm.ROUND_WIDTH, "cpu", 64)
    torch.testing.assert_close(scored(model, sequences(), packed=False), expected)
    assert widths == [12, 64]


def test_an_empty_micro_batch_runs_the_model_and_has_no_log_probs():
    model = ScoringModel(tiny(FAMILIES["llama"]))
    model.lm.train()
    batch = collate([], np.zeros(0, np.int64), packed=True)
    logps = completion_logps(model, batch, model.transform, 1000)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert all(not p.grad.any() for p in model.parameters())  # every parameter has a gradient, and it is zero


def test_without_a_head_the_model_gives_its_own_logits():
    lm = tiny(FAMILIES["cohere_scale"])
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        wanted = lm(input_ids=ids).logits
        batch = collate([(np.arange(3, 6), np.arange(6, 9))], np.zeros(1), packed=False)
        found = score(ScoringModel(lm), batch, None)
    torch.testing.assert_close(found, wanted)


def test_a_scored_model_still_generates():
    lm = tiny(FAMILIES["llama"])
    ids = torch.arange(3, 9)[None]
    wanted = lm.generate(ids, max_new_tokens=4, do_sample=False)
    assert ScoringModel(lm).lm.generate(ids, max_new_tokens=4, do_sample=False).tolist() == wanted.tolist()


def test_a_model_without_a_linear_head_is_refused():
    lm = tiny(FAMILIES["llama"])
    lm.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(UserError, match="LlamaForCausalLM has no linear LM head"):
        ScoringModel(lm)


def adapted(*targets):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny(FAMILIES["llama"]), LoraConfig(r=2, target_modules=list(targets))).base_model.model


def test_an_adapter_on_the_head_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"LM head is adapted.*one weight.*leave lm_head out of.*target_modules"):
        ScoringModel(adapted("q_proj", "lm_head"))


def test_an_adapter_below_a_frozen_head_gets_its_gradient():
    lm = adapted("q_proj")
    model = ScoringModel(lm)
    batch = collate([(np.arange(3, 9), np.arange(2, 7))], np.zeros(1), packed=False)
    completion_logps(model, batch, model.transform, 1000).sum().backward()
    assert lm.lm_head.weight.grad is None
    assert all(p.grad is not None for name, p in lm.named_parameters() if "lora_B" in name)


# What families do in training mode alone, beside dropout: they add noise, draw experts, or leave weights undivided.
NOISY = {
    "gpt2": ("gpt2", {**GPT, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "llama": ("llama", {"attention_dropout": 0.5}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5}),
    "opt_layerdrop": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5, "dropout": 0.0}),
    "mixtral_jitter": ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.3}),
    "phimoe_router": ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
    "dbrx_parts": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "resid_pdrop": 0.5,
            "attn_config": {"attn_pdrop": 0.5, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3},
        },
    ),
    "rwkv_rescaled": ("rwkv", {"num_hidden_layers": 4, "rescale_every": 2}),
}


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", NOISY)
def test_the_policys_function_is_that_of_the_untouched_model_in_evaluation(tmp_path, name, checkpointing):
    kind, settings = NOISY[name]
    config = AutoConfig.for_model(kind, **{**COMMON, **settings})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        wanted = untouched(input_ids=ids, use_cache=False).logits
    lm = load_model(str(tmp_path), gguf_file=None, dtype=torch.float32, attention="eager")
    before = {parameter: value.detach().clone() for parameter, value in lm.named_parameters()}
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    set_modes(lm)
    for _ in range(3):
        found = lm(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 if kind == "rwkv" else 1e-6)
    found.square().sum().backward()
    silent = {parameter for parameter, value in lm.named_parameters() if value.grad is None or not value.grad.any()}
    assert not {parameter for parameter in silent if "router" in parameter or "gate" in parameter}, silent
    assert all(torch.equal(value, before[parameter]) for parameter, value in lm.named_parameters())


def test_dropouts_go_in_every_part_of_a_config_and_other_numbers_stay():
    config = AutoConfig.for_model("gemma3", text_config={**COMMON, "attention_dropout": 0.5})
    without_noise(config)
    assert config.text_config.attention_dropout == 0.0 and config.vision_config.attention_dropout == 0.0
    config = AutoConfig.for_model("phimoe", **COMMON, attention_dropout=0.5, router_jitter_noise=0.3)
    without_noise(config)
    assert (config.attention_dropout, config.router_jitter_noise) == (0.0, 0.3)


def test_loading_leaves_the_given_config_as_it_was(tmp_path):
    save_tiny(tmp_path, attention_dropout=0.5)
    config = load_config(str(tmp_path))
    load_model(str(tmp_path), gguf_file=None, dtype=torch.float32, attention="sdpa", config=config)
    assert config.attention_dropout == 0.5  # the export writes it


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(tiny_model, dtype):
    lm = load_model(str(tiny_model), gguf_file=None, dtype=dtype, attention="sdpa")
    assert {parameter.dtype for parameter in lm.parameters()} == {dtype}


@pytest.mark.parametrize("name", ("model.path", "reference.path"))
def test_a_folder_that_does_not_exist_is_named_with_its_setting(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} .*nowhere.* does not exist: check the path"):
        load_config(str(tmp_path / "nowhere"), name=name)


@pytest.mark.parametrize("name", ("model.path", "reference.path"))
def test_a_folder_without_a_model_is_named_with_its_setting(tmp_path, name):
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match=f"{name} .*nowhere.* holds no Hugging Face model.*config.json"):
        load_config(str(tmp_path / "nowhere"), name=name)


def test_a_broken_model_config_is_named_with_its_setting(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model.path .* holds no Hugging Face model"):
        load_config(str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not load with attention sdpa"):
        load_model(str(tmp_path), gguf_file=None, dtype=torch.float32, attention="sdpa")


def test_an_attention_that_the_family_lacks_is_named(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **COMMON)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not load with attention sdpa"):
        load_model(str(tmp_path), gguf_file=None, dtype=torch.float32, attention="sdpa")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"(?s)model.path .* no tokenizer that loads.*save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused(tiny_model, tmp_path):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token.*set tokenizer.eos_token"):
        load_tokenizer(str(tmp_path))


def test_rows_longer_than_the_context_are_refused_with_both_numbers():
    config = tiny_llama().config
    check_context(config, 256)
    with pytest.raises(UserError, match=r"data.max_length \(257\).*context of 256 tokens"):
        check_context(config, 257)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_named_dtype_is_taken_as_it_is(name, dtype):
    assert pick_dtype(name, CPU) == dtype


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_is_bf16_only_where_the_device_is_fast_at_it(monkeypatch, fast, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": fast}, raising=False)
    assert pick_dtype("auto", CPU) == dtype

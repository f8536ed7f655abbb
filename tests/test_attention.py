"""Sequences that lie end to end are scored as if each were alone, and the table says where that cannot be."""

import numpy as np
import pytest
import torch
from families import FAMILIES, UNPACKABLE, from_own_logits, scored, sequences, tiny
from transformers import AttentionInterface, AutoConfig

from kto_dist.base.errors import UserError
from kto_dist.data.batch import collate
from kto_dist.model.attention import ATTENTIONS, largest, pick_attention, pick_packing, refuse_sinks
from kto_dist.model.causal_lm import ScoringModel, completion_logps, score

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VARLEN = [name for name, family in FAMILIES.items() if family[2] == "sdpa"]


def config_of(family):
    return AutoConfig.for_model(family[0], **family[1])


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("name", VARLEN)
def test_log_probs_through_varlen_are_those_of_each_sequence_alone(name, packed):
    wanted = from_own_logits(tiny(FAMILIES[name]), sequences())
    found = scored(ScoringModel(tiny(FAMILIES[name], "varlen")), sequences(), packed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", ("llama", "qwen3", "mistral_window", "gemma3_window"))
def test_states_and_gradients_through_varlen_are_those_of_each_sequence_alone(name, checkpointing):
    pairs = sequences()
    alone = tiny(FAMILIES[name]).train()
    wanted = torch.cat([_states(alone, [pair]) for pair in pairs])
    lm = tiny(FAMILIES[name], "varlen").train()
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    found = _states(lm, pairs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)
    for states in (wanted, found):
        states.square().sum().backward()
    for (parameter, value), other in zip(lm.named_parameters(), alone.parameters(), strict=True):
        if other.grad is not None:
            assert (value.grad - other.grad).norm() <= 2e-5 * other.grad.norm() + 1e-7, parameter


def _states(lm, pairs, device=CPU):
    """(N, H) hidden states of the completion rows."""
    batch = collate(pairs, np.arange(len(pairs)), packed=True).to(device)
    return score(ScoringModel(lm), batch, lambda hidden, weight, bias: hidden)


@pytest.mark.parametrize("window", (None, 5, 600))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_long_and_short_slices_give_what_attention_is_defined_as(dtype, window):
    draw = torch.Generator().manual_seed(0)
    lengths = (1, 40, 513, 7)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
    found, _ = AttentionInterface()["varlen"](
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=max(lengths), sliding_window=window
    )
    place = torch.arange(total)
    of = torch.bucketize(place, bounds[1:].long(), right=True)
    ago = place[:, None] - place[None, :]
    seen = (of[:, None] == of[None, :]) & (ago >= 0) & (ago < (window or total))
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    wanted = (weights @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_a_family_that_cannot_pack_gets_neither_varlen_nor_packing_by_itself(name):
    config = config_of(UNPACKABLE[name])
    with pytest.raises(UserError, match=r"model.attention \(varlen\) cannot be had: .*; use auto, or .*eager"):
        pick_attention("model.attention", "varlen", config, CPU, torch.float32)
    attention = pick_attention("model.attention", "auto", config, CPU, torch.float32)
    assert not ATTENTIONS[attention].variable_length
    assert pick_packing("train.packing", "auto", attention, config, 64) is False


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "caps attention scores .attn_logit_softcapping 50"),
        ("gpt_oss", {}, "hands its attention to no other function"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention is not causal"),
        ("opt", {}, "opt counts positions along the row"),
        ("trocr", {}, "trocr counts positions along the row"),
        ("nemotron", {}, "nemotron hands no keyword arguments"),
        ("phimoe", {"sliding_window": 4}, "phimoe tells its window to a mask alone"),
        ("bloom", {}, "hands its attention"),
        ("mamba", {}, "mamba carries a state along the row"),
        ("falcon_h1", {}, "falcon_h1 carries a state along the row"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "layers .conv. that run on"),
    ],
)
def test_varlen_is_refused_with_the_reason(kind, settings, reason):
    config = AutoConfig.for_model(kind, **settings)
    with pytest.raises(UserError, match=rf"reference.attention \(varlen\) cannot be had: .*{reason}"):
        pick_attention("reference.attention", "varlen", config, CPU, torch.float32)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "varlen"), ("gemma2", "eager"), ("opt", "sdpa"), ("bloom", "eager"), ("mamba", "eager")],
)
def test_auto_is_the_best_that_the_family_has_on_the_cpu(kind, attention):
    config = AutoConfig.for_model(kind)
    assert pick_attention("model.attention", "auto", config, CPU, torch.bfloat16) == attention


def test_the_reference_follows_the_policy_where_it_can():
    llama, bloom = AutoConfig.for_model("llama"), AutoConfig.for_model("bloom")
    assert pick_attention("reference.attention", "auto", llama, CPU, torch.float32, like="eager") == "eager"
    assert pick_attention("reference.attention", "sdpa", llama, CPU, torch.float32, like="eager") == "sdpa"
    assert pick_attention("reference.attention", "auto", bloom, CPU, torch.float32, like="sdpa") == "eager"
    assert (
        pick_attention("reference.attention", "auto", llama, CPU, torch.float32, like="flash_attention_2") == "varlen"
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "flash", "attention"),
    [
        ((9, 0), torch.bfloat16, 64, False, "varlen"),
        ((9, 0), torch.float32, 64, True, "sdpa"),
        ((7, 5), torch.float16, 64, True, "sdpa"),
        ((9, 0), torch.bfloat16, 512, True, "sdpa"),
    ],
)
def test_auto_on_a_gpu_goes_by_dtype_capability_and_heads(monkeypatch, capability, dtype, head, flash, attention):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: flash)
    config = AutoConfig.for_model("llama", head_dim=head)
    assert pick_attention("model.attention", "auto", config, GPU, dtype) == attention


@pytest.mark.parametrize("kind", ("gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash"))
def test_sinks_are_never_left_to_a_flash_attention_that_does_not_know_them(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: True)
    config = AutoConfig.for_model(kind)
    assert pick_attention("model.attention", "auto", config, GPU, torch.bfloat16) == "eager"
    with pytest.raises(
        UserError, match=rf"{kind} in transformers takes .*, as attention with sinks does; use .* eager"
    ):
        pick_attention("model.attention", "flash_attention_2", config, GPU, torch.bfloat16)
    mistral = AutoConfig.for_model("mistral", sliding_window=None)
    assert pick_attention("model.attention", "flash_attention_2", mistral, GPU, torch.bfloat16) == "flash_attention_2"


@pytest.mark.parametrize("name", ("sinks", "attention_sink_bias"))
def test_sinks_that_no_config_tells_of_are_refused_when_the_model_is_there(name):
    lm = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
    for attention in ATTENTIONS:
        refuse_sinks(lm, attention, "m")
    lm["layer"].register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    refuse_sinks(lm, "eager", "m")
    for attention in ("varlen", "flash_attention_2", "sdpa"):
        with pytest.raises(UserError, match=rf"of m has sinks .layer.{name}., which {attention} would leave out"):
            refuse_sinks(lm, attention, "m")


def test_flash_attention_2_is_named_with_what_is_missing(monkeypatch):
    llama = AutoConfig.for_model("llama")
    with pytest.raises(UserError, match="runs on GPUs, not on cpu; use auto, or varlen or sdpa or eager"):
        pick_attention("model.attention", "flash_attention_2", llama, CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(UserError, match="flash-attn is not installed"):
        pick_attention("model.attention", "flash_attention_2", llama, GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "attention", "packed"),
    [
        ("auto", "varlen", True),
        ("auto", "flash_attention_2", True),
        ("auto", "sdpa", False),
        ("auto", "eager", False),
        (True, "sdpa", True),
        (False, "varlen", False),
    ],
)
def test_packing_is_automatic_only_where_it_costs_nothing(value, attention, packed):
    assert pick_packing("train.packing", value, attention, AutoConfig.for_model("llama"), 64) is packed


def test_packing_that_a_family_cannot_is_refused_with_the_setting():
    with pytest.raises(UserError, match="reference.packing=false"):
        pick_packing("reference.packing", True, "sdpa", AutoConfig.for_model("opt"), 64)


def test_a_forward_without_bounds_is_an_error_and_not_a_wrong_result():
    lm = tiny(FAMILIES["llama"], "varlen")
    with pytest.raises(UserError, match=r"no bounds of sequences .*set_attn_implementation\('sdpa'\)"):
        lm(input_ids=torch.arange(3, 9)[None])


@pytest.mark.parametrize(
    "asked", ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"is_causal": False})
)
def test_what_varlen_does_not_know_is_an_error_when_a_layer_asks_for_it(asked):
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UserError, match=f"asks its attention for {next(iter(asked))}"):
        AttentionInterface()["varlen"](
            torch.nn.Module(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3, **asked
        )


def test_an_empty_micro_batch_passes_through_varlen():
    model = ScoringModel(tiny(FAMILIES["llama"], "varlen"))
    batch = collate([], np.zeros(0, np.int64), packed=True)
    assert completion_logps(model, batch, model.transform, 1000).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", ("llama", "qwen3", "mistral_window", "gemma3_window"))
def test_varlen_on_a_gpu_is_no_further_from_the_truth_than_sdpa(name, checkpointing):
    """Hidden states and gradients in bf16 against fp32, each sequence alone."""
    pairs, truth = sequences(), tiny(FAMILIES[name]).to(GPU).train()
    wanted = torch.cat([_states(truth, [pair], GPU) for pair in pairs])
    wanted.square().sum().backward()
    errors = {}
    for attention in ("varlen", "sdpa"):
        lm = tiny(FAMILIES[name], attention).to(GPU, torch.bfloat16).train()
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        found = _states(lm, pairs, GPU)
        found.float().square().sum().backward()
        off = [(found - wanted).norm() / wanted.norm()]
        off += [
            (value.grad - other.grad).norm() / other.grad.norm()
            for value, other in zip(lm.parameters(), truth.parameters(), strict=True)
            if other.grad is not None
        ]
        errors[attention] = torch.stack(off)
    assert (errors["varlen"] <= 2 * errors["sdpa"] + 1e-3).all(), errors


@pytest.mark.gpu
@pytest.mark.parametrize("window", (None, 5))
def test_a_packed_row_on_a_gpu_gives_what_each_padded_row_gives(window):
    draw = torch.Generator().manual_seed(0)
    lengths = (1, 40, 513, 7)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64, generator=draw).bfloat16() for heads in (4, 2, 2))
    ask = {"max_length_q": max(lengths), "sliding_window": window}
    attend, module = AttentionInterface()["varlen"], torch.nn.Module()
    wanted, _ = attend(module, q.float(), k.float(), v.float(), None, cu_seq_lens_q=bounds, **ask)
    found, _ = attend(module, q.to(GPU), k.to(GPU), v.to(GPU), None, cu_seq_lens_q=bounds.to(GPU), **ask)
    assert (found.float().cpu() - wanted).norm() <= 0.01 * wanted.norm()


def test_of_a_field_that_layers_have_their_own_of_the_largest_counts():
    from transformers import Gemma4TextConfig

    layers = {"per_layer_config": {0: {"head_dim": 8}, 1: {"head_dim": 32}}}
    config = Gemma4TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], **layers)
    with pytest.raises(RuntimeError):
        _ = config.head_dim
    assert largest(config, "head_dim") == 32
    assert largest(AutoConfig.for_model("llama", head_dim=16), "head_dim") == 16

"""An adapter in a model: a fresh one changes nothing, one from a folder is what peft makes of it, merged or not."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.model.adapter_files import named_in_files
from kto_dist.model.adapters import Adapter, from_folder, merge_in, pick_adapter, put_in, rehearse
from kto_dist.model.config import AdapterConfig
from kto_dist.model.lora_layers import quicken_adapter
from kto_dist.store.fingerprint import adapter_digest
from kto_dist.training.config import ADAPTER_LR, Config, TrainConfig

IDS = torch.arange(2, 34).view(2, 16)


def adapter(seed: int = 0, **settings: object) -> Adapter:
    found = pick_adapter(AdapterConfig(**{"type": "lora", "rank": 4, **settings}), base="base", seed=seed)
    assert found is not None
    return found


def logits(lm: LlamaForCausalLM) -> torch.Tensor:
    return lm.eval()(IDS).logits


def saved_by_peft(folder: Path, **settings: object) -> Path:
    """An adapter with values of its own, as peft writes it for the tiny model."""
    torch.manual_seed(3)
    model = get_peft_model(
        tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_a_fresh_adapter_changes_no_bit_of_the_logits(kind, dtype):
    lm = tiny_llama().to(dtype)
    before = logits(lm)
    put_in(lm, adapter(type=kind))
    assert torch.equal(logits(lm), before)
    assert {p.dtype for p in lm.parameters()} == {dtype}


def test_a_fresh_adapters_values_are_a_function_of_the_seed_alone():
    def values(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed + torch.randint(99, ()).item())
        lm = tiny_llama(seed)
        put_in(lm, adapter(seed=7 if seed < 2 else 8))
        return {name: p.detach() for name, p in lm.named_parameters() if ".lora_A." in name}

    once, again, other = values(0), values(1), values(2)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not any(torch.equal(once[name], other[name]) for name in once)
    # and layers differ from each other
    assert len({float(value.flatten()[0]) for value in once.values()}) == len(once) == 14


def test_the_adapter_alone_has_gradients_and_the_head_none():
    lm = tiny_llama()
    put_in(lm, adapter(type="dora"))
    logits(lm).square().mean().backward()
    own = {name for name, p in lm.named_parameters() if p.grad is not None}
    assert own == {name for name, p in lm.named_parameters() if p.requires_grad}
    assert own and all(".lora_" in name for name in own) and not any("lm_head" in name for name in own)


def test_a_layer_as_one_node_of_autograd_has_pefts_values_and_gradients(tmp_path):
    folder, found = saved_by_peft(tmp_path / "adapter"), []
    for quick in (False, True):
        lm = tiny_llama().double()
        put_in(lm, from_folder("the adapter", folder))
        if quick:
            quicken_adapter(lm)
        loss = logits(lm).square().mean()
        loss.backward()
        found.append({"loss": loss, **{name: p.grad for name, p in lm.named_parameters() if p.grad is not None}})
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("settings", ({}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}))
def test_an_adapter_from_a_folder_is_what_peft_makes_of_it(tmp_path, settings):
    folder = saved_by_peft(tmp_path / "adapter", lora_dropout=0.5, **settings)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(folder))
    expected = theirs.eval()(IDS).logits
    lm = tiny_llama()
    plain = logits(lm)
    put_in(lm, from_folder("adapter.start", folder))
    assert torch.equal(lm.train()(IDS).logits, expected)  # without its dropout
    assert not torch.allclose(expected, plain, atol=1e-2)
    # the names that peft gives its tensors are those that we give them
    named = {named_in_files(name, "default") for name, p in lm.named_parameters() if p.requires_grad}
    assert named == get_peft_model_state_dict(theirs, save_embedding_layers=False).keys()


@pytest.mark.parametrize("settings", ({}, {"use_dora": True}))
def test_merged_into_the_weights_it_computes_the_same(tmp_path, settings):
    folder = saved_by_peft(tmp_path / "adapter", **settings)
    with_it, merged = tiny_llama(), tiny_llama()
    put_in(with_it, from_folder("the adapter", folder))
    merge_in(merged, from_folder("the adapter", folder))
    torch.testing.assert_close(logits(merged), logits(with_it), rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
    rounded = tiny_llama().to(torch.bfloat16)
    merge_in(rounded, from_folder("the adapter", folder))
    exact = merged.model.layers[0].mlp.up_proj.weight
    # added up in fp32 and rounded once, of a base that was rounded before
    assert (rounded.model.layers[0].mlp.up_proj.weight - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "lm_head"]}, r"adapter.targets \(lm_head\) is the LM head, which stays.*leave it out"),
        ({"targets": ["embed_tokens"]}, r"adapter.targets \(embed_tokens\) is an embedding"),
        (
            {"targets": ["query"]},
            r"adapter.targets \(query\) is the name of no layer of LlamaForCausalLM: it has down_",
        ),
        ({"targets": ["norm"]}, r"LlamaForCausalLM cannot be adapted: .*Norm"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_before_weights_are_read(settings, message):
    with pytest.raises(UserError, match=message):
        rehearse(tiny_llama().config, adapter(**settings))


def test_what_is_trained_is_told():
    lm = tiny_llama()
    told = rehearse(lm.config, adapter(targets=["q_proj", "up_proj"]))
    assert told.trained == 2 * 4 * (48 + 48 + 48 + 96) and told.total == sum(p.numel() for p in lm.parameters())
    (line,) = told.lines(adapter(targets=["q_proj", "up_proj"]))
    assert line.startswith("adapter: lora of rank 4, alpha 8, on 4 layers (q_proj, up_proj): 1,920 weights are trained")


def _mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=258, **sizes, **heads))


def test_experts_stay_as_they_are_and_that_is_told_or_are_adapted_by_name():
    lm = _mixtral()
    told = rehearse(lm.config, adapter())
    assert len(told.experts) == 2 and not any("experts" in name for name in told.modules)
    assert "2 parameters of experts (model.layers.N.mlp.experts.down_proj, model.layers." in told.lines(adapter())[1]
    named = adapter(targets=["all-linear", "experts.gate_up_proj", "experts.down_proj"])
    told = rehearse(lm.config, named)
    assert not told.experts and len(told.lines(named)) == 1
    before = logits(lm)
    put_in(lm, named)
    assert torch.equal(logits(lm), before)
    logits(lm).square().mean().backward()
    assert {
        name.partition(".lora_")[0].rpartition("layers.0.")[2]
        for name, p in lm.named_parameters()
        if p.grad is not None
    } == {
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        "mlp.experts",
        "mlp.experts.base_layer",
    }


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, r"has modules_to_save \(\['lm_head'\]\): it saves whole layers"),
        ({"bias": "all"}, {}, r"has bias \(all\)"),
        ({"use_dora": True}, {}, r"is a dora adapter and adapter.type is lora: set dora"),
        ({}, {"rank": 8}, r"adapter.rank \(8\) is not that of adapter.start \(.*\), 4: leave it out"),
        ({}, {"targets": ["q_proj"]}, r"adapter.targets .* is not that of adapter.start"),
        ({"init_lora_weights": "pissa"}, {}, r"has init_lora_weights \(pissa\), which changes the model's own weights"),
        ({"peft_type": "IA3"}, {}, r"is an adapter of type IA3"),
    ],
)
def test_an_adapter_that_no_run_can_go_on_with_is_refused(tmp_path, saved, asked, message):
    folder = saved_by_peft(tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **saved}))
    with pytest.raises(UserError, match=message):
        pick_adapter(AdapterConfig(type="lora", start=str(folder), **asked), base="base", seed=0)


def test_another_models_adapter_and_a_damaged_one_are_refused_before_weights_are_read(tmp_path):
    folder = saved_by_peft(tmp_path / "adapter")
    started = pick_adapter(AdapterConfig(type="lora", start=str(folder)), base="base", seed=0)
    with pytest.raises(
        UserError, match="is not for this model: .*down_proj.lora_B.weight is .48, 4. and should be .64, 4."
    ):
        rehearse(tiny_llama(hidden_size=64).config, started)
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot be read as weights"):
        rehearse(tiny_llama().config, started)
    with pytest.raises(UserError, match=r"adapter.start \(.*nowhere\) holds no adapter: it needs adapter_config.json"):
        pick_adapter(AdapterConfig(type="lora", start=str(tmp_path / "nowhere")), base="base", seed=0)


def test_an_adapters_fingerprint_is_of_what_it_computes(tmp_path):
    folder = saved_by_peft(tmp_path / "adapter")
    before, file = adapter_digest(folder), folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere", "lora_dropout": 0.1}))
    assert adapter_digest(folder) == before
    file.write_text(json.dumps({**config, "lora_alpha": 13}))
    assert adapter_digest(folder) != before


@pytest.mark.parametrize("settings", ({"rank": 4}, {"merged": True}, {"start": "x"}))
def test_settings_of_an_adapter_without_a_type_are_refused(settings):
    with pytest.raises(UserError, match=r"of an adapter, and type is none: set type to lora or dora"):
        Config.build({"model": {"path": "m"}, "data": {"train": "t"}, "adapter": settings})


def test_an_adapter_has_a_default_learning_rate_of_its_own():
    def rate(adapter: dict[str, object], train: object) -> float:
        return Config(model={"path": "m"}, data={"train": "t"}, adapter=adapter, train=train).train.lr

    assert rate({"type": "lora"}, {}) == rate({"type": "dora"}, TrainConfig(seed=3)) == ADAPTER_LR
    assert rate({"type": "none"}, {}) == rate({}, TrainConfig()) == TrainConfig().lr != ADAPTER_LR
    assert rate({"type": "lora"}, {"lr": 3e-3}) == rate({"type": "lora"}, TrainConfig(lr=3e-3)) == 3e-3


def test_a_folder_of_an_adapter_as_the_model_is_refused_with_what_to_do(tmp_path):
    from kto_dist.store.fingerprint import weight_files

    save_tiny(tmp_path / "base")
    with pytest.raises(UserError, match="holds an adapter.*`kto-dist merge`.*adapter.start"):
        weight_files(saved_by_peft(tmp_path / "adapter"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base")

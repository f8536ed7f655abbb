"""What a checkpoint lacks ends a run before anything is scored, and what it holds beside is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from families import COMMON, FAMILIES, HEADS, UNPACKABLE, tiny
from misfits import MISFITS, edit_config, no_head, other_shape, rewrite
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import save_tiny, tiny_llama
from tiny_runs import tiny_config, train_all
from transformers import AutoConfig, AutoModelForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.model.config import DeepspeedConfig, ModelConfig
from kto_dist.model.engines import AdamW, Policy
from kto_dist.model.loading import load_config, load_model
from kto_dist.model.weights import Weights, check_weights
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.precompute import precompute


def check(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return check_weights("model.path", str(folder), folder, None, load_config(str(folder)), dtype)


@pytest.mark.parametrize(("make", "message"), MISFITS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_would_be_random_are_refused_with_their_likely_cause(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        check(tmp_path)


def test_loading_refuses_them_too_whoever_calls_it(tmp_path):
    no_head(tmp_path)
    with pytest.raises(UserError, match=r"lack 1 tensors that LlamaForCausalLM needs.*lm_head.weight"):
        load_model(str(tmp_path), gguf_file=None, dtype=torch.float32, attention="sdpa")


ALL = {**FAMILIES, **HEADS, **UNPACKABLE}


@pytest.mark.parametrize("name", ALL)
def test_a_whole_checkpoint_of_any_family_is_accepted_without_a_word(tmp_path, name):
    tiny(ALL[name]).save_pretrained(tmp_path)
    assert check(tmp_path) == Weights()
    assert check(tmp_path, torch.bfloat16) == Weights()


@pytest.mark.parametrize("form", ("shards", "bin", "tied"))
def test_a_checkpoint_may_be_in_shards_or_old_files_or_share_its_embedding(tmp_path, form):
    lm = tiny_llama(tie_word_embeddings=form == "tied")
    lm.save_pretrained(tmp_path, max_shard_size="50KB" if form == "shards" else "1GB")
    if form == "bin":
        torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert check(tmp_path) == Weights()


def test_a_shard_that_is_not_there_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("model-00002-*"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} does not exist, and the index"):
        check(tmp_path)


def test_tensors_that_nothing_takes_are_named_and_counted(tmp_path):
    save_tiny(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "model.layers.0.spare": torch.ones(2), "value_head": torch.ones(1)})
    found = check(tmp_path)
    assert found == Weights(unknown=("model.layers.0.spare", "value_head"))
    (said,) = found.warnings("model.path", exported=True)
    assert "model.path: 2 tensors of the files have no place in the model" in said and "value_head" in said
    assert found.summary()["unknown"] == {"count": 2, "names": ["model.layers.0.spare", "value_head"]}


@pytest.mark.parametrize("form", ("one file", "shards", "bin"))
def test_a_head_that_config_json_ties_to_another_in_the_files_is_named(tmp_path, form):
    lm = tiny_llama(tie_word_embeddings=False)
    lm.save_pretrained(tmp_path, max_shard_size="50KB" if form == "shards" else "1GB")
    if form == "bin":
        torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    edit_config(tmp_path, tie_word_embeddings=True)
    found = check(tmp_path)
    assert found == Weights(untied=("lm_head.weight",))
    assert "ties lm_head.weight to the embedding" in found.warnings("model.path", exported=True)[0]
    assert "trained" not in found.warnings("reference.path", exported=False)[0]
    # the same tensor twice is no difference
    tensors = lm.state_dict() | {"lm_head.weight": lm.model.embed_tokens.weight.detach().clone()}
    same = tmp_path / "same"
    tiny_llama(tie_word_embeddings=True).save_pretrained(same)
    save_file(tensors, same / "model.safetensors", metadata={"format": "pt"})
    assert check(same) == Weights()


def test_a_head_that_is_tied_by_config_json_alone_is_trained_and_exported_as_it_is(tmp_path, tiny_log):
    model = edit_config(save_tiny(tmp_path / "model"), tie_word_embeddings=True)
    config = tiny_config(tmp_path, model, tiny_log, train__max_steps=2)
    ((summary,),) = run_ranks(train_all, 1, [config])
    assert summary["weights"]["policy"]["untied"] == {"count": 1, "names": ["lm_head.weight"]}
    start, found = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "run" / "export"))
    for lm in start, found:
        assert not torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight)
    assert not torch.equal(start.lm_head.weight, found.lm_head.weight)
    assert torch.norm(start.lm_head.weight - found.lm_head.weight) < 0.1 * torch.norm(start.lm_head.weight)


def _told(folder: Path, stage: int) -> list[str]:
    said: list[str] = []
    config = load_config(str(folder))
    policy = Policy(
        ModelConfig(path=str(folder)),
        DeepspeedConfig(zero_stage=stage),
        AdamW(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0),
        model_config=config,
        dtype=torch.bfloat16,
        attention="sdpa",
        kernels="none",
        warn=said.append,
    )
    policy.close()
    return said


def test_what_quantised_files_hold_beside_is_named_when_they_are_loaded(tmp_path):
    def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layers = {name for name in tensors if name.endswith("proj.weight")}
        scales = {f"{name}_scale_inv": torch.ones(1, 1) for name in layers}
        return {n: t.to(torch.float8_e4m3fn) if n in layers else t for n, t in tensors.items()} | scales

    save_tiny(tmp_path)
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_config(rewrite(tmp_path, packed), quantization_config=quantised)
    assert run_ranks(_told, 1, tmp_path, 2) == [[]]
    rewrite(tmp_path, lambda tensors: {**tensors, "model.layers.0.spare": torch.ones(2)})
    ((said,),) = run_ranks(_told, 1, tmp_path, 2)
    assert "1 tensors of the files of" in said and "not used: model.layers.N.spare" in said


QWEN3_5 = {
    "text_config": {
        **COMMON,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
}


def test_a_vision_tower_that_is_not_trained_is_said_to_stay_out_of_the_export(tmp_path):
    config = AutoConfig.for_model("qwen3_5", **QWEN3_5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "model.visual.patch.weight": torch.ones(2, 2)})
    found = check(tmp_path)
    assert found == Weights(apart=("model.visual.patch.weight",))
    assert "the export will not hold them" in found.warnings("model.path", exported=True)[0]
    assert "export" not in found.warnings("reference.path", exported=False)[0]


ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0}


def test_what_a_family_keeps_in_fp32_is_rounded_in_policy_and_reference_alike_and_named(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5_moe", **{**COMMON, **ERNIE})).save_pretrained(
        tmp_path
    )
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert gates <= set(check(tmp_path, torch.bfloat16).rounded)
    assert "dtype fp32 keeps them" in check(tmp_path, torch.bfloat16).warnings("model.path", exported=True)[0]
    assert not check(tmp_path).rounded
    for dtype in (torch.bfloat16, torch.float32):
        lm = load_model(str(tmp_path), gguf_file=None, dtype=dtype, attention="sdpa")
        assert {parameter.dtype for parameter in lm.parameters()} == {dtype}


def refusals(configs: dict[str, Config]) -> dict[str, str]:
    """On every rank: what is said of each, one after the other."""
    said = {}
    for name, config in configs.items():
        try:
            (train if name.startswith("train") else precompute)(config)
        except UserError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize("ranks", (1, 2))
def test_nothing_is_scored_or_trained_with_random_weights_on_any_rank(tmp_path, tiny_model, tiny_log, ranks):
    configs, wanted = {}, {}
    for number, make in enumerate(MISFITS):
        bad = str(make(tmp_path / make.__name__))
        stage = 3 if number % 2 else 2
        for command in ("train", "precompute"):
            places = {
                "model": {"model__path": bad, "deepspeed__zero_stage": stage},
                "reference": {"reference__path": bad, "reference__zero_stage": 3 if number % 2 else 0},
            }
            for place, settings in places.items():
                name = f"{command} {place} {make.__name__}"
                model = Path(settings.pop("model__path", tiny_model))
                configs[name] = tiny_config(tmp_path / name.replace(" ", "-"), model, tiny_log, **settings)
                wanted[name] = f"{place}.path"
    for said in run_ranks(refusals, ranks, configs):
        assert said.keys() == wanted.keys()
        for name, text in said.items():
            assert ("weight files of " + wanted[name] in text) or "damaged or cut short" in text, (name, text)
    for config in configs.values():
        assert not list(Path(config.reference.store).rglob("*.parquet"))
        assert not (Path(config.train.output) / "metrics.jsonl").exists()


def load_policy(path: str, stage: int) -> str:
    """On every rank: what is said of weights that were changed between the look at them and their load."""
    config = tiny_config(Path(path), Path(path), Path(path), deepspeed__zero_stage=stage)
    try:
        Policy(
            config.model,
            config.deepspeed,
            AdamW(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0),
            model_config=load_config(path),
            dtype=torch.float32,
            attention="sdpa",
            kernels="none",
        )
    except UserError as error:
        return str(error)
    return f"rank {os.environ['RANK']} loaded them"


@pytest.mark.parametrize("stage", (2, 3))
def test_no_rank_waits_for_one_that_cannot_load(tmp_path, stage):
    for make, message in ((no_head, "lm_head.weight"), (other_shape, "does not load")):
        for said in run_ranks(load_policy, 2, str(make(tmp_path / make.__name__)), stage):
            assert message in said


def test_the_summary_names_what_was_not_used(tmp_path, tiny_log):
    save_tiny(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {**tensors, "spare": torch.ones(1)})
    config = tiny_config(tmp_path, tmp_path / "model", tiny_log, train__max_steps=1)
    run_ranks(train_all, 1, [config])  # of its own: DeepSpeed keeps the first process group that it has seen
    summary = json.loads((Path(config.train.output) / "summary.json").read_text())
    assert summary["weights"]["policy"]["unknown"] == {"count": 1, "names": ["spare"]}
    assert summary["weights"]["reference"] is None

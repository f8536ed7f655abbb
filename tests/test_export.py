"""Exports load anywhere, and that of a checkpoint is what the run itself would have exported then."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import COMMON
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from tiny_runs import tiny_config, train_all, weights_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.commands.cli import main
from kto_dist.training.beside import unreadable
from kto_dist.training.config import Config
from kto_dist.training.export import export, export_checkpoint
from kto_dist.training.prepare import prepare_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path) -> Config:
    """Two ranks; checkpoints of the steps 1 to 3."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"checkpoint__every_steps": 1, "checkpoint__keep": 9, "train__max_steps": 3}
    config = tiny_config(folder, tiny_model, tiny_log, **settings)
    run_ranks(train_all, 2, [config])
    return config


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
@pytest.mark.parametrize("tied", (False, True))
def test_the_export_of_every_stage_loads_in_transformers_with_the_trained_weights(
    tmp_path, tiny_log, stage, dtype, tied
):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    GenerationConfig(max_new_tokens=7, eos_token_id=[1, 2]).save_pretrained(model)
    config = tiny_config(
        tmp_path,
        model,
        tiny_log,
        deepspeed__zero_stage=stage,
        train__dtype=dtype,
        reference__dtype=dtype,
        train__max_steps=2,
        checkpoint__every_steps=2,
    )
    run_ranks(train_all, 2, [config])
    export = Path(config.train.output) / "export"
    loaded = AutoModelForCausalLM.from_pretrained(export)
    start = AutoModelForCausalLM.from_pretrained(model, dtype=loaded.dtype)
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(export / "model.safetensors")) != tied
    readable = {file.name: file.stat().st_mode & 0o044 for file in export.iterdir()}
    assert set(readable.values()) == {0o044}
    changed = [
        not torch.equal(weight, start.state_dict()[name])
        for name, weight in loaded.state_dict().items()
        if weight.dim() > 1
    ]
    assert all(changed)
    assert loaded.generation_config.max_new_tokens == 7  # the model's own settings, not ones made from its config
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True)
    assert ids
    assert (export / "README.md").read_text().startswith("---\nbase_model:")
    assert not list(export.parent.glob(".partial*"))
    # and so does that of its last checkpoint, bit for bit
    again = export_checkpoint(Path(config.train.output), None, tmp_path / "again", Console())
    found, expected = load_file(again / "model.safetensors"), weights_of(config)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


ROUTED = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("stage", (2, 3))
def test_a_buffer_that_is_kept_in_fp32_is_so_in_every_export(tmp_path, tiny_log, stage):
    """The bias that chooses experts: near 8, two of its values are one and the same in bf16."""
    tokenizer = tiny_tokenizer()
    settings = {**COMMON, **ROUTED, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **settings), dtype=torch.float32)
    name, bias = "model.layers.1.mlp.gate.e_score_correction_bias", torch.tensor([8.001, 8.002, 8.003, 8.004])
    lm.state_dict()[name].copy_(bias)
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(
        tmp_path,
        tmp_path / "model",
        tiny_log,
        deepspeed__zero_stage=stage,
        train__dtype="bf16",
        reference__dtype="bf16",
        train__max_steps=2,
        checkpoint__every_steps=2,
    )
    run_ranks(train_all, 2, [config])
    again = export_checkpoint(Path(config.train.output), None, tmp_path / "again", Console())
    ours, theirs = weights_of(config), load_file(again / "model.safetensors")
    assert torch.equal(ours[name], bias) and ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert theirs[key].dtype == tensor.dtype and torch.equal(theirs[key], tensor), key
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(again, dtype="auto").state_dict()[name].dtype == torch.float32


def test_all_that_a_run_leaves_in_its_folder_is_in_the_documentation(trained):
    page = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text()
    left = sorted(path.name for path in Path(trained.train.output).iterdir())
    assert {"checkpoints", "config.yaml", "export", "summary.json"} <= set(left)
    assert [name for name in left if f"`{name}" not in page] == []
    kinds = {path.name.split("-")[0] for path in (Path(trained.train.output) / "checkpoints").iterdir()}
    assert kinds == {"step"}


def test_any_step_can_be_chosen_and_its_card_says_which(trained, tmp_path):
    result = CliRunner().invoke(
        main, ["export", trained.train.output, "--step", "2", "--output", str(tmp_path / "two")]
    )
    assert result.exit_code == 0, result.output
    assert f"model: {tmp_path / 'two'}\n" in result.output
    last, second = weights_of(trained), load_file(tmp_path / "two" / "model.safetensors")
    assert not all(torch.equal(second[name], tensor) for name, tensor in last.items())
    card = (tmp_path / "two" / "README.md").read_text()
    assert "after 2 steps" in card and "| loss | " in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")


def test_what_cannot_be_exported_is_refused_with_what_there_is(trained, tmp_path):
    with pytest.raises(UserError, match=r"has no checkpoint of step 7: it has step-00000001, step-00000002, step-0"):
        export_checkpoint(Path(trained.train.output), 7, tmp_path / "x", Console())
    with pytest.raises(
        UserError, match=r"holds no run: it has no config.yaml; give the folder that train.output names"
    ):
        export_checkpoint(tmp_path, None, None, Console())
    finished = r"the run is finished, and its model is .*run/export"
    with pytest.raises(UserError, match=rf"export exists \({finished}\): give another folder with --output"):
        export_checkpoint(Path(trained.train.output), None, None, Console())
    run = tmp_path / "run"
    shutil.copytree(trained.train.output, run)
    state = run / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "step": 3}))
    with pytest.raises(UserError, match=r"step-00000002 is damaged: state.json has .*choose another"):
        export_checkpoint(run, 2, tmp_path / "x", Console())
    shutil.rmtree(run / "checkpoints")
    for step, what in ((None, "holds no whole checkpoint"), (2, "has no checkpoint of step 2: it has none")):
        with pytest.raises(
            UserError, match=rf"{what}; {finished} \(such a run keeps checkpoints where checkpoint.every"
        ):
            export_checkpoint(run, step, tmp_path / "x", Console())
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint$"):
        export_checkpoint(run, None, tmp_path / "x", Console())
    assert not (tmp_path / "x").exists()


def write_export(target: Path, config: LlamaConfig, source: Path | None) -> Path:
    weights = LlamaForCausalLM(config).state_dict()
    export(weights, target, model_config=config, source=source, tokenizer=tiny_tokenizer(), card="a card")
    return target


def test_weights_that_are_dense_now_are_not_called_quantised(tmp_path):
    packed = copy.deepcopy(tiny_llama().config)
    packed.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    # the state dict that training leaves is dense
    dense = copy.deepcopy(packed)
    del dense.quantization_config
    weights = LlamaForCausalLM(dense).state_dict()
    export(weights, tmp_path / "out", model_config=packed, source=None, tokenizer=tiny_tokenizer(), card="")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert packed.quantization_config  # the run's own is as it was


def test_weights_that_do_not_load_back_are_no_export(tmp_path):
    """What stands under another name than the model's would be random numbers for whoever loads it."""
    config = tiny_llama().config
    weights = LlamaForCausalLM(config).state_dict()
    weights["model.layers.0.mlp.up_project.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(RuntimeError, match=r"does not load back as it was written: .*up_project"):
        export(weights, tmp_path / "out", model_config=config, source=None, tokenizer=tiny_tokenizer(), card="")
    assert not (tmp_path / "out").exists()


def test_generation_settings_processors_and_code_go_along_as_they_are(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    files = {
        # what transformers would refuse to save again
        "generation_config.json": '{"do_sample": false, "temperature": 0.7, "eos_token_id": [1, 2]}',
        "preprocessor_config.json": '{"image_processor_type": "X", "auto_map": {"AutoProcessor": "processing.P"}}',
        "processor_config.json": "{}",
        "processing.py": "class P: ...\n",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "model.safetensors").write_text("the old weights")
    out = write_export(tmp_path / "out", tiny_llama().config, source)
    for name, text in files.items():
        assert (out / name).read_text() == text
    AutoModelForCausalLM.from_pretrained(out)


def test_python_files_that_no_config_names_stay_behind(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "train.py").write_text("import os\n")
    assert not list(write_export(tmp_path / "out", tiny_llama().config, tmp_path / "model").glob("*.py"))


def test_generation_settings_that_cannot_be_read_are_told_before_training(tmp_path, tiny_log, capsys):
    model = save_tiny(tmp_path / "model")
    (model / "generation_config.json").write_text("{'temperature': 1")
    config = tiny_config(tmp_path, model, tiny_log, train__max_steps=1)
    run_ranks(train_all, 1, [config])
    assert (Path(config.train.output) / "export" / "generation_config.json").read_text().startswith("{")
    assert "generation_config.json of model.path" in str(unreadable(model))
    assert "cannot be read" in str(unreadable(model))
    prepare_training(config, Console())
    assert "the export will have one made from" in capsys.readouterr().out

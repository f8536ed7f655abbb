"""Whole runs of adapters: the promises hold, one store serves them all, checkpoints are small, exports load."""

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, train_and_die_after
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.commands.cli import main
from kto_dist.training.config import Config
from kto_dist.training.evaluate import evaluate
from kto_dist.training.export import export_checkpoint
from kto_dist.training.judged import Request
from kto_dist.training.loop import train

TOLERANCE = 1e-4
ADAPTED: dict[str, Any] = {"adapter__type": "lora", "adapter__rank": 4, "train__lr": 1e-2}


def lora_config(folder: Path, model: Path, log: Path, **changes: Any) -> Config:
    return tiny_config(folder, model, log, **{**ADAPTED, **changes})


def values_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.train.output) / "export" / "adapter_model.safetensors")


def assert_same_trajectory(plain: Config, other: Config) -> None:
    for expected, found in zip(metrics_of(plain), metrics_of(other), strict=True):
        for name in ("loss", "kl_raw", "grad_norm", "rewards/desirable", "rewards/undesirable"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), (expected["step"], name)
    expected, found = values_of(plain), values_of(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= TOLERANCE * torch.norm(tensor), name


Case = tuple[str, int, int, int, bool]
PLAIN: dict[str, Case] = {kind: (kind, 1, 0, 4096, False) for kind in ("lora", "dora")}
CASES: list[Case] = [
    *PLAIN.values(),
    *(("lora", *case) for case in itertools.product((1, 2), (0, 2, 3), (96,), (True,))),
    ("lora", 4, 2, 96, True),
    *(("dora", world, stage, 96, True) for world, stage in ((1, 2), (2, 0), (2, 3))),
]
"""Type, ranks, ZeRO stage, tokens a micro-batch, whether layers are recomputed in backward."""


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path) -> dict[Case, Config]:
    folder = tmp_path_factory.mktemp("trajectories")
    configs = {
        case: lora_config(
            folder,
            tiny_model,
            tiny_log,
            adapter__type=case[0],
            train__output=str(folder / "-".join(map(str, case))),
            deepspeed__zero_stage=case[2],
            train__tokens_per_microbatch=case[3],
            model__gradient_checkpointing=case[4],
        )
        for case in CASES
    }
    for world in (1, 2, 4):
        run_ranks(train_all, world, [config for case, config in configs.items() if case[1] == world])
    return configs


@pytest.mark.parametrize("case", CASES)
def test_the_batch_decides_an_adapter_too_not_the_cluster_nor_recomputation(trajectories, case):
    assert_same_trajectory(trajectories[PLAIN[case[0]]], trajectories[case])


@pytest.mark.parametrize("case", PLAIN.values())
def test_before_the_first_update_the_adapted_policy_is_the_model(trajectories, case):
    first, last = metrics_of(trajectories[case])[0], metrics_of(trajectories[case])[-1]
    assert first["kl_raw"] == pytest.approx(0, abs=1e-5) and abs(last["kl_raw"]) > 1e-3


def test_runs_of_any_rank_alpha_targets_type_and_rate_share_one_pass_of_the_reference(trajectories):
    summaries = [
        json.loads((Path(config.train.output) / "summary.json").read_text())["reference"]
        for config in trajectories.values()
    ]
    assert sum(summary["scored"] > 0 for summary in summaries) == 1


def _scored(configs: list[Config]) -> list[int]:
    return [summary["reference"]["scored"] for summary in train_all(configs)]


def test_a_sweep_over_adapters_scores_nothing_again(tmp_path, tiny_model, tiny_log):
    sweep = [
        {"adapter__type": "none"},
        {},
        {"adapter__rank": 8},
        {"adapter__alpha": 64.0},
        {"adapter__targets": ["q_proj", "v_proj"]},
        {"adapter__type": "dora"},
        {"train__lr": 1e-3},
    ]
    configs = [
        lora_config(
            tmp_path,
            tiny_model,
            tiny_log,
            **({"adapter__rank": None} if change.get("adapter__type") == "none" else {}),
            train__output=str(tmp_path / str(number)),
            train__max_steps=1,
            **change,
        )
        for number, change in enumerate(sweep)
    ]
    (scored,) = run_ranks(_scored, 1, configs)
    assert scored[0] > 0 and scored[1:] == [0] * (len(sweep) - 1)


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "kind"),
    [
        pytest.param(1, 0, "fp32", "lora", marks=pytest.mark.soak),
        (2, 2, "fp32", "dora"),
        (2, 3, "fp32", "lora"),
        pytest.param(2, 2, "bf16", "lora", marks=pytest.mark.soak),
    ],
)
def test_a_resumed_run_of_an_adapter_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, tiny_log, world, stage, dtype, kind
):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    shared = {
        "deepspeed__zero_stage": stage,
        "train__dtype": dtype,
        "reference__dtype": dtype,
        "adapter__type": kind,
        "train__max_steps": 8,
    }
    whole = lora_config(tmp_path, model, tiny_log, train__output=str(tmp_path / "whole"), **shared)
    broken = lora_config(
        tmp_path, model, tiny_log, train__output=str(tmp_path / "broken"), checkpoint__every_steps=3, **shared
    )
    run_ranks(train_all, world, [whole])
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, world, broken, 5)
    # no weight of the model is in it: the adapter in its dtype, and three numbers in fp32 for each of its weights
    found = Path(broken.train.output) / "checkpoints" / "step-00000003"
    size = sum(file.stat().st_size for file in found.iterdir() if file.suffix == ".pt")
    trained = sum(value.numel() for value in values_of(whole).values())
    frozen = sum(p.numel() for p in tiny_llama(tie_word_embeddings=True).parameters())
    # names, counters and the padding of shards beside it
    assert size < 16 * trained + 40_000 * world and 16 * trained + 40_000 * world < 2 * 16 * trained + 4 * frozen
    run_ranks(train_all, world, [broken])
    for expected, line in zip(metrics_of(whole), metrics_of(broken), strict=True):
        for name in expected.keys() - TIMED:
            assert line[name] == expected[name], (expected["step"], name)
    for name, tensor in values_of(whole).items():
        assert torch.equal(values_of(broken)[name], tensor), name


@pytest.mark.parametrize("stage", (pytest.param(2, marks=pytest.mark.soak), 3))
def test_a_run_of_an_adapter_goes_on_with_another_number_of_ranks(tmp_path, tiny_model, tiny_log, stage):
    shared = {"train__max_steps": 6, "deepspeed__zero_stage": stage}
    whole = lora_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **shared)
    moved = lora_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "moved"), checkpoint__every_steps=3, **shared
    )
    run_ranks(train_all, 1, [whole])
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, 2, moved, 4)
    run_ranks(train_all, 1, [moved])
    assert_same_trajectory(whole, moved)


def _trained_and_evaluated(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(config), evaluate(Request(target=config.train.output))


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, "fp32"),
        pytest.param(2, "bf16", marks=pytest.mark.soak),
        pytest.param(3, "fp32", marks=pytest.mark.soak),
        (3, "bf16"),
    ],
)
def test_the_export_of_every_stage_loads_in_peft_and_is_the_policy(tmp_path, tiny_log, stage, dtype):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=stage == 2)
    config = lora_config(
        tmp_path,
        model,
        tiny_log,
        adapter__merged=True,
        data__heldout=0.3,
        deepspeed__zero_stage=stage,
        train__dtype=dtype,
        reference__dtype=dtype,
        checkpoint__every_steps=5,
    )
    summary, found = run_ranks(_trained_and_evaluated, 2, config)[0]
    output = Path(config.train.output)
    # through the adapter's files, the held-out figures are those of the policy that they came from
    after = {name: value for name, value in summary["heldout"]["after"].items() if isinstance(value, float)}
    off = 1e-4 if dtype == "fp32" else 0.05
    assert {name: found["heldout"][name] for name in after} == pytest.approx(after, abs=off, rel=off)
    assert after["rewards/margin"] != 0 and found["model"]["adapter"] == str(output / "export")

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(output / "export"))
    tensors = values_of(config)
    assert len(tensors) == 28 and all(tensor.numel() for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert {file.stat().st_mode & 0o044 for file in (output / "export").iterdir()} == {0o044}
    settings = json.loads((output / "export" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model) and settings["target_modules"] == sorted(
        settings["target_modules"]
    )
    # merged it computes the same, without peft
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert merged.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    ids = torch.arange(2, 34).view(2, 16)
    together, apart = merged.float()(ids).logits, loaded(ids).logits
    assert (together - apart).abs().max() <= (1e-4 if dtype == "fp32" else 0.05) * apart.abs().max()
    # and the last checkpoint gives the same adapter, bit for bit
    again = load_file(export_checkpoint(output, None, tmp_path / "again", Console()) / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


@pytest.mark.parametrize("kind", ("lora", pytest.param("dora", marks=pytest.mark.soak)))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_an_adapter_to_start_from_is_a_part_of_the_reference(tmp_path, tiny_model, tiny_log, kind, dtype):
    shared = {"adapter__type": kind, "train__dtype": dtype, "reference__dtype": dtype}
    first = lora_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "first"), **shared)
    start = {**shared, "adapter__rank": None, "adapter__start": str(tmp_path / "first" / "export")}
    second = lora_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "second"), **start)
    third = lora_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "third"), **start)
    ((before, after, again),) = run_ranks(train_all, 1, [first, second, third])
    # the policy is its reference, which is no longer the bare model
    assert metrics_of(second)[0]["kl_raw"] == pytest.approx(0, abs=1e-5 if dtype == "fp32" else 0.2)
    assert before["reference"]["fingerprint"] != after["reference"]["fingerprint"]
    assert (after["reference"]["scored"], again["reference"]["scored"]) == (before["reference"]["scored"], 0)
    assert after["adapter"]["rank"] == 4
    old, new = values_of(first), values_of(second)
    assert old.keys() == new.keys() and not any(torch.equal(old[name], new[name]) for name in old)
    # and a resumed run knows it for another one when the adapter is
    with pytest.raises(UserError, match=r"adapter.start was .* and is"):
        moved = {**start, "adapter__start": str(tmp_path / "second" / "export"), "checkpoint__every_steps": 2}
        output = str(tmp_path / "kept")
        kept = lora_config(
            tmp_path, tiny_model, tiny_log, train__output=output, **{**start, "checkpoint__every_steps": 2}
        )
        run_ranks(train_all, 1, [kept])
        (Path(output) / "summary.json").unlink()
        run_ranks(train_all, 1, [lora_config(tmp_path, tiny_model, tiny_log, train__output=output, **moved)])


def test_an_adapter_is_merged_from_a_run_or_a_folder(tmp_path, tiny_model, tiny_log):
    config = lora_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    run_ranks(train_all, 1, [config])
    run = Path(config.train.output)
    for given, output in ((run, tmp_path / "one"), (run / "export", None)):
        words = ["merge", str(given), *([] if output is None else ["--output", str(output)])]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", run / "export-merged"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], tiny_llama().model.layers[0].mlp.up_proj.weight)
    result = CliRunner().invoke(main, ["merge", str(run)])
    assert result.exit_code == 2 and "export-merged exists: give another folder" in result.output
    result = CliRunner().invoke(main, ["merge", str(tiny_model), "--base", str(tiny_model)])
    assert result.exit_code == 2 and "holds no adapter: it needs adapter_config.json" in result.output


def test_offloaded_weights_train_the_same_adapter(tmp_path, trajectories, tiny_model, tiny_log):
    offloaded = {"deepspeed__zero_stage": 3, "deepspeed__offload_parameters": "cpu"}
    config = lora_config(tmp_path, tiny_model, tiny_log, **offloaded)
    run_ranks(train_all, 2, [config])
    assert_same_trajectory(trajectories[PLAIN["lora"]], config)


@pytest.mark.parametrize("merged", (pytest.param(False, marks=pytest.mark.soak), True))
def test_mlflow_gets_the_adapter_and_the_merged_model_where_there_is_one(tmp_path, tiny_model, tiny_log, merged):
    asked = {"tracking__enabled": True, "tracking__log_model": True, "adapter__merged": merged, "train__max_steps": 1}
    ((summary,),) = run_ranks(train_all, 1, [lora_config(tmp_path, tiny_model, tiny_log, **asked)])
    client, run = MlflowClient(summary["mlflow"]["uri"]), summary["mlflow"]["run_id"]
    files = {Path(file.path).name for file in client.list_artifacts(run, "adapter")}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert len(client.get_run(run).outputs.model_outputs) == merged


def test_what_is_registered_has_to_be_a_whole_model(tmp_path, tiny_model, tiny_log):
    with pytest.raises(UserError, match=r"tracking.register \(mine\) needs adapter.merged"):
        lora_config(tmp_path, tiny_model, tiny_log, tracking__register="mine")
    lora_config(tmp_path, tiny_model, tiny_log, tracking__register="mine", adapter__merged=True)


def _told(config: Config, past: tuple[str, ...]) -> str:
    """What a run says whose family reads these layers' weights past their forwards, as mamba's kernels do."""

    def forward(mlp: Any, rows: torch.Tensor) -> torch.Tensor:
        def through(name: str, rows: torch.Tensor) -> torch.Tensor:
            layer = getattr(mlp, name)
            return functional.linear(rows, layer.weight) if name in past else layer(rows)

        return through("down_proj", mlp.act_fn(through("gate_proj", rows)) * through("up_proj", rows))

    LlamaMLP.forward, said = forward, io.StringIO()
    with contextlib.redirect_stdout(said):
        train(config)
    return " ".join(said.getvalue().split())


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [("lora", 1, 2), ("dora", 2, 3), *(pytest.param("lora", 2, s, marks=pytest.mark.soak) for s in (0, 2, 3))],
)
def test_adapted_layers_that_can_learn_nothing_are_named_after_the_first_update(
    tmp_path, tiny_model, tiny_log, kind, world, stage
):
    def config(name: str) -> Config:
        changes = {"adapter__type": kind, "deepspeed__zero_stage": stage, "train__max_steps": 2}
        return lora_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / name), **changes)

    said = run_ranks(_told, world, config("past"), ("gate_proj",))[0]
    assert said.count("adapter: the first update has left 2 of the adapted layers as they were") == 1
    assert "(model.layers.N.mlp.gate_proj)" in said
    assert "has left" not in run_ranks(_told, world, config("sound"), ())[0]


def test_an_impossible_adapter_is_refused_before_the_reference_scores_anything(tmp_path, tiny_model, tiny_log):
    config = lora_config(tmp_path, tiny_model, tiny_log, adapter__targets=["lm_head"])
    with pytest.raises(UserError, match="is the LM head, which stays as it is"):
        run_ranks(train_all, 1, [config])
    assert not (tmp_path / "store").exists()

"""Whole runs of adapters in mixtures of experts: on the experts themselves and beside them, with the routers' loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture, save_mixture
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, train_and_die_after
from transformers import AutoModelForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.model.adapters import pick_adapter, rehearse
from kto_dist.model.config import AdapterConfig
from kto_dist.training.config import Config
from kto_dist.training.evaluate import evaluate
from kto_dist.training.judged import Request
from kto_dist.training.loop import train

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {"beside": ["all-linear"], "both": ["all-linear", *EXPERTS], "experts": EXPERTS}
FIGURES = (
    "loss",
    "kl_raw",
    "grad_norm",
    "rewards/desirable",
    "rewards/undesirable",
    "router/loss",
    "router/max_load/2",
)
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {kind: save_mixture(folder / kind, kind, router_aux_loss_coef=0.3) for kind in MIXTURES}


def adapted(folder: Path, model: Path, log: Path, targets: str, **changes: Any) -> Config:
    own = {"adapter__type": "lora", "adapter__rank": 4, "adapter__targets": TARGETS[targets], "train__lr": 1e-2}
    return tiny_config(folder, model, log, **{**own, "train__max_steps": 3, **changes})


def values_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.train.output) / "export" / "adapter_model.safetensors")


def test_a_layer_that_peft_takes_for_an_expert_is_not_left_out_in_silence():
    dense_below = mixture("qwen3_moe", mlp_only_layers=[0]).config
    for targets in TARGETS["beside"], TARGETS["both"]:
        section = AdapterConfig(type="lora", targets=tuple(targets))
        with pytest.raises(UserError, match="peft takes adapter.targets .* for the experts of Qwen3MoeForCausalLM"):
            rehearse(dense_below, pick_adapter(section, base="base", seed=0))
    attention = AdapterConfig(type="lora", targets=("q_proj", "o_proj", *EXPERTS))
    told = rehearse(dense_below, pick_adapter(attention, base="base", seed=0))
    assert not told.experts and not [name for name in told.modules if "layers.0.mlp" in name]


SHARDED = {"deepspeed__zero_stage": 3, "train__tokens_per_microbatch": 96}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 2": (2, {"deepspeed__zero_stage": 2, "train__tokens_per_microbatch": 96}),
    "recomputed": (1, {"train__tokens_per_microbatch": 200, "model__gradient_checkpointing": True}),
    "stage 3": (2, SHARDED),
    "stage 3, recomputed": (2, {**SHARDED, "model__gradient_checkpointing": True}),
}
soak = pytest.mark.soak


@pytest.mark.parametrize(
    ("kind", "targets", "others"),
    [
        # of the others DeepSpeed itself gathers each mixture as one
        ("olmoe", "both", ["recomputed", "stage 3"]),
        pytest.param("mixtral", "both", [*OTHERS], marks=soak),
        pytest.param("mixtral", "experts", [*OTHERS], marks=soak),
        pytest.param("mixtral", "beside", [*OTHERS], marks=soak),
        pytest.param("qwen3_moe", "both", [*OTHERS], marks=soak),
        pytest.param("olmoe", "experts", [*OTHERS], marks=soak),
    ],
)
def test_the_batch_decides_adapters_of_a_mixture_and_not_the_cluster(tmp_path, saved, tiny_log, kind, targets, others):
    def named(name: str, **changes: Any) -> Config:
        return adapted(tmp_path, saved[kind], tiny_log, targets, train__output=str(tmp_path / name), **changes)

    plain = named("plain", deepspeed__zero_stage=0, train__tokens_per_microbatch=4096)
    found = {name: named(name, **OTHERS[name][1]) for name in others}
    for world in (1, 2):
        first = [plain] if world == 1 else []
        run_ranks(train_all, world, first + [found[name] for name in others if OTHERS[name][0] == world])
    lines = metrics_of(plain)
    assert lines[0]["kl_raw"] == pytest.approx(0, abs=1e-5) and lines[-1]["router/loss"] != lines[0]["router/loss"]
    moved = {name for name, tensor in values_of(plain).items() if "lora_B" in name and tensor.abs().max() > 0}
    assert moved == {name for name in values_of(plain) if "lora_B" in name}
    assert any("experts" in name for name in moved) == (targets != "beside")
    for name, config in found.items():
        for expected, line in zip(lines, metrics_of(config), strict=True):
            for figure in FIGURES:
                assert line[figure] == pytest.approx(expected[figure], rel=TOLERANCE, abs=1e-6), (name, figure)
        assert values_of(config).keys() == values_of(plain).keys()
        for key, tensor in values_of(plain).items():
            assert torch.norm(values_of(config)[key] - tensor) <= TOLERANCE * torch.norm(tensor), (name, key)


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        ("mixtral", 1, 2),
        pytest.param("mixtral", 2, 2, marks=soak),
        pytest.param("mixtral", 2, 3, marks=soak),
        pytest.param("olmoe", 1, 2, marks=soak),
        pytest.param("olmoe", 2, 3, marks=soak),
    ],
)
def test_a_resumed_run_of_adapted_experts_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, saved, tiny_log, kind, world, stage
):
    def named(name: str, **changes: Any) -> Config:
        shared = {"deepspeed__zero_stage": stage, "train__max_steps": 4, "train__output": str(tmp_path / name)}
        return adapted(tmp_path, saved[kind], tiny_log, "both", **shared, **changes)

    whole, broken = named("whole"), named("broken", checkpoint__every_steps=2)
    run_ranks(train_all, world, [whole])
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, world, broken, 3)
    run_ranks(train_all, world, [broken])
    for expected, line in zip(metrics_of(whole), metrics_of(broken), strict=True):
        for name in expected.keys() - TIMED:
            assert line[name] == expected[name], (expected["step"], name)
    for name, tensor in values_of(whole).items():
        assert torch.equal(values_of(broken)[name], tensor), name


def _trained_and_evaluated(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(config), evaluate(Request(target=config.train.output))


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        ("qwen3_moe", 1, 2),
        ("olmoe", 1, 2),
        *(pytest.param(kind, 2, 3, marks=soak) for kind in ("mixtral", "qwen3_moe", "olmoe")),
    ],
)
def test_adapted_experts_load_in_peft_and_are_the_policy_merged_or_not(tmp_path, saved, tiny_log, kind, world, stage):
    shared = {"adapter__merged": True, "data__heldout": 0.3, "deepspeed__zero_stage": stage}
    config = adapted(tmp_path, saved[kind], tiny_log, "both", **shared)
    summary, found = run_ranks(_trained_and_evaluated, world, config)[0]
    after = {name: value for name, value in summary["heldout"]["after"].items() if isinstance(value, float)}
    assert {name: found["heldout"][name] for name in after} == pytest.approx(after, abs=1e-4, rel=1e-4)
    assert after["rewards/margin"] != 0

    output = Path(config.train.output)
    settings = json.loads((output / "export" / "adapter_config.json").read_text())
    assert sorted(settings["target_parameters"]) == sorted(EXPERTS)
    base = AutoModelForCausalLM.from_pretrained(saved[kind], dtype=torch.float32)
    ids = torch.arange(2, 34).view(2, 16)
    plain = base(ids).logits.detach()
    loaded = PeftModel.from_pretrained(base, str(output / "export"))
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    together, apart = merged(ids).logits, loaded(ids).logits
    assert (together - apart).abs().max() <= 1e-4 * apart.abs().max()
    assert (apart - plain).abs().max() > 1e-3 * apart.abs().max()

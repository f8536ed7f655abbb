"""Long sweeps, run by `make soak`: a run that is killed again and again ends where an undisturbed one does."""

import random
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, train_and_die_after, weights_of

from kto_dist.training.config import ADAPTER_LR

DEMO = Path(__file__).parents[1]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_again_and_again_equals_the_undisturbed_one(tmp_path, tiny_model, tiny_log, seed):
    rng = random.Random(seed)
    world = rng.choice((1, 2, 4))
    shared = {
        "deepspeed__zero_stage": rng.choice((0, 1, 2, 3)),
        "train__packing": rng.choice((True, False)),
        "train__max_steps": 12,
        "train__seed": seed,
    }
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **shared)
    broken = tiny_config(
        tmp_path,
        tiny_model,
        tiny_log,
        train__output=str(tmp_path / "broken"),
        checkpoint__every_steps=rng.choice((1, 2, 3)),
        **shared,
    )
    run_ranks(train_all, world, [whole])
    for step in sorted(rng.sample(range(1, 12), 4)):
        with pytest.raises(RuntimeError, match="died"):
            run_ranks(train_and_die_after, world, broken, step)
    run_ranks(train_all, world, [broken])
    for expected, found in zip(metrics_of(whole), metrics_of(broken), strict=True):
        assert {k: v for k, v in found.items() if k not in TIMED} == {
            k: v for k, v in expected.items() if k not in TIMED
        }
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(broken)[name], tensor), name


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_an_adapter_learns_the_demos_task_at_every_stage_as_all_weights_do(tmp_path):
    model, log = DEMO / "runs" / "demo" / "model", DEMO / "launch" / "demo" / "thumbs.jsonl"
    if not (model / "config.json").exists():
        pytest.skip("needs the demo's model: run `make demo` once")
    shared = {
        "data__heldout": 0.15,
        "data__max_length": 256,
        "objective__beta": 0.2,
        "reference__dtype": "auto",
        "reference__tokens_per_batch": 2048,
        "train__dtype": "auto",
        "train__max_steps": 40,
        "train__tokens_per_microbatch": 4096,
        "train__eps": 1e-8,
    }
    kinds = {
        "full": {"train__lr": 2e-5, "deepspeed__zero_stage": 2},
        "lora-2": {"adapter__type": "lora", "train__lr": ADAPTER_LR, "deepspeed__zero_stage": 2},
        "lora-3": {"adapter__type": "lora", "train__lr": ADAPTER_LR, "deepspeed__zero_stage": 3},
    }
    configs = [
        tiny_config(tmp_path, model, log, train__output=str(tmp_path / name), **shared, **own)
        for name, own in kinds.items()
    ]
    summaries = run_ranks(train_all, 2, configs, timeout=7000)[0]
    full, *adapted = (summary["heldout"]["after"] for summary in summaries)
    assert full["auc"] > 0.7
    for figures in adapted:
        assert figures["auc"] > full["auc"] - 0.05 and figures["loss"] < full["loss"] + 0.02
    # stages decide nothing; bf16 rounds their sums in another order
    assert adapted[0]["auc"] == pytest.approx(adapted[1]["auc"], abs=0.02)

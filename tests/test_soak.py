"""Long sweeps, run by `make soak`: a run that is killed again and again ends where an undisturbed one does."""

import random

import pytest
import torch
from ranks import run_ranks
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, train_and_die_after, weights_of


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

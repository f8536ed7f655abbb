"""A SIGTERM leaves some time: the step is saved in it, and what there was no time for is made up for."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import tiny_config, train_all
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kto_dist.base import comm, doing
from kto_dist.base.exits import Stopped
from kto_dist.training import checkpoint
from kto_dist.training.config import Config
from kto_dist.training.figures import beyond_grace
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult


def _signalled_after(config: Config, step: int) -> list[int]:
    """Steps with an evaluation when the run has stopped."""

    def signalling(result: StepResult) -> None:
        if result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, watch=signalling)
    return evaluated(config)


def evaluated(config: Config) -> list[int]:
    lines = (Path(config.train.output) / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_an_evaluation_waits_for_the_resume_where_a_signal_has_come(tmp_path, tiny_model, tiny_log):
    settings = {"data__heldout": 0.3, "evaluate__every_steps": 2, "train__max_steps": 5}
    config = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **settings)
    assert run_ranks(_signalled_after, 1, config, 2) == [[0]]
    run_ranks(train_all, 1, [config, whole])
    assert evaluated(config) == [0, 2, 4, 5]
    assert (tmp_path / "run" / "heldout.jsonl").read_text() == (tmp_path / "whole" / "heldout.jsonl").read_text()


def _signalled_while(config: Config, phase: str, rank: int) -> None:
    """SIGTERM to one rank at the first forward of a phase that follows step 2."""
    observer, steps, done = doing.Observer(), [], []

    def look(module: torch.nn.Module, arguments: object) -> None:
        # rank 0 may not have written down what this rank has done
        if not done and steps == [1, 2] and isinstance(module, LlamaDecoderLayer) and observer.place().phase == phase:
            done.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    if comm.rank() == rank:
        register_module_forward_pre_hook(look)
    with pytest.raises(Stopped, match="after step 2 of 5"):
        train(config, watch=lambda result: steps.append(result.step))


@pytest.mark.parametrize(
    ("phase", "ranks", "stage", "steps"),
    [
        ("evaluation", 2, 2, [0]),
        pytest.param("evaluation", 2, 3, [0], marks=pytest.mark.soak),
        pytest.param("answers", 1, 2, [0, 2], marks=pytest.mark.soak),
        pytest.param("answers", 2, 3, [0, 2], marks=pytest.mark.soak),
    ],
)
def test_a_signal_breaks_off_what_the_resume_can_make_up_for(
    tmp_path, tiny_model, tiny_log, phase, ranks, stage, steps
):
    settings = {
        "data__heldout": 0.5, "evaluate__every_steps": 2, "train__tokens_per_microbatch": 96,
        "deepspeed__zero_stage": stage, "answers__while_training": 2 if phase == "answers" else 0,
        "answers__max_tokens": 150,
    }  # fmt: skip
    config = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **settings)
    run_ranks(_signalled_while, ranks, config, phase, ranks - 1)
    assert evaluated(config) == steps
    assert [path.name for path in checkpoint.folder(config.train.output).iterdir()] == ["step-00000002"]
    run_ranks(train_all, ranks, [config, whole])
    assert evaluated(config) == [0, 2, 4, 5]
    assert (tmp_path / "run" / "heldout.jsonl").read_text() == (tmp_path / "whole" / "heldout.jsonl").read_text()


def test_a_step_that_takes_longer_than_there_is_time_is_said():
    assert beyond_grace(10, 15, 30) is None
    said = beyond_grace(20, 15, 30)
    assert "a step takes 20 s and its checkpoint 15 s, more than cluster.grace (30 s)" in said

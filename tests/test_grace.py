"""A SIGTERM leaves some time: the step is saved in it, and what there was no time for is made up for."""

import json
import os
import signal
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config, train_all

from kto_dist.base.exits import Stopped
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


def test_a_step_that_takes_longer_than_there_is_time_is_said():
    assert beyond_grace(10, 15, 30) is None
    said = beyond_grace(20, 15, 30)
    assert "a step takes 20 s and its checkpoint 15 s, more than cluster.grace (30 s)" in said

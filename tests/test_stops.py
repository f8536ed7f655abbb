"""A run that is told to stop before its first step, in the middle or after its last loses nothing that was trained."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.exits import Stopped
from kto_dist.training import checkpoint
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult


def _terminated_when(config: Config, there: Callable[[Config], bool], said: Path) -> None:
    """SIGTERM to this process as soon as something is there; what it writes to stderr goes to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)

    def wait_and_end() -> None:
        while not there(config):
            time.sleep(1e-3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_end, daemon=True).start()
    train(config)


def _terminated_in_the_last_evaluation(config: Config, said: Path) -> None:
    """SIGTERM when the evaluation after the last step is written, ahead of the export."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)

    def look(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith("heldout.jsonl") and last_checkpoint(config):
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(look)
    train(config)


def scored(config: Config) -> bool:
    return any(Path(config.reference.store).glob("*/*.parquet"))


def last_checkpoint(config: Config) -> bool:
    return (checkpoint.folder(config.train.output) / "step-00000005").exists()


def status_of(folder: Path) -> str:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kto").experiment_id])
    return run.info.status


def test_sigterm_before_the_first_step_says_what_it_did_and_costs_no_score(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__enabled=True)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_terminated_when, 1, config, scored, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert f"stopped by a signal before step 1: what was scored is in reference.store ({tmp_path}/store)" in said
    assert status_of(tmp_path) == "KILLED"


def test_sigterm_in_evaluation_or_export_loses_no_step(tmp_path, tiny_model, tiny_log):
    """At the default, without checkpoints on the way."""
    settings = {"data__heldout": 0.3, "tracking__enabled": True}
    config = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), data__heldout=0.3)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_terminated_in_the_last_evaluation, 1, config, tmp_path / "said")
    assert "after the last step; the same command evaluates and exports" in (tmp_path / "said").read_text()
    assert status_of(tmp_path) == "KILLED" and not (tmp_path / "run" / "summary.json").exists()
    lines = metrics_of(config)
    run_ranks(train_all, 1, [config])
    assert metrics_of(config) == lines and status_of(tmp_path) == "FINISHED"
    run_ranks(train_all, 1, [whole])
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(config)[name], tensor), name
    # once the export is there, it is what remains
    assert not checkpoint.folder(config.train.output).exists()


def _signalled_at(config: Config, step_of_signal: int, rank: int) -> tuple[int, str]:
    """SIGTERM to one rank after a step's update: all of them stop after it."""

    def signalling(result: StepResult) -> None:
        if result.step == step_of_signal and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, watch=signalling)
    except Stopped as stop:
        return stop.exit_code, str(stop)
    return 0, ""


def _signalled_when_broken(config: Config) -> tuple[int, str]:
    """SIGTERM after the first update that left no finite figures."""

    def signalling(result: StepResult) -> None:
        if not math.isfinite(result.grad_norm):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, watch=signalling)
    except Stopped as stop:
        return stop.exit_code, str(stop)
    return 0, ""


@pytest.mark.parametrize(("every", "where"), [(1, "goes on from step 1"), (None, "starts from the beginning")])
def test_sigterm_after_a_step_that_cannot_be_saved_says_from_where_the_run_goes_on(
    tmp_path, tiny_model, tiny_log, every, where
):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__lr=1e38, checkpoint__every_steps=every)
    ((status, message),) = run_ranks(_signalled_when_broken, 1, config)
    assert status == 143 and message.endswith(
        f"after step 2 of 5, whose figures are not finite: it was not saved, and the same command {where}"
    )
    saved = [path.name for path in checkpoint.folder(config.train.output).glob("step-*")]
    assert saved == ([] if every is None else ["step-00000001"])


def _terminated_after_the_export(config: Config, said: Path) -> None:
    """SIGTERM while the report is written, after the summary."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)

    def look(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith("report.html.j2"):
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(look)
    train(config)


def test_sigterm_after_the_export_says_that_the_model_is_there(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, tracking__report=True)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_terminated_after_the_export, 1, config, tmp_path / "said")
    words = (tmp_path / "said").read_text()
    assert f"stopped by a signal when the model ({tmp_path}/run/export) and summary.json were written" in words
    assert (tmp_path / "run" / "export").exists() and (tmp_path / "run" / "summary.json").exists()


def _signalled_when_the_steps_are_over(config: Config) -> tuple[int, str]:
    """SIGTERM to rank 1 while the bar of the steps is closed, which may take a while where a profile is written."""
    steps = Console.steps

    @contextmanager
    def ending(self: Console, *arguments: Any) -> Iterator[Any]:
        with steps(self, *arguments) as show:
            yield show
        if comm.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Console.steps = ending
    try:
        train(config)
    except Stopped as stop:
        return stop.exit_code, str(stop)
    return 0, ""


def test_sigterm_between_the_last_step_and_the_evaluation_is_not_forgotten(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    message = "stopped by a signal after step 2 of 2; the same command goes on from there"
    assert run_ranks(_signalled_when_the_steps_are_over, 2, config) == [(143, message)] * 2
    assert (checkpoint.folder(config.train.output) / "step-00000002").exists()


@pytest.mark.parametrize("step", (3, 5))
def test_sigterm_to_any_rank_saves_and_the_run_goes_on_from_there(tmp_path, tiny_model, tiny_log, step):
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"))
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    run_ranks(train_all, 2, [whole])
    message = f"stopped by a signal after step {step} of 5; the same command goes on from there"
    assert run_ranks(_signalled_at, 2, config, step, 1) == [(143, message)] * 2
    saved = [path.name for path in checkpoint.folder(config.train.output).iterdir() if path.is_dir()]
    assert saved == [f"step-{step:08d}"]
    run_ranks(train_all, 2, [config])
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(config)[name], tensor), name

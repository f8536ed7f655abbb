"""Training goes on while a checkpoint is written: what is committed is the step's, and before that there is none."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, weights_of

from kto_dist.base.errors import UserError
from kto_dist.model.engine_io import PutOff, writes_noted
from kto_dist.training import checkpoint, manifest
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult


def both(folder: Path, model: Path, log: Path, **settings: object) -> tuple[Config, Config]:
    """Runs that differ in this alone; the second one writes its checkpoints at once."""
    settings = {"checkpoint__every_steps": 2, "checkpoint__keep": 9, "train__max_steps": 6, **settings}
    config = tiny_config(folder, model, log, checkpoint__background=True, **settings)
    return config, tiny_config(folder, model, log, train__output=str(folder / "whole"), **settings)


def untimed(config: Config) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in metrics_of(config)]


def saved(config: Config) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(config.train.output).glob("*step-*"))


def are_alike(config: Config, whole: Config) -> None:
    assert untimed(config) == untimed(whole)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(config)[name], tensor), name


def _when_opened(name: str, do: Callable[[], None]) -> None:
    """Once, in this process, as soon as a file of that name in the checkpoint of step 2 is going to be written."""
    done: list[bool] = []

    def look(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if event == "open" else ""
        if not done and ".partial-step-00000002" in path and name in path and str(arguments[1])[:1] in "wx":
            done.append(True)
            do()

    sys.addaudithook(look)


def _goes_on_and_dies(config: Config) -> None:
    """The writer waits until a later step has been made; all is killed once its checkpoint is there."""
    seen: list[str] = []

    def wait() -> None:
        seen.append(threading.current_thread().name)
        metrics = Path(config.train.output) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:  # a line may be there in part
            time.sleep(1e-3)

    def look(result: StepResult) -> None:
        if result.step == 3:
            assert saved(config) == [".partial-step-00000002"]
        if result.step == 5:
            assert seen == ["checkpoint"] and "step-00000002" in saved(config)
            os.kill(os.getpid(), signal.SIGKILL)

    # without ZeRO one file holds the optimizer's states as well
    _when_opened("optim_states" if config.deepspeed.zero_stage else "model_states", wait)
    train(config, watch=look)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.soak)])
def test_what_is_written_later_is_the_step_that_was_copied(tmp_path, tiny_model, tiny_log, stage):
    config, whole = both(tmp_path, tiny_model, tiny_log, deepspeed__zero_stage=stage)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_goes_on_and_dies, 1, config)
    for path in checkpoint.folder(config.train.output).glob("step-*"):
        if path.name != "step-00000002":  # so that it is this one which the run goes on from
            path.rename(path.with_name(f".universal-{path.name}"))
    run_ranks(train_all, 1, [config, whole])
    are_alike(config, whole)


def _fails_and_begins_again(config: Config) -> None:
    """In one process. The first run fails while its checkpoint of step 2 is held up."""
    failing = threading.Event()

    def wait() -> None:
        failing.wait(600)
        time.sleep(1.0)  # a run that waits for nobody has left by then

    def fail(result: StepResult) -> None:
        if result.step == 3:
            failing.set()
            raise LookupError("of a watcher")

    _when_opened("optim_states", wait)
    with pytest.raises(LookupError):
        train(config, watch=fail)
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    assert saved(config) == [".partial-step-00000002"]
    train(config)


def test_a_run_that_fails_leaves_no_writer_to_the_next_one_of_its_process(tmp_path, tiny_model, tiny_log):
    config, whole = both(tmp_path, tiny_model, tiny_log, deepspeed__zero_stage=2)
    run_ranks(_fails_and_begins_again, 1, config)
    run_ranks(train_all, 1, [whole])
    are_alike(config, whole)


def _dies_when_opened(config: Config, name: str) -> None:
    _when_opened(name, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(config)


@pytest.mark.parametrize("name", ["optim_states", pytest.param("manifest.json", marks=pytest.mark.soak)])
def test_a_kill_between_copy_and_commit_leaves_the_checkpoint_before_whole(tmp_path, tiny_model, tiny_log, name):
    config, whole = both(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=1)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_dies_when_opened, 1, config, name)
    assert saved(config) == [".partial-step-00000002", "step-00000001"]
    run_ranks(train_all, 1, [config, whole])
    assert not list(checkpoint.folder(config.train.output).glob(".*"))
    are_alike(config, whole)


def _damage_on_the_way(config: Config) -> list[list[str]]:
    found: list[list[str]] = []

    def look(result: StepResult) -> None:
        if result.step == 5:
            found.append(checkpoint.damage(checkpoint.folder(config.train.output) / "step-00000002"))
            entries = manifest.read(checkpoint.folder(config.train.output) / "step-00000002")
            found.append(sorted(entries or ()))

    train(config, watch=look)
    return found


def test_two_ranks_list_all_files_of_a_checkpoint_that_threads_have_written(tmp_path, tiny_model, tiny_log):
    config, whole = both(tmp_path, tiny_model, tiny_log, deepspeed__zero_stage=2)
    (found, other), (_, plain) = run_ranks(_damage_on_the_way, 2, config), run_ranks(_damage_on_the_way, 2, whole)
    assert found == other and found[0] == [] and found[1] == plain[1] and len(found[1]) >= 6
    are_alike(config, whole)


def _refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_a_disk_that_fills_up_meanwhile_ends_the_run_with_a_sentence(small_disk, tmp_path, tiny_model, tiny_log):
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(small_disk / "run"), checkpoint__background=True,
        checkpoint__every_steps=1,
    )  # fmt: skip
    (said,) = run_ranks(_refused, 1, config)
    assert "the checkpoint of step 1 cannot be written: train.output" in said and "is full: make room" in said


class SmallMemory(io.BytesIO):
    def write(self, content: bytes) -> int:
        if self.tell() + len(content) > 4000:
            raise MemoryError
        return super().write(content)


class TorchCheckpointEngine:
    """As DeepSpeed's."""

    def __init__(self, zipped: bool) -> None:
        self.zipped = zipped

    def save(self, state_dict: object, path: object) -> None:
        torch.save(state_dict, path, _use_new_zipfile_serialization=self.zipped)

    def makedirs(self) -> None: ...


@pytest.mark.parametrize("zipped", [True, False])
def test_what_memory_has_no_room_for_is_written_at_once(tmp_path, monkeypatch, zipped):
    writer, put_off = TorchCheckpointEngine(zipped), list[PutOff]()
    small, large = {"a": torch.ones(10)}, {"a": torch.ones(10_000)}
    monkeypatch.setattr(io, "BytesIO", SmallMemory)
    with writes_noted(SimpleNamespace(checkpoint_engine=writer), put_off) as failures:
        writer.save(small, str(tmp_path / "small.pt"))
        writer.save(large, str(tmp_path / "large.pt"))
    assert failures == [] and [file.path.name for file in put_off] == ["small.pt"]
    assert torch.equal(torch.load(tmp_path / "large.pt")["a"], large["a"])


def _steps_of_an_hour(config: Config) -> str:
    """By the clock, from the moment that the first checkpoint is written."""
    clock, passed = time.monotonic, [0.0]
    time.monotonic = lambda: clock() + passed[0]

    def look(result: StepResult) -> None:
        if result.step > 2:
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                time.sleep(1e-3)
            passed[0] += 3600.0

    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, watch=look)
    return said.getvalue()


def test_a_checkpoint_is_not_said_to_take_as_long_as_the_step_beside_it(tmp_path, tiny_model, tiny_log):
    config, _ = both(tmp_path, tiny_model, tiny_log, cluster__grace=1800.0, train__max_steps=4)
    (said,) = run_ranks(_steps_of_an_hour, 1, config)
    assert "tokens/s" in said and "cluster.grace" not in said

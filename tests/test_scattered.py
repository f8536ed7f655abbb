"""Hosts without a shared file system: each has its own part of a checkpoint, and goes on from it.

Ranks stand for hosts: each is local rank 0 of its own, and works in a folder of its own, where the same config's
relative paths lead elsewhere.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import tiny_config, weights_of

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.record.run_folder import read_lines
from kto_dist.training import checkpoint, scattered
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult


def on_hosts(folder: Path, ranks_each: int = 1) -> str:
    """Which host this rank is on from now on."""
    host = f"node-{'abcd'[comm.rank() // ranks_each]}"
    os.environ.update(LOCAL_RANK=str(comm.rank() % ranks_each), KTO_DIST_HOST=host)
    (folder / host).mkdir(exist_ok=True)
    os.chdir(folder / host)
    return host


def local_config(model: Path, log: Path, **changes: object) -> Config:
    settings = {"checkpoint__every_steps": 2, "checkpoint__keep": 9, **changes}
    return tiny_config(Path(), model, log, **settings)


def forget_after(step: int, config: Config) -> None:
    """This host was killed when the checkpoint of `step` was its newest."""
    output = Path(config.train.output)
    for path in checkpoint.folder(output).glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (output / "summary.json").unlink(missing_ok=True)
    shutil.rmtree(output / "export", ignore_errors=True)


def _resumed(folder: Path, config: Config) -> list[bool]:
    """Whether the weights of a run that goes on from its second step are those of the run that did not stop."""
    on_hosts(folder)
    train(config)
    whole = weights_of(config) if comm.is_main() else {}
    comm.barrier()
    forget_after(2, config)
    comm.barrier()
    train(config)
    again = weights_of(config) if comm.is_main() else {}
    return [torch.equal(again[name], tensor) for name, tensor in whole.items()]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.soak), 2, 3])
def test_every_stage_goes_on_from_the_parts_of_its_hosts_to_the_bit(tmp_path, tiny_model, tiny_log, stage):
    same, nothing = run_ranks(
        _resumed, 2, tmp_path, local_config(tiny_model, tiny_log, deepspeed__zero_stage=stage, train__max_steps=4)
    )
    assert same and all(same) and nothing == []
    assert not (tmp_path / "node-b" / "run" / "metrics.jsonl").exists()


def _trained_and_lost(folder: Path, config: Config, loses: str) -> str:
    host = on_hosts(folder)
    train(config)
    comm.barrier()
    if host == loses:
        shutil.rmtree("run")
    else:
        forget_after(2, config)
    comm.barrier()
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("loses", [pytest.param("node-a", marks=pytest.mark.soak), "node-b"])
def test_a_host_whose_disk_is_lost_is_named_and_nothing_begins_anew(tmp_path, tiny_model, tiny_log, loses):
    said, _ = run_ranks(_trained_and_lost, 2, tmp_path, local_config(tiny_model, tiny_log, train__max_steps=4), loses)
    rank, other = ("0", "node-b (rank 1)") if loses == "node-a" else ("1", "node-a (rank 0)")
    assert f"{other}: step-00000002" in said and f"{loses} (rank {rank}) has none: bring back the folder" in said
    if loses == "node-b":
        assert len((tmp_path / "node-a" / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def _keeps(folder: Path, config: Config) -> list[str]:
    """Node b was killed before it gave the newest checkpoint its name; one is kept."""
    host = on_hosts(folder)
    train(config)
    comm.barrier()
    forget_after(4 if host == "node-a" else 2, config)
    comm.barrier()
    kept: list[str] = []

    def look(result: StepResult) -> None:
        if result.step == 4:
            kept.extend(sorted(path.name for path in checkpoint.folder(config.train.output).iterdir()))

    saving = config.checkpoint.model_copy(update={"keep": 1, "every_steps": 3})
    train(config.model_copy(update={"checkpoint": saving}), watch=look)
    return kept


def test_the_newest_checkpoint_that_all_hosts_have_counts_and_later_ones_push_no_new_one_out(
    tmp_path, tiny_model, tiny_log
):
    config = local_config(tiny_model, tiny_log, train__max_steps=5)
    assert run_ranks(_keeps, 2, tmp_path, config) == [["step-00000003"]] * 2


def _more_ranks(folder: Path, config: Config, ranks_each: int) -> list[str]:
    """What is left half-written on this rank's host."""
    on_hosts(folder, ranks_each)
    if ranks_each == 2 and comm.local_rank() == 0:
        forget_after(2, config)
    comm.barrier()
    train(config)
    comm.barrier()
    return sorted(path.name for path in checkpoint.folder(config.train.output).glob(".*"))


@pytest.mark.soak
def test_another_number_of_ranks_goes_on_from_the_parts_of_all_hosts(tmp_path, tiny_model, tiny_log):
    config = local_config(tiny_model, tiny_log, deepspeed__zero_stage=2, train__max_steps=4)
    run = tmp_path / "node-a" / "run"
    run_ranks(_more_ranks, 2, tmp_path, config, 1)
    whole = load_file(run / "export" / "model.safetensors")
    assert run_ranks(_more_ranks, 4, tmp_path, config, 2) == [[]] * 4
    again = load_file(run / "export" / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def _fewer(folder: Path, config: Config) -> str:
    on_hosts(folder)
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


def test_a_part_that_lies_on_no_host_of_the_job_is_named(tmp_path, tiny_model, tiny_log):
    config = local_config(tiny_model, tiny_log, deepspeed__zero_stage=1, train__max_steps=4)
    run_ranks(_more_ranks, 2, tmp_path, config, 1)
    output = tmp_path / "node-a" / "run"
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    (said,) = run_ranks(_fewer, 1, tmp_path, config)
    assert "was written by 2 ranks, and the parts of ranks 1 lie on none of this job's hosts" in said


def _scattered(folder: Path) -> list[tuple[str, bytes]]:
    host = on_hosts(folder)
    Path("part").mkdir()
    Path("part", "both").write_bytes(b"same")
    if host == "node-b":
        Path("part", "inner").mkdir()
        Path("part", "inner", "large").write_bytes(bytes(range(256)) * 300_000)  # more than a piece
        Path("part", "empty").write_bytes(b"")
    comm.barrier()
    scattered.bring_together(Path("part"), Path("whole"))
    scattered.hand_out(Path("whole"))
    return sorted(
        (str(path.relative_to("whole")), path.read_bytes()) for path in Path("whole").rglob("*") if path.is_file()
    )


def _without_links(folder: Path) -> list[tuple[str, bytes]]:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    os.link = refuse
    return _scattered(folder)


@pytest.mark.parametrize("work", (_scattered, _without_links))
def test_files_of_all_hosts_come_together_and_are_handed_out_as_they_are(tmp_path, work):
    expected = [("both", b"same"), ("empty", b""), ("inner/large", bytes(range(256)) * 300_000)]
    assert run_ranks(work, 2, tmp_path) == [expected] * 2

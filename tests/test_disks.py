"""A disk that fills up, or turns read-only, in the middle of a run: one sentence, and the next start goes on."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_disk import mounted, remount
from tiny_runs import metrics_of, tiny_config, train_all

from kto_dist.base import agree, comm, disks
from kto_dist.base.errors import UserError
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult


@pytest.mark.parametrize("world", (1, 2))
def test_a_checkpoint_that_does_not_fit_is_a_message_and_the_next_start_goes_on(tmp_path, tiny_model, tiny_log, world):
    with mounted(tmp_path / "disk", "1m") as disk:
        output = disk / "run"
        config = tiny_config(
            tmp_path, tiny_model, tiny_log, train__output=str(output), checkpoint__every_steps=2, checkpoint__keep=1
        )
        with pytest.raises(UserError, match=r"the checkpoint of step 2 cannot be written: .* is full: make room"):
            run_ranks(train_all, world, [config])
        assert [path.name for path in (output / "checkpoints").glob("*step*")] == [".partial-step-00000002"]
        remount(disk, "size=64m")
        run_ranks(train_all, world, [config])
        assert len(metrics_of(config)) == 5
        assert [path.name for path in (output / "checkpoints").glob("*step*")] == ["step-00000005"]


def _one_file_does_not_fit(config: Config) -> None:
    """In a process of its own: what is written after it does."""
    save = torch.save

    def refuse(content: object, path: object, **settings: object) -> None:
        if "optim_states" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path, **settings)

    torch.save = refuse
    train(config)


def test_a_checkpoint_of_which_one_file_did_not_fit_is_none(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    with pytest.raises(UserError, match=r"the checkpoint of step 5 cannot be written: .* is full: make room"):
        run_ranks(_one_file_does_not_fit, 1, config)
    assert not list((Path(config.train.output) / "checkpoints").glob("step-*"))


def _full_from(config: Config, disk: Path, step: int) -> None:
    def fill(result: StepResult) -> None:
        if result.step == step:
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)

    train(config, watch=fill)


def test_a_disk_that_is_full_in_mid_run_is_a_message_with_the_step_and_the_remedy(tmp_path, tiny_model, tiny_log):
    # long lines: a file's last block has room
    with mounted(tmp_path / "disk", "1m") as disk:
        config = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(disk / "run"), train__max_steps=40)
        with pytest.raises(UserError, match=r"the line of step \d+ cannot be written: .* is full: make"):
            run_ranks(_full_from, 1, config, disk, 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(30, "Read-only file system"), "is read-only: make it writable"),
        (OSError(122, "Disk quota exceeded"), "is full: make room"),
        (OSError(122, "as a library that has words of its own puts it"), "is full: make room"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "is full: make room"),
        (RuntimeError("open file failed with strerror: Read-only file system"), "is read-only"),
        (RuntimeError("another rank failed: [Errno 28] No space left on device"), "is full"),
        (OSError(5, "Input/output error"), "fails: check the disk"),
    ],
)
def test_what_a_disk_refuses_is_told_however_a_library_words_it(tmp_path, error, said):
    message = rf"the checkpoint cannot be written: train.output \({tmp_path}\) {said}"
    with pytest.raises(UserError, match=message), disks.refusals("the checkpoint", "train.output", tmp_path):
        raise error


def _one_host_is_full(folder: Path) -> list[str]:
    """Ranks stand for hosts, and the second one's disk is full. What is said where the disk's words are made into a
    sentence after all have heard of it, and before."""
    rank = comm.rank()
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", KTO_DIST_HOST=f"node-{rank}")

    def write() -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write_and_say() -> None:
        with disks.refusals("the checkpoint", "train.output", folder):
            write()

    with pytest.raises(UserError) as after, disks.refusals("the checkpoint", "train.output", folder):
        agree.side_by_side(write)
    with pytest.raises(UserError) as before:
        agree.side_by_side(write_and_say)
    return [str(after.value), str(before.value)]


def test_of_several_hosts_the_one_whose_disk_it_is_is_named_on_all_and_once(tmp_path):
    ranks = run_ranks(_one_host_is_full, 2, tmp_path)
    (said,) = {text for texts in ranks for text in texts}
    assert f"train.output ({tmp_path}) on node-1 is full: make room" in said and said.count("node-1") == 1


def test_an_error_of_another_kind_is_left_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), disks.refusals("the checkpoint", "train.output", tmp_path):
        raise RuntimeError("shapes differ")


def test_what_killed_runs_left_half_written_goes_and_what_is_a_users_stays(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, checkpoint__every_steps=1)
    run = tmp_path / "run"
    litter = [".partial-export/x", "checkpoints/.partial-step-00000002/x", "checkpoints/.universal-step-00000002/x"]
    litter += [f".metrics.jsonl.{'0' * 32}", ".done-abc", f"checkpoints/.seen-{'0' * 32}"]
    kept = [".notes", "notes.txt", "checkpoints/notes.txt", ".partial"]
    for name in (*litter, *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    run_ranks(train_all, 1, [config])
    assert not [name for name in litter if (run / name).exists()]
    assert all((run / name).exists() for name in kept)

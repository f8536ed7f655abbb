"""What stands in a checkpoint is what was written, to the last byte; and nothing in it is code that runs."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.training import checkpoint, manifest
from kto_dist.training.config import Config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path) -> Config:
    """Five steps of two ranks, with checkpoints of the last two."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, tiny_model, tiny_log, checkpoint__every_steps=1)
    run_ranks(train_all, 2, [config])
    return config


@pytest.fixture
def copy(tmp_path: Path, finished: Config) -> Config:
    """The same run, not yet exported, in a folder of its own."""
    train = finished.train.model_copy(update={"output": str(tmp_path / "run")})
    shutil.copytree(finished.train.output, train.output)
    (tmp_path / "run" / "summary.json").unlink()
    return finished.model_copy(update={"train": train})


def newest(config: Config) -> Path:
    return checkpoint.folder(config.train.output) / "step-00000005"


def found(config: Config) -> tuple[str | None, list[str]]:
    said: list[str] = []
    path = checkpoint.find(config.train.output, said.append)
    return path and path.name, said


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_found_and_the_one_before_counts(copy):
    assert found(copy) == ("step-00000005", [])
    files = [path for path in sorted(newest(copy).rglob("*")) if path.is_file()]
    assert {"manifest.json", "state.json", "rng-rank-1.safetensors"} < {path.name for path in files}
    for file in files:
        whole = file.read_bytes()
        for place in (0.0, 0.3, 0.999):
            flip(file, place)
            name, said = found(copy)
            assert name == "step-00000004", (file, place)
            assert len(said) == 1 and "step-00000005 is damaged: " in said[0] and file.name in said[0]
            file.write_bytes(whole)


@pytest.mark.parametrize("damage", ("another step", "a file more", "a file less", "a shorter file", "no manifest"))
def test_a_checkpoint_that_was_changed_is_passed_over(copy, damage):
    folder = newest(copy)
    state = folder / "state.json"
    if damage == "another step":
        state.write_text(state.read_text().replace('"step": 5', '"step": 2'))
    elif damage == "a file more":
        (folder / "zero_pp_rank_9_mp_rank_00_optim_states.pt").write_bytes(b"more")
    elif damage == "a file less":
        (folder / "rng-rank-0.safetensors").unlink()
    elif damage == "a shorter file":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        (folder / "manifest.json").unlink()
    name, said = found(copy)
    assert name == "step-00000004" and len(said) == 1


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_end(copy, finished):
    flip(max(newest(copy).iterdir(), key=lambda file: file.stat().st_size), 0.5)
    run_ranks(train_all, 2, [copy])
    assert [line["step"] for line in metrics_of(copy)] == [1, 2, 3, 4, 5]
    for name, tensor in weights_of(finished).items():
        assert torch.equal(weights_of(copy)[name], tensor), name
    assert found(copy) == ("step-00000005", [])


def test_a_run_without_a_whole_checkpoint_is_refused_and_loses_nothing(copy):
    for folder in checkpoint.folder(copy.train.output).glob("step-*"):
        flip(folder / "state.json", 0.5)
    lines = metrics_of(copy)
    with pytest.raises(UserError, match=r"holds no whole checkpoint: .*step-00000005 is damaged.*Put a copy"):
        run_ranks(train_all, 2, [copy])
    assert metrics_of(copy) == lines


@pytest.mark.parametrize("junk", (b"\xff\xfe{", b"[]", b'{"loss": 1}', b""))
def test_a_damaged_line_of_metrics_stops_no_run_and_costs_that_line_alone(copy, junk):
    metrics = Path(copy.train.output) / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    lines[1] = junk
    metrics.write_bytes(b"\n".join(lines) + b"\n")
    run_ranks(train_all, 2, [copy])
    assert [line["step"] for line in metrics_of(copy)] == [1, 3, 4, 5]


def _as_one_host_each(root: Path, flipped: int | None) -> list[str]:
    os.environ["LOCAL_RANK"] = "0"
    rank = os.environ["RANK"]
    folder = root / rank / "step"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (folder / name).write_bytes(os.urandom(1000) + rank.encode())
    manifest.write(folder)
    if flipped == int(rank):
        flip(folder / "deep" / "c", 0.5)
    return manifest.damage(folder)


@pytest.mark.parametrize("flipped", (None, 0, 1))
def test_hosts_without_a_shared_disk_check_their_own_files_and_hear_of_each_others_damage(tmp_path, flipped):
    expected = [] if flipped is None else ["c has other bytes than were written"]
    assert run_ranks(_as_one_host_each, 2, tmp_path, flipped) == [expected] * 2


def _share_of_one_folder(folder: Path) -> tuple[list[str], list[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / os.environ["RANK"]).write_bytes(os.urandom(1000))
    from kto_dist.base import comm

    comm.barrier()
    manifest.write(folder)
    before = manifest.damage(folder)
    comm.barrier()
    if comm.is_main():
        flip(folder / "2", 0.5)
    comm.barrier()
    return before, manifest.damage(folder)


def test_ranks_that_share_a_folder_find_what_any_of_them_reads(tmp_path):
    folder = tmp_path / "root" / "step"
    assert run_ranks(_share_of_one_folder, 3, folder) == [([], ["2 has other bytes than were written"])] * 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step"]


class Writing:
    """A policy whose checkpoint is a file a rank."""

    def save(self, root: Path, tag: str, *, first: bool | None, put_off: Any) -> None:
        (root / tag / f"part-{comm.rank()}").write_text(str(comm.rank()))


def _saved_by_a_host_with_an_old_view(output: Path) -> str:
    """Ranks stand for hosts of a shared file system, and rank 1 sees folders that were renamed where they were."""
    os.environ["LOCAL_RANK"] = "0"
    exists = Path.exists

    def there(path: Path, *arguments: Any, **named: Any) -> bool:
        return (comm.rank() == 1 and path.name.startswith(".partial-")) or exists(path, *arguments, **named)

    Path.exists = there
    try:
        state = checkpoint.State(step=2, world_size=2, zero_stage=2, identity={}, mlflow_run=None)
        found = checkpoint.save(Writing(), output, state, keep=1)
    finally:
        Path.exists = exists
    return ", ".join(checkpoint.damage(found))


def test_a_host_that_sees_an_older_state_of_a_shared_disk_takes_no_finished_checkpoint_away(tmp_path):
    """On NFS another host saw for half a minute what was no longer there, removed the checkpoint to make room for it,
    and failed."""
    assert run_ranks(_saved_by_a_host_with_an_old_view, 2, tmp_path) == ["", ""]
    (folder,) = checkpoint.folder(tmp_path).iterdir()
    names = {"manifest.json", "part-0", "part-1", "rng-rank-0.safetensors", "rng-rank-1.safetensors", "state.json"}
    assert {path.name for path in folder.iterdir()} == names


class Bomb:
    """What a pickle can do to who loads it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("world", (2, pytest.param(1, marks=pytest.mark.soak)))
@pytest.mark.parametrize("kind", ("mp_rank", "optim_states"))
def test_code_in_a_checkpoint_does_not_run(copy, tmp_path, kind, world):
    """Also where a checkpoint is cut anew, for one rank in place of two."""
    mark = tmp_path / "ran"
    for file in newest(copy).glob(f"*{kind}*"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "bomb": Bomb(mark)}, file)
    (newest(copy) / "manifest.json").unlink()
    manifest.write(newest(copy))
    with pytest.raises(UserError, match="holds something else than tensors and numbers|could not be re-cut"):
        run_ranks(train_all, world, [copy])
    assert not mark.exists()


def _made_older(folder: Path, bomb: Bomb | None = None) -> None:
    """As a version wrote it that knew neither checksums nor settings."""
    (folder / "manifest.json").unlink()
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": bomb,
    }
    for file in folder.glob("rng-rank-*.safetensors"):
        torch.save(states, file.with_suffix(".pt"))
        file.unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["settings"]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "state.json"}
    (folder / "state.json").write_text(json.dumps({**state, "files": sizes}))


def test_a_checkpoint_of_an_older_version_is_read_as_far_as_it_can_be_checked(copy):
    for folder in checkpoint.folder(copy.train.output).glob("step-*"):
        _made_older(folder)
    assert found(copy) == ("step-00000005", [])
    summary = run_ranks(train_all, 2, [copy])[0][0]
    assert summary["tokens"] == 0  # nothing was left to do
    file = newest(copy) / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert found(copy)[0] == "step-00000004"


def test_code_in_the_random_states_of_an_older_version_does_not_run(copy, tmp_path):
    mark = tmp_path / "ran"
    _made_older(newest(copy), Bomb(mark))
    with pytest.raises(pickle.UnpicklingError):
        run_ranks(train_all, 2, [copy])
    assert not mark.exists()

"""What fails on one rank alone ends all of them with one sentence, also where no command watches over the ranks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.checkpoint.ds_to_universal import dp_index_to_str
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.model.engines import Policy
from kto_dist.training import checkpoint
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult

SECONDS = 200
"""Far less than ranks wait for one that has gone."""


def _with_a_folder_in_its_place(config: Config, name: str) -> str:
    """What a run is refused with when rank 0 finds a folder where it writes a file, from step 2 on."""

    def put(result: StepResult) -> None:
        if result.step == 2 and comm.is_main():
            path = Path(config.train.output) / name
            path.unlink(missing_ok=True)
            path.mkdir()

    with pytest.raises(UserError) as caught:
        train(config, watch=put)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("metrics.jsonl", "the line of step 3"),
        ("health.jsonl", "the line of step 3"),
        ("heldout.jsonl", "the line of step 3"),
        ("heldout-rows.npz", "the held-out rows of step 3"),
    ],
)
def test_what_rank_0_cannot_write_ends_all_ranks_with_one_sentence(tmp_path, tiny_model, tiny_log, name, what):
    config = tiny_config(
        tmp_path,
        tiny_model,
        tiny_log,
        data__heldout=0.2,
        evaluate__every_steps=3,
        health__max_kl=1e-9,
        health__on_trouble="warn",
    )
    first, second = run_ranks(_with_a_folder_in_its_place, 2, config, name, timeout=SECONDS)
    output = config.train.output
    assert first.startswith(f"{what} cannot be written: train.output ({output}) fails: check the disk")
    assert "Is a directory" in first and second == first


def _stopped_after(config: Config, step: int) -> None:
    def stop(result: StepResult) -> None:
        if result.step == step:
            raise KeyError(step)

    with pytest.raises(KeyError):
        train(config, watch=stop)


def _unreadable(config: Config, rank: int, name: str) -> str:
    """What a run is refused with when the disk gives one rank an error for a file of its checkpoint."""
    load = torch.load

    def try_to(file: str | Path, *arguments, **named):
        if comm.rank() == rank and name in str(file):
            raise OSError(5, "Input/output error", str(file))
        return load(file, *arguments, **named)

    torch.load = try_to
    with pytest.raises(UserError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "name"), [(2, "model_states"), (3, "optim_states")])
def test_a_checkpoint_that_one_rank_cannot_read_ends_all_ranks_with_one_sentence(
    tmp_path, tiny_model, tiny_log, stage, name
):
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, deepspeed__zero_stage=stage, checkpoint__every_steps=2, train__max_steps=4
    )
    run_ranks(_stopped_after, 2, config, 3)  # whose checkpoint is not written yet
    first, second = run_ranks(_unreadable, 2, config, 1, name, timeout=SECONDS)
    folder = Path(config.train.output) / "checkpoints" / "step-00000002"
    assert first.startswith(f"the checkpoint {folder} cannot be read: [Errno 5] Input/output error") and name in first
    assert "check the disk" in first and second == first


def test_ranks_that_read_their_checkpoint_in_turn_hear_of_the_one_that_cannot(tmp_path, tiny_model, tiny_log):
    """DeepSpeed lets each wait for the word of the one before it."""
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"zero_optimization": {"pipeline_loading_checkpoint": True}}))
    settings = {"deepspeed__zero_stage": 3, "checkpoint__every_steps": 2, "train__max_steps": 4}
    config = tiny_config(tmp_path, tiny_model, tiny_log, deepspeed__config=str(options), **settings)
    run_ranks(_stopped_after, 2, config, 3)
    first, second = run_ranks(_unreadable, 2, config, 0, "optim_states", timeout=SECONDS)
    assert "cannot be read: [Errno 5] Input/output error" in first and second == first
    run_ranks(train_all, 2, [config])
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4]


class SwappingEngine:
    """DeepSpeed's, as far as a save asks one whose optimizer lies on a disk; swapping itself needs libaio."""

    def __init__(self, swapped: Path):
        self.checkpoint_engine = SimpleNamespace(save=None, makedirs=None)
        self.optimizer = SimpleNamespace(optimizer_swapper=SimpleNamespace(swap_folder=str(swapped)))
        self.global_rank = comm.rank()

    def zero_nvme_offload_optimizer(self) -> bool:
        return True

    def use_node_local_storage(self) -> bool:
        return False

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        if self.zero_nvme_offload_optimizer():
            shutil.copytree(self.optimizer.optimizer_swapper.swap_folder, Path(folder) / tag / str(comm.rank()))
        comm.barrier()


def _saved(output: Path, swapped: Path) -> str:
    policy = Policy.__new__(Policy)
    policy.adapted = False
    policy.engine = SwappingEngine(swapped / str(comm.rank()))
    state = checkpoint.State(step=2, world_size=2, zero_stage=3, identity={}, mlflow_run=None)
    try:
        checkpoint.save(policy, output, state, keep=1)
    except UserError as error:
        return str(error)
    return ""


def _swap_folders(folder: Path) -> Path:
    for rank in range(2):
        (folder / str(rank)).mkdir(parents=True)
        (folder / str(rank) / "moment.swp").write_text(str(rank))
        (folder / str(rank) / "gradient.swp").write_text("")
    return folder


def test_swapped_states_lie_in_a_checkpoint_where_deepspeed_looks_for_them(tmp_path):
    swapped = _swap_folders(tmp_path / "swap")
    assert run_ranks(_saved, 2, tmp_path, swapped, timeout=SECONDS) == ["", ""]
    found = tmp_path / "checkpoints" / "step-00000002" / "offloaded_tensors"
    files = {str(path.relative_to(found)): path.read_text() for path in found.rglob("*.swp")}
    assert files == {f"rank{dp_index_to_str(rank)}/moment.swp": str(rank) for rank in range(2)}


def test_swapped_states_that_one_rank_cannot_copy_end_all_ranks_with_one_sentence(tmp_path):
    swapped = _swap_folders(tmp_path / "swap")
    shutil.rmtree(swapped / "1")
    first, second = run_ranks(_saved, 2, tmp_path, swapped, timeout=SECONDS)
    place = tmp_path / "checkpoints"
    assert first.startswith(f"the checkpoint of step 2 cannot be written: train.output ({place}) fails: check the disk")
    assert second == first and not (place / "step-00000002").exists()

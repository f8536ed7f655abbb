"""What a resumed run may change, and what it says of it."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import tiny_config, train_all, weights_of

from kto_dist.base.errors import UserError
from kto_dist.training.checkpoint import APPLIED
from kto_dist.training.config import Config, TrainConfig
from kto_dist.training.loop import train

CHANGED = {
    "lr": 1e-2,
    "schedule": "constant",
    "warmup": 5.0,
    "betas": [0.5, 0.9],
    "eps": 1e-2,
    "weight_decay": 0.5,
    "clip": 1e-3,
}
# These are a run's identity, decide where it ends, or change nothing but rounding and what is written.
IDENTITY = {"global_batch", "seed", "dtype"}
END = {"epochs", "max_steps", "stop_after"}
ROUNDING = {"tokens_per_microbatch", "packing", "logits_mebibytes", "logits_dtype", "deterministic"}
ASIDE = {"output", "profile"}


def test_every_setting_of_the_steps_is_decided():
    assert set(TrainConfig.model_fields) == set(APPLIED) | IDENTITY | END | ROUNDING | ASIDE
    assert set(APPLIED) == set(CHANGED)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path) -> Config:
    """Three of five steps are done, and their checkpoint lies there."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_config(folder, tiny_model, tiny_log, checkpoint__every_steps=3)
    run_ranks(train_all, 1, [config])
    output = Path(config.train.output)
    shutil.rmtree(output / "checkpoints" / "step-00000005")
    (output / "summary.json").unlink()
    return config


def again(stopped: Config, folder: Path, name: str, **changes: object) -> Config:
    """The same run in a folder of its own, with other settings of `train`."""
    output = folder / name
    shutil.copytree(stopped.train.output, output)
    train = TrainConfig(**{**stopped.train.model_dump(), **changes, "output": str(output)})
    return stopped.model_copy(update={"train": train})


def _said(configs: list[Config]) -> list[str]:
    texts = []
    for config in configs:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train(config)
        texts.append(" ".join(said.getvalue().split()))
    return texts


def test_a_changed_setting_is_applied_from_the_checkpoint_on_and_said(tmp_path, stopped):
    configs = {name: again(stopped, tmp_path, name, **{name: value}) for name, value in CHANGED.items()}
    plain = again(stopped, tmp_path, "plain")
    (texts,) = run_ranks(_said, 1, [plain, *configs.values()])
    assert "other settings" not in texts[0]
    for (name, config), text in zip(configs.items(), texts[1:], strict=True):
        before = stopped.train.model_dump(mode="json")[name]
        assert f"other settings from step 4 on: train.{name} is {CHANGED[name]!r} (was {before!r})" in text
        same = [torch.equal(weights_of(config)[key], tensor) for key, tensor in weights_of(plain).items()]
        assert not all(same), name


def test_more_steps_are_said_since_they_change_the_schedule(tmp_path, stopped):
    (texts,) = run_ranks(_said, 1, [again(stopped, tmp_path, "more", max_steps=6)])
    assert "steps is 6 (was 5)" in texts[0]


def test_fewer_steps_than_are_done_are_refused(tmp_path, stopped):
    with pytest.raises(
        UserError, match=r"this run has 2 steps, and the checkpoint in train.output .* has done 3: raise"
    ):
        run_ranks(train_all, 1, [again(stopped, tmp_path, "fewer", max_steps=2)])

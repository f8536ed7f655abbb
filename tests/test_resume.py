"""What a resumed run may change, and what it says of it."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import tiny_config, train_all, weights_of

from kto_dist.base.config import sections
from kto_dist.base.errors import UserError
from kto_dist.training import resume
from kto_dist.training.checkpoint import State
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


OTHER = {
    **{f"train.{name}": value for name, value in CHANGED.items()},
    "train.tokens_per_microbatch": 512,
    "train.packing": False,
    "train.logits_mebibytes": 64,
    "train.logits_dtype": "bf16",
    "train.deterministic": True,
    "train.seed": 7,
    "train.global_batch": 8,
    "deepspeed.zero_stage": 3,
    "deepspeed.offload_optimizer": "cpu",
    "deepspeed.config": "made by the test",
    "adapter.type": "lora",
    "reference.quantization": "nf4",
    "model.attention": "eager",
    "model.kernels": "none",
    "model.gradient_checkpointing": True,
    "objective.loss": "apo_zero_unpaired",
    "objective.beta": 0.3,
    "objective.desirable_weight": 1.5,
    "objective.undesirable_weight": 1.5,
    "objective.kl_pairs_per_step": 4,
    "objective.sft_weight": 0.5,
    "objective.router_loss": 0.5,
    "reference.device": "cpu",
    "reference.dtype": "bf16",
    "reference.attention": "eager",
    "reference.kernels": "none",
    "reference.zero_stage": 3,
    "reference.offload": "cpu",
    "reference.tokens_per_batch": 999,
    "reference.packing": False,
    "reference.share_prefixes": False,
    "reference.logits_mebibytes": 64,
    "reference.logits_dtype": "fp32",
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 5,
    "checkpoint.background": True,
    "evaluate.every_steps": 2,
    "evaluate.tokens": 500,
    "health.max_kl": None,
    "health.patience": 9,
    "health.on_trouble": "warn",
    "health.rules": ["mine.py:rule"],
    "data.slices": ["topic"],
    "train.output": "elsewhere",
    "train.profile": True,
    "data.workers": 3,
    "data.cache": "elsewhere",
    "reference.store": "elsewhere",
    "checkpoint.resume": True,
    "reference.nvme_path": "elsewhere",
    "deepspeed.nvme_path": "elsewhere",
    "model.trust_remote_code": True,
    "tracking.enabled": True,
    "tracking.uri": "http://elsewhere",
    "tracking.experiment": "other",
    "tracking.report": True,
    "tracking.run_name": "other",
    "tracking.log_model": True,
    "answers.while_training": 3,
    "answers.in_evaluate": 3,
    "answers.max_tokens": 7,
    "answers.temperature": 0.5,
    "answers.top_p": 0.5,
    "answers.batch": 3,
    "answers.cache": "elsewhere",
    "answers.model_url": "http://elsewhere",
    "answers.reference_url": "http://elsewhere",
    "answers.key": "OTHER_KEY",
    "judge.instructions": "other words",
    "judge.max_tokens": 7,
    "judge.parallel": 7,
    "judge.key": "OTHER_KEY",
    "judge.cache": "elsewhere",
    "cluster.timeout": 60.0,
    "cluster.grace": 60.0,
    "cluster.min_nodes": 2,
}
"""Another valid value of each setting that can change alone."""
NOT_ALONE = {
    # part of the run by the dtype that was picked, or asking for other settings as well
    "train.dtype",
    "deepspeed.offload_parameters",
    "objective.pairs",
    "objective.label_smoothing",
    "reference.trust_remote_code",
    "tracking.register_as",
    "checkpoint.best",
    "train.stop_after",
    # one needs another
    *("answers.model_name", "answers.reference_name", "answers.every_steps"),
    *(f"judge.{name}" for name in ("by", "function", "command", "base_url", "model")),
    # of an adapter alone: tests/test_adapter_runs.py
    "adapter.rank",
    "model.quantization",
    "adapter.alpha",
    "adapter.targets",
    "adapter.merged",
    # by the fingerprint of the held-out rows
    "data.heldout",
}


def test_every_setting_of_a_run_is_decided():
    groups = [resume.BY_CONTENT, resume.REFUSED, resume.END, resume.APPLIED, resume.ASIDE]
    every = {f"{name}.{key}" for name, section in sections(Config).items() for key in section.model_fields}
    assert set().union(*groups) == every and sum(map(len, groups)) == len(every)
    assert every == set(OTHER) | NOT_ALONE | resume.BY_CONTENT | resume.END


def test_a_changed_setting_is_refused_said_or_set_aside_as_decided(tmp_path, tiny_model, tiny_log):
    (tmp_path / "ds.json").write_text("{}")

    def state_of(config: Config, heldout: str | None = None) -> State:
        named = {"data": "rows", "policy": "weights", "reference": None, "dtype": torch.float32}
        asked = config.objective.router_loss
        named["router_loss"] = 0.0 if asked == "auto" else asked
        identity = resume.identity(config, zero_stage=config.deepspeed.zero_stage, **named)
        settings = resume.settings_of(config, steps=5, heldout=heldout)
        return State(step=3, world_size=1, zero_stage=2, identity=identity, mlflow_run=None, settings=settings)

    config = tiny_config(tmp_path, tiny_model, tiny_log)
    before = state_of(config)
    assert resume.changes(before, state_of(config, "other rows")) == ["data.heldout is 'other rows' (was None)"]
    for name, value in OTHER.items():
        value = str(tmp_path / "ds.json") if name == "deepspeed.config" else value
        changed = {"deepspeed__config": None} | {name.replace(".", "__"): value}
        now = state_of(tiny_config(tmp_path, tiny_model, tiny_log, **changed))
        said = resume.changes(before, now)
        if name in resume.REFUSED:
            with pytest.raises(UserError, match=rf"belongs to another run: {name} was .* and is "):
                resume.check_same_run(before, now, "run")
            assert said == [], name
        else:
            resume.check_same_run(before, now, "run")
            assert [text.split(" ")[0] for text in said] == ([name] if name in resume.APPLIED else []), name


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

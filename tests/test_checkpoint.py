"""Checkpoints are whole or absent, belong to one run, and are found again; the export loads anywhere."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import save_tiny
from tiny_runs import metrics_of, tiny_config, train_all

from kto_dist.base.errors import UserError
from kto_dist.base.exits import Stopped
from kto_dist.training import checkpoint, resume
from kto_dist.training.config import Config
from kto_dist.training.loop import train


def names(config: Config) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(config.train.output).iterdir())


@pytest.fixture
def trained(tmp_path, tiny_model, tiny_log) -> Config:
    """Five steps with a checkpoint after each, of which two stay."""
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=1)
    run_ranks(train_all, 1, [config])
    return config


def test_only_the_newest_checkpoints_stay(trained):
    assert names(trained) == ["step-00000004", "step-00000005"]


def test_a_copy_that_a_user_made_of_a_checkpoint_stays_and_disturbs_nothing(tmp_path, tiny_model, tiny_log, trained):
    """It was taken for one that lies beyond, and removed."""
    root = checkpoint.folder(trained.train.output)
    for name in ("step-00000005.good", "step-00000001-copy", "step-first"):
        shutil.copytree(root / "step-00000005", root / name)
    assert checkpoint.steps(trained.train.output) == {4, 5}
    assert checkpoint.find(trained.train.output, pytest.fail) == root / "step-00000005"
    longer = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=1, train__max_steps=6)
    run_ranks(train_all, 1, [longer])
    own = ["step-00000001-copy", "step-00000005.good", "step-first"]
    assert names(trained) == sorted([*own, "step-00000005", "step-00000006"])
    # nor does a run remove it that keeps no checkpoints when it is done
    (Path(trained.train.output) / "summary.json").unlink()
    without = {"checkpoint__every_steps": None, "train__max_steps": 7}
    run_ranks(train_all, 1, [tiny_config(tmp_path, tiny_model, tiny_log, **without)])
    assert names(trained) == own


def test_a_checkpoint_that_was_never_finished_is_not_found(trained):
    root = checkpoint.folder(trained.train.output)
    (root / "step-00000005" / "state.json").unlink()
    (root / "step-00000004").rename(root / ".partial-step-00000004")
    assert checkpoint.find(trained.train.output, lambda _: None) is None


def _die_while_saving(config: Config) -> None:
    """Killed when the second checkpoint has some of its files, before the checkpoint gets its name."""
    partial = checkpoint.folder(config.train.output) / ".partial-step-00000004"

    def look(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(str(partial)) and any(partial.iterdir()):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    train(config)


def test_killed_while_saving_the_run_goes_on_from_the_checkpoint_before(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=2)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(_die_while_saving, 1, config)
    assert names(config) == [".partial-step-00000004", "step-00000002"]
    assert checkpoint.find(config.train.output, pytest.fail).name == "step-00000002"
    run_ranks(train_all, 1, [config])
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__seed": 1}, r"train.seed was 0 and is 1"),
        ({"objective__beta": 0.2}, r"objective.beta was 0.1 and is 0.2"),
        ({"train__global_batch": 8}, r"train.global_batch was 16 and is 8"),
        ({"deepspeed__zero_stage": 3}, r"deepspeed.zero_stage was 2 and is 3"),
        ({"data__max_length": 16}, r"data was .* and is"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_the_difference_and_the_remedy(
    tmp_path, tiny_model, tiny_log, trained, change, message
):
    store = tmp_path / "untouched"
    changed = tiny_config(tmp_path, tiny_model, tiny_log, reference__store=str(store), **change)
    with pytest.raises(UserError, match=rf"belongs to another run: {message}.*Give another train.output"):
        run_ranks(train_all, 1, [changed])
    # before the reference scores anything
    assert not store.exists()


def test_another_policys_checkpoint_is_refused_although_the_reference_is_the_same(tmp_path, tiny_model, tiny_log):
    policy, reference = save_tiny(tmp_path / "policy", seed=1), save_tiny(tmp_path / "reference", seed=2)
    settings = {"reference__path": str(reference), "train__max_steps": 2, "checkpoint__every_steps": 1}
    run_ranks(train_all, 1, [tiny_config(tmp_path, tiny_model, tiny_log, **settings)])
    with pytest.raises(UserError, match=r"belongs to another run: model was .* and is .*Give another train.output"):
        run_ranks(train_all, 1, [tiny_config(tmp_path, policy, tiny_log, **settings)])
    with pytest.raises(UserError, match=r"belongs to another run: reference was .* and is "):
        run_ranks(
            train_all, 1, [tiny_config(tmp_path, tiny_model, tiny_log, **settings | {"reference__path": str(policy)})]
        )


def test_a_checkpoint_that_calls_the_losss_section_kto_is_gone_on_from(tmp_path, tiny_model, tiny_log):
    noted = {"objective__beta": 0.2, "objective__kl_pairs_per_step": 8}  # which the defaults are not
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=2, **noted)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(_die_while_saving, 1, config)
    folder = checkpoint.folder(config.train.output) / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    older = ("loss", "beta", "desirable_weight", "undesirable_weight", "kl_pairs_per_step")
    later = ("objective.", "adapter.", "model.quantization")  # it knew no adapters either
    identity = {name: value for name, value in state["identity"].items() if not name.startswith(later)}
    identity |= {f"kto.{name}": state["identity"][f"objective.{name}"] for name in older}
    (folder / "state.json").write_text(json.dumps({**state, "identity": identity}))
    found = checkpoint.read_state(folder)
    # what came later than the section's name is known where a run is compared
    assert found.identity == {k: v for k, v in state["identity"].items() if k != "objective.router_loss"}
    resume.check_same_run(found, checkpoint.State(**state), config.train.output)


def test_an_older_checkpoint_is_refused_where_it_cannot_be_known_whose_it_is(tmp_path, tiny_model, tiny_log, trained):
    """It was noted from which weights the reference came, and not those of the policy."""
    for folder in checkpoint.folder(trained.train.output).glob("step-*"):
        (folder / "manifest.json").unlink()
        state = folder / "state.json"
        content = json.loads(state.read_text())
        del content["identity"]["reference"]
        state.write_text(json.dumps({**content, "files": {}}))
    apart = tiny_config(tmp_path, tiny_model, tiny_log, reference__path=str(save_tiny(tmp_path / "reference", seed=2)))
    with pytest.raises(UserError, match=r"does not say from which weights its policy started.*Go on with that version"):
        run_ranks(train_all, 1, [apart])
    ((summary,),) = run_ranks(train_all, 1, [trained])
    assert summary["tokens"] == 0  # nothing was left to do


def test_a_finished_run_is_not_overwritten(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    run_ranks(train_all, 1, [config])
    with pytest.raises(UserError, match=r"holds a finished run, which this one would overwrite: give another folder"):
        run_ranks(train_all, 2, [config])
    assert len(metrics_of(config)) == 1


def test_resumed_at_its_last_step_a_run_evaluates_the_final_weights(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__every_steps=5, data__heldout=0.3)
    ((summary,),) = run_ranks(train_all, 1, [config])
    (Path(config.train.output) / "summary.json").unlink()
    ((again,),) = run_ranks(train_all, 1, [config])
    assert again["heldout"] == summary["heldout"]
    assert again["heldout"]["after"] != again["heldout"]["before"]
    lines = (Path(config.train.output) / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5]


def test_resume_true_insists_on_a_checkpoint(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__resume=True)
    with pytest.raises(UserError, match=r"resume is true and train.output .* holds no whole checkpoint: use auto"):
        run_ranks(train_all, 1, [config])


def test_resume_false_never_overwrites_a_checkpointed_run(tmp_path, tiny_model, tiny_log, trained):
    config = tiny_config(tmp_path, tiny_model, tiny_log, checkpoint__resume=False)
    with pytest.raises(UserError, match=r"holds checkpoints and checkpoint.resume is false: give another folder"):
        run_ranks(train_all, 1, [config])


def _stopped_by_health(config: Config) -> tuple[int, str]:
    try:
        train_all([config])
    except Stopped as stop:
        return stop.exit_code, str(stop)
    return 0, ""


def test_a_kl_explosion_stops_the_run_with_a_checkpoint_and_the_remedy(tmp_path, tiny_model, tiny_log):
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, health__max_kl=0.01, health__patience=2, train__lr=3e-3, train__max_steps=10
    )
    status, message = run_ranks(_stopped_by_health, 1, config)[0]
    assert status == 1 and "beyond health.max_kl (0.01) for 2 steps" in message and "lower train.lr" in message
    steps = len(metrics_of(config))
    assert 2 <= steps < 10 and names(config) == [f"step-{steps:08d}"]


def test_the_summary_names_what_a_reader_asks_for(trained):
    summary = json.loads((Path(trained.train.output) / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["data"]["train"]["rows"] == 80
    told = summary["reference"]
    assert told["scored"] + told["repeated"] + told["from_store"] == told["pairs"]
    assert set(summary["seconds"]) >= {"data", "reference", "policy", "training", "checkpoint"}
    assert summary["training"]["step"] == 5

"""The best checkpoint is kept, found again by a run that goes on, and exported; a run that gets no better ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_runs import WORSE, metrics_of, tiny_config, train_all, train_and_die_after, weights_of

from kto_dist.base.errors import UserError
from kto_dist.training.best import Best
from kto_dist.training.config import Config


def best(*values: float, higher: bool = True, patience: int | None = 2) -> Best:
    found = Best(name="heldout/auc", higher=higher, patience=patience)
    for number, value in enumerate(values):
        found.note(10 * number, {"auc": value})
    return found


@pytest.mark.parametrize(
    ("values", "higher", "step"),
    [((0.5, 0.7, 0.9, 0.8), True, 20), ((0.5, 0.7, 0.9, 0.8), False, 10), ((0.5, 0.7, 0.7), True, 10)],
    ids=("highest", "lowest", "as good is not better"),
)
def test_the_best_evaluation_is_the_first_of_the_best(values, higher, step):
    assert best(*values, higher=higher).step == step


def test_the_start_is_no_checkpoint_but_counts_as_a_bar():
    found = best(0.9, 0.7, 0.8)
    assert (found.step, found.value, found.worse_than_the_start) == (20, 0.8, True)
    assert found.waited == 2 and found.exhausted
    assert best(0.9).step is None and best().step is None and not best().exhausted


def test_patience_counts_evaluations_since_the_best():
    ended = [best(*(0.5, 0.6, 0.6, 0.7, 0.6, 0.7)[:count]).exhausted for count in range(1, 7)]
    assert ended == [False] * 5 + [True]
    assert not best(0.9, *[0.1] * 20, patience=None).exhausted


def test_what_has_no_checkpoint_cannot_be_the_best():
    lines = [{"step": step, "auc": value} for step, value in ((0, 0.5), (10, 0.9), (20, 0.7))]
    found = best()
    found.remember(lines, {20})
    assert (found.step, found.value, found.waited) == (20, 0.7, 1)


def test_a_line_of_the_past_without_the_figure_stops_no_run():
    found = best()
    found.remember([{"step": 0, "auc": 0.5}, {"step": 10, "aub": 0.9}, {"step": 20, "auc": 0.7}], {10, 20})
    assert (found.step, found.value, found.waited) == (20, 0.7, 0)


def test_a_figure_that_the_rows_do_not_have_is_told():
    with pytest.raises(UserError, match=r"checkpoint.best \(heldout/auc\) has no value on these held-out rows"):
        best().note(10, {"loss": 0.5})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"best": "auc"}}, "'auc' is no held-out figure"),
        ({"checkpoint": {"best": "heldout/kl_raw"}}, "'heldout/kl_raw' is no held-out figure"),
        ({"checkpoint": {"best": "heldout/new/auc"}}, "'heldout/new/auc' is no held-out figure"),
        ({"checkpoint": {"best": "heldout/auc"}}, "needs data.heldout and evaluate.every_steps"),
        ({"train": {"stop_after": 3}}, r"train.stop_after \(3\) needs checkpoint.best"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        Config.build({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **sections})


def test_a_named_sets_figure_can_choose():
    data = {"train": "rows.jsonl", "heldout": {"hard": "a.jsonl", "fresh": "b.jsonl"}}
    sections = {"data": data, "evaluate": {"every_steps": 5}, "checkpoint": {"best": "heldout/hard/loss"}}
    chosen = Best.of(Config.build({"model": {"path": "m"}, **sections}))
    assert chosen is not None and not chosen.higher


def heldout_of(config: Config) -> dict[int, float]:
    lines = (Path(config.train.output) / "heldout.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def checkpoints_of(config: Config) -> list[str]:
    return sorted(path.name for path in (Path(config.train.output) / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("stage", (pytest.param(2, marks=pytest.mark.soak), 3))
def test_the_best_is_exported_though_the_run_went_on(tmp_path, tiny_model, tiny_log, stage):
    """It is the model of a run that ended there, bit for bit, and its figures are those that are told."""
    config = tiny_config(tmp_path, tiny_model, tiny_log, **WORSE, deepspeed__zero_stage=stage)
    ((summary,), _) = run_ranks(train_all, 2, [config])
    losses = heldout_of(config)
    step = min(list(losses)[1:], key=losses.__getitem__)
    assert step < 8 and summary["best"] == {"figure": "heldout/loss", "step": step, "value": losses[step]}
    assert summary["heldout"]["after"]["loss"] == losses[step] and summary["steps"] == 8
    assert checkpoints_of(config) == [f"step-{step:08d}", "step-00000008"]

    short = {**WORSE, "checkpoint__best": None, "train__max_steps": step, "train__output": str(tmp_path / "short")}
    same = tiny_config(tmp_path, tiny_model, tiny_log, **short, deepspeed__zero_stage=stage)
    run_ranks(train_all, 2, [same])
    ours, theirs = weights_of(config), weights_of(same)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def killed_and_resumed(config: Config) -> dict[str, Any]:
    return train_all([config])[0]


def test_a_run_that_gets_no_better_ends_and_ends_again_where_it_was_killed(tmp_path, tiny_model, tiny_log):
    changes = {**WORSE, "train__max_steps": 40, "train__stop_after": 2}
    whole = tiny_config(tmp_path, tiny_model, tiny_log, **changes, train__output=str(tmp_path / "whole"))
    (summary,) = run_ranks(killed_and_resumed, 1, whole)
    step = summary["best"]["step"]
    assert summary["steps"] == step + 4 < 40 and max(heldout_of(whole)) == step + 4

    # killed after its best, and once more when nothing was left but to export
    config = tiny_config(tmp_path, tiny_model, tiny_log, **changes)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, 1, config, step + 3)
    (again,) = run_ranks(killed_and_resumed, 1, config)
    (Path(config.train.output) / "summary.json").unlink()
    steps = len(metrics_of(config))
    (third,) = run_ranks(killed_and_resumed, 1, config)
    assert steps == len(metrics_of(config)) == step + 4
    for one in (again, third):
        assert one["best"] == summary["best"] and one["heldout"] == summary["heldout"]
    assert all(torch.equal(weights_of(config)[name], tensor) for name, tensor in weights_of(whole).items())

"""Evaluations between the first and the last look at a part of the held-out prompts, and say so; the export at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from tiny import thumbs, tiny_tokenizer, write_jsonl
from tiny_runs import WORSE, tiny_config, train_all

from kto_dist.data.batch import heldout_pairs
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import Examples, load
from kto_dist.data.tokenise import prepare
from kto_dist.evaluation.figures import Evaluated, figures_of
from kto_dist.evaluation.heldout import evaluate_rows
from kto_dist.evaluation.sample import Remembering, sample_of
from kto_dist.objective.losses import LOSSES
from kto_dist.reference.pairs import RefLogps


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("rows")
    log = write_jsonl(folder / "log.jsonl", thumbs(200, 60))
    return load(prepare(DataConfig(train=str(log), cache=str(folder), workers=1), tiny_tokenizer())[0])


def cost(examples: Examples, rows: np.ndarray) -> int:
    prompts, completions = heldout_pairs(0, examples)
    asked = np.isin(prompts, rows)
    pairs = examples.prompt_lengths[prompts[asked]] + examples.completion_lengths[completions[asked]]
    return int((examples.prompt_lengths + examples.completion_lengths)[rows].sum() + pairs.sum())


@pytest.mark.parametrize("tokens", (500, 2000, 5000))
def test_whole_prompts_are_taken_as_long_as_they_fit(examples: Examples, tokens: int) -> None:
    rows = sample_of(examples, seed=0, tokens=tokens, with_z0=True)
    assert rows is not None and 0.5 * tokens < cost(examples, rows) <= tokens
    outside = np.setdiff1d(np.arange(200), rows)
    assert not np.isin(examples.prompt_group[rows], examples.prompt_group[outside]).any()
    assert (rows == sample_of(examples, seed=0, tokens=tokens, with_z0=True)).all()
    assert set(rows) != set(sample_of(examples, seed=1, tokens=tokens, with_z0=True))


def test_a_budget_for_nothing_still_takes_both_classes(examples: Examples) -> None:
    for seed in range(9):
        rows = sample_of(examples, seed=seed, tokens=1, with_z0=False)
        assert np.unique(examples.prompt_group[rows]).size == 2 and set(examples.desirable[rows]) == {True, False}


def test_no_budget_and_one_for_all_take_all(examples: Examples) -> None:
    everything = cost(examples, np.arange(200))
    assert sample_of(examples, seed=0, tokens=None, with_z0=True) is None
    assert sample_of(examples, seed=0, tokens=everything, with_z0=True) is None
    assert sample_of(examples, seed=0, tokens=everything - 1, with_z0=True) is not None


def logps(prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    return -20 + 5 * np.sin(prompts + 7.0 * completions)


def looked_at(examples: Examples, model: Any, among: np.ndarray | None, loss: str = "kto", **more: Any) -> Evaluated:
    return evaluate_rows(
        model,
        lambda prompts, completions: logps(completions, prompts),
        examples,
        seed=0,
        loss=LOSSES[loss],
        beta=0.1,
        class_weights=(1.0, 1.0),
        among=among,
        **more,
    )


def test_the_part_of_an_evaluation_needs_no_model_and_is_what_the_model_says_of_it_alone(examples: Examples) -> None:
    model = Remembering(logps)
    whole = looked_at(examples, model, None)
    part = sample_of(examples, seed=0, tokens=2000, with_z0=True)
    assert part is not None
    again, alone = (looked_at(examples, of, part) for of in (RefLogps(examples, *model.seen()), logps))
    assert figures_of(again) == figures_of(alone)
    assert (again.column("reward") == whole.column("reward")[part]).all()
    assert (again.prompts == examples.prompt_group[part]).all()
    assert figures_of(again)["kl_pairs"] == np.isin(heldout_pairs(0, examples)[0], part).sum()
    assert (again.prompts[again.kl_rows] == whole.prompts[part[again.kl_rows]]).all()


def test_of_a_loss_on_some_rows_the_part_takes_those_of_them_that_are_in_it(examples: Examples) -> None:
    up = np.flatnonzero(examples.desirable)[:, None]
    part = sample_of(examples, seed=0, tokens=2000, with_z0=False)
    assert part is not None
    found = looked_at(examples, logps, part, loss="sft", units=up)
    assert found.counted is not None and (found.counted == examples.desirable[part]).all()
    whole = looked_at(examples, logps, None, loss="sft", units=up)
    assert (found.column("loss") == whole.column("loss")[part]).all()


def test_a_run_looks_at_a_part_between_and_at_all_rows_of_what_it_exports(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, **WORSE, evaluate__tokens=400)
    (summary, _) = (found[0] for found in run_ranks(train_all, 2, [config]))
    lines = [json.loads(line) for line in (Path(config.train.output) / "heldout.jsonl").read_text().splitlines()]
    rows = summary["data"]["heldout"]["rows"]
    assert [(line["step"], "part" in line) for line in lines[:5]] == [
        (0, False),
        (2, True),
        (4, True),
        (6, True),
        (8, False),
    ]
    few = lines[1]["rows/all"]
    assert few < rows and all(line["rows/all"] == (few if "part" in line else rows) for line in lines)
    assert lines[1]["part"]["prompts"] < lines[1]["part"]["of"] and lines[4]["of_part"]["rows/all"] == few
    # by the part alone, of which the start's loss is the same as of all
    chosen = {line["step"]: line.get("of_part", line)["loss"] for line in lines[:5]}
    best = min((value, step) for step, value in chosen.items() if step)
    assert (summary["best"]["value"], summary["best"]["step"]) == best
    after = summary["heldout"]["after"]
    assert after["rows/all"] == rows and "part" not in after
    assert best[1] == 8 or (len(lines) == 6 and lines[5]["step"] == best[1])

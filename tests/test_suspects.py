"""Rows behind a figure that is no number are found, and named by file and line in the run's folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config, train_all

from kto_dist.base.console import Console
from kto_dist.base.exits import Stopped
from kto_dist.data.batch import step_kl_pairs, step_rows
from kto_dist.objective import metrics
from kto_dist.record.run_folder import RunFolder, read_lines
from kto_dist.training.config import Config
from kto_dist.training.prepare import PreparedTraining, prepare_training
from kto_dist.training.step import StepResult
from kto_dist.training.suspects import LISTED, note, suspects


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedTraining:
    folder = tmp_path_factory.mktemp("suspects")
    log = write_jsonl(folder / "log.jsonl", thumbs(300, 40))
    return prepare_training(tiny_config(folder, save_tiny(folder / "model"), log, train__global_batch=150), Console())


def a_step(prepared: PreparedTraining, step: int = 1, **broken: Any) -> StepResult:
    """Of sound rows but for `broken`: quantity -> places of the step's rows that are no number in it."""
    rows = step_rows(prepared.plan, step - 1)
    table = torch.ones(rows.size, len(metrics.QUANTITIES), dtype=torch.float64)
    table[:, metrics.QUANTITIES.index("reward")] = torch.arange(rows.size, dtype=torch.float64)
    for name, places in broken.items():
        table[places, metrics.QUANTITIES.index(name)] = math.nan
    return StepResult(
        step=step,
        rows=rows,
        table=table,
        sums=metrics.by_class(table, torch.ones(rows.size)).sum(1),
        kl=torch.tensor([1.0, 4.0], dtype=torch.float64),
        tokens=100,
        grad_norm=1.0,
        learning_rate=1e-3,
    )


@pytest.mark.parametrize(
    ("broken", "places", "why"),
    [
        ({"logps": [3, 5], "loss": slice(None), "reward": [3, 5]}, [3, 5], "the model's log-prob of each is no number"),
        ({"ref_logps": [2], "logps": [4]}, [2], "the reference's log-prob"),
        ({"loss": [7]}, [7], "the loss of each is no number"),
        ({"logps": slice(None)}, range(150), "every row of the step"),
    ],
)
def test_a_rows_own_log_prob_tells_before_what_others_spoil(prepared, broken, places, why):
    result = a_step(prepared, **broken)
    found = suspects(result, prepared)
    assert found.rows == tuple(result.rows[list(places)]) and why in found.why


def test_a_z0_that_is_no_number_leads_to_the_pairs_of_its_step(prepared):
    result = replace(a_step(prepared, step=2, loss=slice(None)), kl=torch.tensor([math.nan, 4.0]))
    pairs = step_kl_pairs(prepared.plan, 1, result.rows, prepared.train.prompt_group)
    found = suspects(result, prepared)
    assert set(found.rows) == set(np.concatenate(pairs).tolist()) and "z0 is no number" in found.why


def test_of_a_gradient_that_is_no_number_all_rows_are_suspect_the_farthest_first(prepared):
    result = replace(a_step(prepared), grad_norm=math.inf)
    found = suspects(result, prepared)
    assert found.rows == tuple(result.rows[::-1]) and "no row tells whose it was" in found.why


def test_rows_are_named_by_line_with_their_figures_and_the_rest_is_counted(tmp_path, prepared):
    folder, result = RunFolder(tmp_path), a_step(prepared, logps=slice(None))
    said = note(suspects(result, prepared), result, prepared, folder)
    lines = read_lines(folder.bad_rows)
    log = prepared.config.data.train_paths[0]
    assert said.startswith(f"150 rows, as {log}:{result.rows[0] + 1}: ") and f"the first {LISTED}" in said
    assert [line["place"] for line in lines] == [f"{log}:{row + 1}" for row in result.rows[:LISTED]]
    assert lines[0]["logps"] == "nan" and lines[0]["ref_logps"] == 1.0
    logged = json.loads(Path(log).read_text().splitlines()[result.rows[0]])
    assert (lines[0]["prompt"], lines[0]["completion"]) == (logged["prompt"], logged["completion"])
    assert lines[0]["desirable"] == logged["label"]


def _stopped_by(config: Config) -> str:
    try:
        train_all([config])
    except Stopped as stop:
        return str(stop)
    return "nothing"


def test_a_run_names_the_row_that_its_model_has_no_number_for(tmp_path, tiny_model):
    rows = thumbs(48, 24)
    rows[17]["completion"] = f"~ {rows[17]['completion']}"  # a letter that no other row has
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    other = save_tiny(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    weights["model.embed_tokens.weight"][tokenizer["model"]["vocab"]["~"]] = math.nan
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(
        tmp_path,
        other,
        log,
        reference__path=str(tiny_model),
        objective__loss="apo_zero_unpaired",
        train__max_steps=3,
        tracking__report=True,
    )
    assert run_ranks(_stopped_by, 2, config)[0].count(f"one row, as {log}:18: the model's log-prob") == 1
    (line,) = read_lines(RunFolder(Path(config.train.output)).bad_rows)
    assert line["place"] == f"{log}:18" and line["prompt"] == rows[17]["prompt"]
    (said,) = read_lines(RunFolder(Path(config.train.output)).health)
    assert said["rule"] == "finite" and "bad-rows.jsonl" in said["message"]
    page = (Path(config.train.output) / "report.html").read_text()
    assert f"the run was stopped at step {said['step']} (finite)" in page and f"{log}:18" in page

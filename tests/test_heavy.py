"""A row that outweighs the rest of its step is named, and an ordinary data set is left in peace."""

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tiny import thumbs, write_jsonl
from tiny_runs import tiny_config

from kto_dist.base.console import Console
from kto_dist.training.config import Config
from kto_dist.training.heavy import HeavyRow, heavy_rows, warning
from kto_dist.training.loop import train
from kto_dist.training.prepare import prepare_training


def heavy_of(folder: Path, model: Path, weights: list[float], **changes: object) -> list[HeavyRow]:
    rows = [{**row, "weight": weight} for row, weight in zip(thumbs(len(weights), 24), weights, strict=True)]
    config = tiny_config(folder, model, write_jsonl(folder / "log.jsonl", rows), **changes)
    prepared = prepare_training(config, Console())
    return heavy_rows(prepared.plan, prepared.train, prepared.class_weights)


def test_a_row_that_outweighs_the_rest_of_its_step_is_named_with_its_share(tmp_path, tiny_model):
    (found,) = heavy_of(tmp_path, tiny_model, [1.0] * 9 + [100.0] + [1.0] * 70)
    assert found.row == 9 and 0.5 < found.share < 1 and 1 <= found.step <= 5
    assert f"training row 9 has {found.share:.0%} of the weight of step {found.step}" in warning(
        [found]
    ) and "train.global_batch" in warning([found])


@pytest.mark.parametrize("weights", ([1.0] * 80, list(np.linspace(0.1, 1.0, 80))))
def test_ordinary_weights_are_left_in_peace(tmp_path, tiny_model, weights):
    assert heavy_of(tmp_path, tiny_model, weights) == []


def test_of_two_rows_one_outweighing_the_other_says_nothing(tmp_path, tiny_model):
    assert heavy_of(tmp_path, tiny_model, [1.0, 5.0] * 40, train__global_batch=2) == []


def _summary_of(config: Config) -> dict:
    train(config)
    return json.loads((Path(config.train.output) / "summary.json").read_text())


def test_the_summary_names_them(tmp_path, tiny_model):
    rows = [{**row, "weight": 1000.0 if place == 3 else 1.0} for place, row in enumerate(thumbs(80, 24))]
    config = tiny_config(tmp_path, tiny_model, write_jsonl(tmp_path / "log.jsonl", rows))
    heavy = run_ranks(_summary_of, 1, config)[0]["data"]["heavy_rows"]
    assert heavy["count"] == 1 and heavy["rows"][0]["row"] == 3

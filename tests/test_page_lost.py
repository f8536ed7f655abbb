"""A report that cannot be drawn takes nothing else of a run with it."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

from ranks import run_ranks
from tiny_runs import tiny_config

from kto_dist import train
from kto_dist.record import report
from kto_dist.training.config import Config


def train_with_a_broken_page(config: Config) -> str:
    said = io.StringIO()
    broken = mock.patch.object(report, "write_report", side_effect=ValueError("a bar below zero"))
    with broken, contextlib.redirect_stdout(said):
        train(config)
    return said.getvalue()


def test_the_model_and_the_figures_are_whole_where_the_page_cannot_be_drawn(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, tracking__report=True)
    (told,) = run_ranks(train_with_a_broken_page, 1, config)
    output = Path(config.train.output)
    assert (output / "export" / "model.safetensors").exists()
    assert json.loads((output / "summary.json").read_text())["steps"] == 1
    assert not (output / "report.html").exists()
    said = " ".join(told.split())
    assert "there is no report: drawing it ended with ValueError: a bar below zero" in said
    assert f"`kto-dist report {output}` tries it again" in said

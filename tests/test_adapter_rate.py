"""The measurement of an adapter's learning rate: runs that differ in their rate alone, and results to go on with."""

import json

import adapter_rate
import click
import figure_tables
import pytest
import yaml
from click.testing import CliRunner

from kto_dist import Config


@pytest.fixture
def config(tmp_path, tiny_model, tiny_log):
    tree = {
        "model": {"path": str(tiny_model)},
        "reference": {"store": str(tmp_path / "store"), "tokens_per_batch": 256},
        "data": {"train": str(tiny_log), "heldout": 0.3, "max_length": 64, "cache": str(tmp_path / "tokenised")},
        "train": {"global_batch": 8, "max_steps": 3, "tokens_per_microbatch": 256},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def settings(config):
    return adapter_rate.settings_of(str(config), None, 8)


def test_runs_differ_in_what_is_trained_and_how_fast_and_in_nothing_else(config, tmp_path):
    runs = adapter_rate.runs_of("lora", (1e-4, 1e-3), (2e-5,), seed=3)
    found = []
    for run in runs:
        built = Config.load(config, adapter_rate.overrides_of(run, settings(config), tmp_path / "run"))
        assert (built.train.lr, built.train.seed) == (run.lr, 3)
        assert (built.adapter.type, built.adapter.rank) == (("none", None) if run.method == "full" else ("lora", 8))
        train = built.train.model_copy(update={"lr": 0})
        found.append(built.model_copy(update={"train": train, "adapter": None}))
    assert found[0] == found[1] == found[2]
    assert [run.method for run in runs] == ["full", "lora", "lora"]


def made_up(run, *rest):
    return {
        "method": run.method,
        "lr": run.lr,
        "seed": run.seed,
        "dtype": "bfloat16",
        "scored": 0,
        "heldout": {
            "auc": 0.8,
            "accuracy": 0.7,
            "rewards/desirable": 0.5,
            "rewards/undesirable": -1.5,
            "intervals": {"auc": {"low": 0.75, "high": 0.85}},
        },
        "step_seconds": 2.5,
        "seconds": {"training": 100.0, "all": 130.0},
        "peak_bytes": 3 * 2**30,
        "export_bytes": 5 * 2**20,
    }


def test_a_run_that_is_done_is_not_run_again_and_each_is_written_as_it_ends(config, tmp_path, monkeypatch):
    begun = []

    def measure(run, *rest):
        if len(begun) == 2:
            raise click.ClickException("killed")
        begun.append(run.title)
        return made_up(run)

    monkeypatch.setattr(adapter_rate, "measure", measure)
    monkeypatch.setattr(adapter_rate, "score", lambda run, *rest: 7)
    file = tmp_path / "found.json"
    words = ["--config", str(config), "--json", str(file), "--rates", "1e-4,1e-3"]
    assert CliRunner().invoke(adapter_rate.main, words).exit_code == 1
    assert len(json.loads(file.read_text())["runs"]) == 2
    begun.clear()
    done = CliRunner().invoke(adapter_rate.main, [*words, "--full-rates", "2e-5, 4e-5"])
    assert done.exit_code == 0, done.output
    assert begun == ["full, lr 4e-05, seed 0", "lora, lr 0.001, seed 0"]
    assert "7 log-probs scored" in done.output
    begun.clear()
    again = CliRunner().invoke(adapter_rate.main, [*words, "--full-rates", ""])
    assert again.exit_code == 0 and not begun and "scored," not in again.output, "nothing was left to do"
    other = CliRunner().invoke(adapter_rate.main, [*words, "--rank", "4"])
    assert other.exit_code == 1 and "has runs with another alpha, rank" in other.output


def test_the_table_has_a_line_a_run_and_no_column_of_which_nothing_is_known(config):
    runs = [made_up(run) for run in adapter_rate.runs_of("lora", (1e-3, 1e-4), (2e-5,), seed=0)]
    content = {"benchmark": "adapter-rate", "device": "a machine", "date": "2026-01-02", "versions": {}}
    content |= {"settings": settings(config), "runs": runs}
    text = figure_tables.KINDS["adapter-rate"](content)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == (
        "| trained | learning rate | AUC | accuracy | reward, good | bad | s of training | s a step | peak GiB "
        "| export, MiB |"
    )
    assert lines[1] == "| all weights | 2e-05 | 0.800 (0.750 to 0.850) | 0.700 | +0.5 | -1.5 | 100 | 2.50 | 3.00 | 5 |"
    assert [line.split(" | ")[1] for line in lines[2:]] == ["0.0001", "0.001"]
    assert "3 steps of 8 rows" in text and "All 3 runs read one reference store and scored 0" in text
    other = made_up(adapter_rate.Run(method="lora", lr=1e-4, seed=1)) | {"answers": {"approved": 0.5, "words": 20.0}}
    both = figure_tables.KINDS["adapter-rate"](content | {"runs": [*runs, other]})
    assert "| learning rate | seed |" in both and "| 50% | 20 |" in both
    busy = figure_tables.KINDS["adapter-rate"](content | {"beside": "beside a compiler"})
    assert "s a step" not in busy and "No seconds: they ran beside a compiler." in busy


@pytest.mark.soak
def test_all_runs_are_made_for_real_and_the_reference_is_scored_once(config, tmp_path):
    file = tmp_path / "found.json"
    words = ["--config", str(config), "--json", str(file), "--rates", "1e-2", "--rank", "8", "--no-answers"]
    done = CliRunner().invoke(adapter_rate.main, words)
    assert done.exit_code == 0, done.output
    runs = json.loads(file.read_text())["runs"]
    assert [run["method"] for run in runs] == ["full", "lora"]
    assert [run["scored"] for run in runs] == [0, 0] and "reference: 0 " not in done.output
    assert runs[1]["export_bytes"] < runs[0]["export_bytes"]
    assert all(run["peak_bytes"] > 0 and "low" in run["heldout"]["intervals"]["auc"] for run in runs)

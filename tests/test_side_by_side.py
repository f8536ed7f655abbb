"""`kto-dist report`: a run's page made anew, and several runs on one page."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kto_dist.base.errors import UserError
from kto_dist.commands.cli import main
from kto_dist.record.side_by_side import write_side_by_side


def a_run(folder: Path, auc: float, lr: float, output: str = "runs/a") -> Path:
    folder.mkdir(parents=True)
    settings = {"train": {"lr": lr, "seed": 0, "output": output}, "tracking": {"uri": f"http://me:secret@{lr}/"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    steps = [{"step": step, "loss": 0.5 - step / 100} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    interval = {"value": auc, "low": auc - 0.05, "high": auc + 0.05, "method": "bootstrap", "prompts": 300}
    lines = [{"step": 0, "auc": 0.5, "accuracy/all": 0.5}]
    lines.append({"step": 5, "auc": auc, "accuracy/all": auc - 0.1, "intervals": {"auc": interval}})
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def page(tmp_path: Path) -> str:
    runs = [a_run(tmp_path / "low", 0.7, 1e-6), a_run(tmp_path / "<high>", 0.8, 1e-5, output="runs/b")]
    return write_side_by_side(runs, tmp_path / "page.html").read_text()


def test_each_runs_figures_stand_side_by_side_with_their_intervals(page):
    row = re.search(r"<th>auc</th>(.*?)</tr>", page, re.S)
    assert row and re.findall(r">([\d][^<]*)<", row[1]) == ["0.7", "0.65 to 0.75", "0.8", "0.75 to 0.85"]
    assert page.count("Better at telling liked from disliked answers") == 2


def test_settings_that_differ_are_shown_and_no_others(page):
    assert re.search(r"<th>train.lr</th><td>1e-06</td><td>1e-05</td>", page)
    assert "train.seed" not in page and "train.output" not in page


def test_curves_of_all_runs_lie_in_the_page_which_is_safe_to_open(page):
    assert page.count("data:image/png;base64,") == 2 * 3  # loss, accuracy and auc, light and dark
    assert "<high>" not in page and "&lt;high&gt;" in page and "secret" not in page and "<script" not in page


def test_runs_of_one_name_are_numbered(tmp_path):
    runs = [a_run(tmp_path / number / "run", 0.7, 1e-6) for number in ("1", "2")]
    page = write_side_by_side(runs, tmp_path / "page.html").read_text()
    assert "run (1)" in page and "run (2)" in page and "none" in page


def test_a_folder_without_a_run_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run"):
        write_side_by_side([a_run(tmp_path / "run", 0.7, 1e-6), tmp_path / "empty"], tmp_path / "page.html")


def test_the_command_makes_one_runs_page_anew_and_several_runs_page(tmp_path):
    first, second = a_run(tmp_path / "first", 0.7, 1e-6), a_run(tmp_path / "second", 0.8, 1e-6)
    one = CliRunner().invoke(main, ["report", str(first)])
    assert one.exit_code == 0 and (first / "report.html").exists() and "report.html" in one.output
    several = CliRunner().invoke(main, ["report", str(first), str(second), "--output", str(tmp_path / "both.html")])
    assert several.exit_code == 0 and "2 runs side by side" in (tmp_path / "both.html").read_text()
    wrong = CliRunner().invoke(main, ["report", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2 and "is no folder: give a run's folder" in wrong.output

"""Passwords of a run's settings stand in none of its files, and in nothing that it prints."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console


def test_no_file_and_no_line_of_a_run_holds_a_password(tmp_path, tiny_model, tiny_log):
    run = tmp_path / "run"
    config = yaml.safe_load(to_yaml(tiny_config(run, tiny_model, tiny_log, train__max_steps=1)))
    # nobody answers there, so that the run warns as well
    config["tracking"] = {"uri": "postgresql://me:hidden-1@127.0.0.1:9/runs?sslpassword=hidden-2"}
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "kto_dist.commands.entry", "train", str(written)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "MLflow at postgresql://***@127.0.0.1:9/runs?sslpassword=*** failed" in done.stdout
    assert "hidden" not in done.stdout + done.stderr
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "report.html"} < {path.name for path in files}
    assert not [path for path in files if b"hidden-" in path.read_bytes()]
    shown = subprocess.run(
        [sys.executable, "-m", "kto_dist.commands.cli", "config", str(written)], capture_output=True, text=True
    )
    assert "***@127.0.0.1:9" in shown.stdout and "hidden" not in shown.stdout


def test_whatever_comes_to_the_console_is_shown_without_its_passwords(capsys):
    """As words of a library, which knows nothing of them."""
    console = Console()
    console.say("connected to http://me:hidden@host/a")
    console.warn("lost postgresql://me:hidden@host/b")
    assert capsys.readouterr().out.split() == [
        "connected", "to", "http://***@host/a", "warning:", "lost", "postgresql://***@host/b"
    ]  # fmt: skip


def test_a_run_that_is_passed_around_keeps_its_other_settings(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__uri="http://me:hidden@host:5000/x")
    text = to_yaml(config)
    assert yaml.safe_load(text)["tracking"]["uri"] == "http://***@host:5000/x"
    assert yaml.safe_load(text)["model"]["path"] == str(Path(tiny_model))

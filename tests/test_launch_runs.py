"""Whole trainings under `kto-dist launch`, on hosts that are all this machine: killed, and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import metrics_of, tiny_config, weights_of
from two_hosts import environment, fake_ssh, hostfile

from kto_dist.base.config import to_yaml
from kto_dist.training.config import Config

ROOT = Path(__file__).parents[1]


def launched(folder: Path, config: Config, *words: str) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    hosts = hostfile(folder, "127.0.0.2", "127.0.0.3")
    command = [sys.executable, "-m", "kto_dist.commands.cli", "launch", str(folder / "config.yaml")]
    command += ["--hostfile", str(hosts), "--ssh", str(fake_ssh(folder)), *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        command, env=environment(PYTHONPATH=path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks_of(folder: Path) -> list[int]:
    """Processes that train in this folder's config."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"kto_dist.commands.entry" in words and str(folder / "config.yaml").encode() in words:
            found.append(int(process.name))
    return sorted(found)


@pytest.mark.soak
@pytest.mark.parametrize("victim", ["a rank", "all ranks of a host"])
def test_a_job_that_loses_ranks_starts_again_and_ends_as_the_undisturbed_one(tmp_path, tiny_model, tiny_log, victim):
    settings = {"train__max_steps": 30, "checkpoint__every_steps": 3}
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **settings)
    broken = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
    job = launched(tmp_path / "undisturbed", whole)
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 0 and "all-reduce of 2 ranks on cpu" in said, said

    job = launched(tmp_path / "disturbed", broken, "--max-restarts", "2", "--no-preflight")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 7:
        assert job.poll() is None
        time.sleep(0.02)
    ranks = ranks_of(tmp_path / "disturbed")
    assert len(ranks) == 2
    for pid in ranks[:1] if victim == "a rank" else ranks:
        os.kill(pid, signal.SIGKILL)
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 0, said
    assert "was killed by signal 9 (SIGKILL)" in said and "start 1 of 2" in said
    assert [line["step"] for line in metrics_of(broken)] == list(range(1, 31))
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(broken)[name], tensor), name
    assert ranks_of(tmp_path / "disturbed") == []


@pytest.mark.soak
def test_sigterm_saves_on_every_host_and_is_the_status(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2000)
    job = launched(tmp_path / "job", config, "--no-preflight")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    said = job.communicate(timeout=600)[0]
    assert job.returncode == 143 and "stopped by a signal after step" in said
    steps = len(metrics_of(config))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "manifest.json").exists()

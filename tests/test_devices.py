"""On a machine with a GPU: who sees it, and that a run on it learns what one on the CPU learns."""

import os
import subprocess
import sys

import pytest
import torch
from devices import gpus_hidden
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.base import comm

CLOSE = 1e-3


def _device() -> str:
    return comm.device().type


@pytest.mark.gpu
def test_only_what_asks_for_a_gpu_sees_it():
    assert _device() == "cuda"
    with gpus_hidden():
        assert _device() == "cpu"
        code = "from kto_dist.base import comm; print(comm.device())"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "cpu\n"
    assert run_ranks(_device, 1) == ["cpu"]
    assert run_ranks(_device, 1, gpu=True) == ["cuda"]


def test_a_test_sees_no_gpu_unless_it_asks_for_one():
    assert _device() == "cpu" and os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.gpu
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_learns(tmp_path, tiny_model, tiny_log):
    runs = {}
    for device in ("cpu", "gpu"):
        folder = tmp_path / device
        runs[device] = tiny_config(folder, tiny_model, tiny_log, train__output=str(folder / "run"))
        run_ranks(train_all, 1, [runs[device]], gpu=device == "gpu")
    for expected, found in zip(*map(metrics_of, runs.values()), strict=True):
        for name in ("loss", "kl_raw", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=CLOSE, abs=1e-5), (expected["step"], name)
    expected, found = map(weights_of, runs.values())
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= CLOSE * torch.norm(tensor), name

"""A reference that has scored leaves memory and disk, also where DeepSpeed's own `destroy` frees nothing."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ranks import run_ranks
from reference_runs import logps_of_pairs, score, scored_and_found
from tiny import save_tiny
from tiny_runs import tiny_config

from kto_dist.model.engines import Reference
from kto_dist.training.config import Config


def _seen_around_a_pass(config: Config, look) -> dict[str, int]:
    """`look` before the reference is loaded, when it is about to leave, and after."""
    seen = {"before": look()}

    class Watched(Reference):
        def close(self, **settings):
            seen["loaded"] = look()
            super().close(**settings)

    score(config, engine=Watched)
    return {**seen, "after": look()}


def _memory_of_second_pass(warm_up: Config, config: Config) -> dict[str, int]:
    """The first pass of a process leaves behind what libraries load on first use; the second shows the model alone."""
    scored_and_found(warm_up)
    return _seen_around_a_pass(config, lambda: psutil.Process().memory_info().rss)


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), pytest.param(3, "none", marks=pytest.mark.soak), (3, "cpu")]
)
def test_the_reference_leaves_memory_when_it_has_scored(tmp_path, tiny_log, stage, offload):
    # 380 MB of weights: large against the tens of MB by which an allocator's leftovers differ from pass to pass
    model = save_tiny(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    config = tiny_config(
        tmp_path, model, tiny_log, reference__zero_stage=stage, reference__offload=offload, train__max_steps=1
    )
    warm_up = tiny_config(
        tmp_path,
        model,
        tiny_log,
        reference__store=str(tmp_path / "other"),
        reference__zero_stage=stage,
        train__max_steps=1,
    )
    (seen,) = run_ranks(_memory_of_second_pass, 1, warm_up, config)
    size = (model / "model.safetensors").stat().st_size
    assert seen["loaded"] - seen["before"] > 0.8 * size
    assert seen["after"] - seen["before"] < 0.15 * size


def _allocated(config: Config) -> dict[str, int]:
    return _seen_around_a_pass(config, torch.cuda.memory_allocated)


@pytest.mark.gpu
def test_the_reference_leaves_the_gpus_memory_when_it_has_scored(tmp_path, tiny_log):
    model = save_tiny(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    (seen,) = run_ranks(_allocated, 1, tiny_config(tmp_path, model, tiny_log, train__max_steps=1), gpu=True)
    size = (model / "model.safetensors").stat().st_size
    assert seen["loaded"] - seen["before"] > 0.8 * size
    # a matmul's workspace stays for the process
    assert seen["after"] - seen["before"] < 0.15 * size


@pytest.mark.soak
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_reference_whose_weights_lie_on_a_disk_scores_alike_and_leaves_the_disk_empty(tmp_path, tiny_log, ranks):
    """Soak, because DeepSpeed compiles its asynchronous I/O first, which takes minutes once."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio and its headers (apt-get install libaio-dev)")
    disk = tmp_path / "disk"
    disk.mkdir()
    # DeepSpeed keeps parameters of less than 100,000 numbers in memory
    model = save_tiny(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    plain, swapped = (
        tiny_config(tmp_path, model, tiny_log, reference__store=str(tmp_path / name), **settings)
        for name, settings in (
            ("plain", {}),
            ("swapped", {"reference__offload": "nvme", "reference__nvme_path": str(disk)}),
        )
    )
    expected = run_ranks(logps_of_pairs, ranks, plain)
    found = run_ranks(_with_files_seen, ranks, swapped, disk, timeout=600)
    assert all(np.allclose(own, other, rtol=1e-5, atol=1e-5) for (own, _), other in zip(found, expected, strict=True))
    assert all(seen > 1e6 for _, seen in found) and not any(disk.iterdir())


def _with_files_seen(config: Config, disk: Path) -> tuple[np.ndarray, int]:
    """Values, and how many bytes lay on the disk when the reference was loaded."""
    seen = [0]

    class Watched(Reference):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            seen[0] = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())

    return logps_of_pairs(config, engine=Watched), seen[0]

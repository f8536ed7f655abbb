"""The promises of the design, on whole runs: the batch decides, step 0, killed anywhere, completion rows only."""

import itertools
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.config import Config

WORLDS = (1, 2, 4)
STAGES = (0, 2, 3)
BUDGETS = (96, 200, 4096)
PACKING = (False, True)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trajectories(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path
) -> dict[tuple[int, int, int, bool], Config]:
    """Five steps in every combination of world size, ZeRO stage, token budget and packing."""
    folder = tmp_path_factory.mktemp("trajectories")
    configs = {}
    for world, stage, budget, packing in itertools.product(WORLDS, STAGES, BUDGETS, PACKING):
        configs[world, stage, budget, packing] = tiny_config(
            folder,
            tiny_model,
            tiny_log,
            train__output=str(folder / f"{world}-{stage}-{budget}-{packing}"),
            train__tokens_per_microbatch=budget,
            train__packing=packing,
            deepspeed__zero_stage=stage,
        )
    for world in WORLDS:
        run_ranks(train_all, world, [config for key, config in configs.items() if key[0] == world])
    return configs


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_batch_decides_not_the_cluster(trajectories, world, stage, budget, packing):
    plain, config = trajectories[1, 0, 4096, False], trajectories[world, stage, budget, packing]
    for expected, found in zip(metrics_of(plain), metrics_of(config), strict=True):
        for name in ("loss", "kl_raw", "grad_norm", "rewards/desirable", "rewards/undesirable"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), (expected["step"], name)
    expected, found = weights_of(plain), weights_of(config)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= TOLERANCE * torch.norm(tensor), name

"""A pass killed by a real signal, at any moment, of any rank: what was stored stays, and the next one goes on."""

import contextlib
import importlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from ranks import run_ranks
from test_reference import logps_of_pairs, scored_and_found
from tiny_runs import tiny_config

from kto_dist.config import Config


def _counted(config: Config, shard: int) -> int:
    """On every rank: a pass with shards of so many pairs; what this rank scores is noted in a file, batch by batch."""
    module = importlib.import_module("kto_dist.reference")
    module.FIRST_SHARD = module.LARGEST_SHARD = shard
    notes = os.open(f"{config.train.output}-scored", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    score = module.completion_logps

    def noting(forward, batch, *arguments):
        scored = score(forward, batch, *arguments)
        os.write(notes, f"{batch.lengths.numel()}\n".encode())
        return scored

    module.completion_logps = noting
    try:
        return scored_and_found(config)[0]
    finally:
        module.completion_logps = score


def _killed(config: Config, shard: int, victim: int, after: float) -> None:
    """`after` seconds into the pass a process of its own sends SIGKILL to this rank."""
    if int(os.environ["RANK"]) == victim:
        subprocess.Popen(["sh", "-c", f"sleep {after}; kill -9 {os.getpid()}"])
    _counted(config, shard)


def kill_and_resume(tmp_path: Path, model: Path, log: Path, seed: int, kills: int) -> None:
    """Kills a random rank at random moments; each pass has a world size and token budget of its own."""
    draw = random.Random(seed)
    shard, lost = 8, 0

    def config(**changes):
        return tiny_config(tmp_path, model, log, **changes)

    for _ in range(kills):
        world = draw.choice((1, 2))
        changed = config(
            reference__tokens_per_batch=draw.choice((96, 200, 512)), reference__share_prefixes=draw.random() < 0.5
        )
        with contextlib.suppress(RuntimeError):  # or the pass was over before the signal came
            run_ranks(_killed, world, changed, shard, draw.randrange(world), draw.uniform(0.02, 0.6))
        lost += world * shard
    run_ranks(_counted, 2, config(), shard)
    scored = sum(map(int, Path(f"{config().train.output}-scored").read_text().split()))
    (values,) = run_ranks(logps_of_pairs, 1, config())
    undisturbed = config(reference__store=str(tmp_path / "other"))
    (expected,) = run_ranks(logps_of_pairs, 1, undisturbed)
    assert values == pytest.approx(expected, rel=1e-5)
    assert run_ranks(scored_and_found, 1, config())[0][0] == 0
    # of the pairs of the undisturbed pass nothing was scored twice but what the kills interrupted
    assert len(values) <= scored <= len(values) + lost


@pytest.mark.parametrize("seed", range(2))
def test_a_pass_killed_at_any_moment_loses_a_shard_a_rank_at_most(tmp_path, tiny_model, tiny_log, seed):
    kill_and_resume(tmp_path, tiny_model, tiny_log, seed, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 115))
def test_many_kills_lose_a_shard_a_rank_each_at_most(tmp_path, tiny_model, tiny_log, seed):
    kill_and_resume(tmp_path, tiny_model, tiny_log, seed, kills=10)


def _die_after_a_window(config: Config) -> None:
    module = importlib.import_module("kto_dist.reference")
    module.FIRST_SHARD = module.LARGEST_SHARD = 32
    add, windows = module.Store.add, []

    def deadly(*arguments):
        if windows:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*arguments)
        windows.append(1)

    module.Store.add = deadly
    scored_and_found(config)


def test_a_killed_pass_goes_on_where_it_was(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__share_prefixes=False)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(_die_after_a_window, 1, config)
    scored, found = run_ranks(scored_and_found, 1, config)[0]
    assert found == 32 and scored

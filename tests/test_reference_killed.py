"""A pass killed by a real signal, at any moment, of any rank: what was stored stays, and the next one goes on."""

import os
import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from reference_runs import Noted, fixed, logps_of_pairs, noted, score, scored_and_found, with_forward
from tiny_runs import tiny_config

from kto_dist.reference.progress import Progress
from kto_dist.store.tools import summarise
from kto_dist.training.config import Config


def _counted(config: Config, shard: int, after_batch: Callable[[int], None] = lambda batches: None) -> None:
    """On every rank: a pass with shards of so many pairs."""
    notes = Noted(config, after_batch)
    score(config, shard=fixed(shard), engine=with_forward(notes.wrap), watch=notes.watch)


def _killed(config: Config, shard: int, victim: int, batches: int, after: float) -> None:
    """`after` seconds from this rank's batch number `batches` on, a process of its own sends SIGKILL to it.

    Without `after` the rank waits for it.
    """

    def kill(done: int) -> None:
        if int(os.environ["RANK"]) == victim and done == batches:
            killer = subprocess.Popen(["sh", "-c", f"sleep {after}; kill -9 {os.getpid()}"])
            if not after:
                killer.wait()

    _counted(config, shard, kill)


def _resumed(config: Config, shard: int) -> np.ndarray:
    _counted(config, shard)
    return logps_of_pairs(config)


def _dies(world: int, *arguments: object) -> bool:
    """Whether a rank died in the pass. Raises what went wrong otherwise."""
    try:
        run_ranks(_killed, world, *arguments)
    except RuntimeError as error:
        # the rank itself, or what another one has of it
        if not re.search(r"died without a result|[Cc]onnection (closed|reset) by peer|Broken pipe", str(error)):
            raise
        return True
    return False


def _stored(config: Config) -> int:
    return (
        sum(model.pairs for model in summarise(config.reference.store)) if Path(config.reference.store).exists() else 0
    )


def kill_and_resume(tmp_path: Path, model: Path, log: Path, seed: int, kills: int) -> None:
    """Kills a random rank at random moments; each pass has a world size and tokens per batch of its own."""
    draw = random.Random(seed)
    shard, lost, hits = 8, 0, 0

    def config(**changes):
        return tiny_config(tmp_path, model, log, **changes)

    undisturbed = config(reference__store=str(tmp_path / "other"))
    (expected,) = run_ranks(logps_of_pairs, 1, undisturbed)
    pairs = _stored(undisturbed)
    for kill in range(kills):
        world = draw.choice((1, 2))
        changed = config(
            reference__tokens_per_batch=draw.choice((96, 200, 512)), reference__share_prefixes=draw.random() < 0.5
        )
        # late enough for several shards to be at stake; the first one surely before the last of them
        after = draw.uniform(0.001, 0.1) if kill else 0.0
        died = _dies(world, changed, shard, draw.randrange(world), draw.randint(4, 7), after)
        # otherwise the pass was over, and had nothing left to lose
        if died and _stored(config()) < pairs:
            hits, lost = hits + 1, lost + world * shard
    assert hits
    values, _ = run_ranks(_resumed, 2, config(), shard)
    scored = noted(config())
    assert values == pytest.approx(expected, rel=1e-5)
    assert _stored(config()) == pairs
    # of the pairs of the undisturbed pass nothing was scored twice but what the kills interrupted
    assert pairs <= scored <= pairs + lost


@pytest.mark.parametrize("seed", range(2))
def test_a_pass_killed_at_any_moment_loses_a_shard_a_rank_at_most(tmp_path, tiny_model, tiny_log, seed):
    kill_and_resume(tmp_path, tiny_model, tiny_log, seed, kills=2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 115))
def test_many_kills_lose_a_shard_a_rank_each_at_most(tmp_path, tiny_model, tiny_log, seed):
    kill_and_resume(tmp_path, tiny_model, tiny_log, seed, kills=10)


def _die_within_the_second_shard(config: Config) -> None:
    """The last rank does, when its first shard is written and its second one is not."""
    last = int(os.environ["WORLD_SIZE"]) - 1

    def die(progress: Progress) -> None:
        if progress.done > 16 * (last + 1) and int(os.environ["RANK"]) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    score(config, shard=fixed(16), watch=die)


@pytest.mark.parametrize("world", (1, 2))
def test_a_killed_pass_goes_on_where_it_was(tmp_path, tiny_model, tiny_log, world):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__share_prefixes=False)
    with pytest.raises(RuntimeError, match="died|onnection"):
        run_ranks(_die_within_the_second_shard, world, config)
    scored, found = run_ranks(scored_and_found, world, config)[0]
    # the first shard of every rank, and the second one of those that lived on
    assert scored and 16 * world <= found < 32 * world
    if world == 1:
        assert found == 16

"""How fast the ranks of a job reach each other: `python -m kto_dist.cluster.allreduce`, on every rank.

In:  the launcher's environment. Out: on rank 0 a line: latency of a small all-reduce, bandwidth of a large one.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.exits import DONE, MISTAKE, leave
from kto_dist.base.processes import die_with_parent

_SMALL, _LARGE = 20, 3
"""Times."""
_MEBIBYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Of an all-reduce over all ranks."""

    latency: float
    """Seconds for 4 bytes."""
    bandwidth: float
    """Bytes a second that every rank sends and receives in a ring, of a large one."""


def links() -> Links:
    """Collective."""
    device, ranks = comm.device(), comm.world_size()
    small, large = torch.zeros(1, device=device), torch.zeros(_MEBIBYTES * 2**18, device=device)
    for warm in (small, large):  # the first one opens connections
        comm.sum_(warm, comm.WORLD)
    latency = _seconds(lambda: comm.sum_(small, comm.WORLD), _SMALL)
    seconds = _seconds(lambda: comm.sum_(large, comm.WORLD), _LARGE)
    # what every rank sends and receives in a ring
    return Links(latency=latency, bandwidth=2 * (ranks - 1) / ranks * _MEBIBYTES * 2**20 / seconds)


def measure() -> str:
    """Collective."""
    found = links()
    return (
        f"all-reduce of {comm.world_size()} ranks on {comm.device().type}: {1e3 * found.latency:.2f} ms for 4 bytes, "
        f"{found.bandwidth / 1e9:.2f} GB/s for {_MEBIBYTES} MiB"
    )


def _seconds(work: Callable[[], object], times: int) -> float:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    if comm.device().type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def told_by_rank_0(measured: Callable[[], str]) -> int:
    """The whole of a program that every rank runs: what the ranks measure together, as a line of rank 0. The exit
    status."""
    die_with_parent()
    try:
        comm.init()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        return MISTAKE
    text = measured()
    if comm.is_main():
        print(text, flush=True)
    comm.barrier()
    comm.shutdown()
    return DONE


if __name__ == "__main__":
    leave(told_by_rank_0(measure))

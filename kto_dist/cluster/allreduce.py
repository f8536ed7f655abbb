"""How fast the ranks of a job reach each other: `python -m kto_dist.cluster.allreduce`, on every rank.

In:  the launcher's environment. Out: on rank 0 a line: latency of a small all-reduce, bandwidth of a large one.
"""

import sys
import time
from collections.abc import Callable

import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.exits import DONE, MISTAKE, leave
from kto_dist.base.processes import die_with_parent

_SMALL, _LARGE = 20, 3
"""Times."""
_MEBIBYTES = 64


def measure() -> str:
    """Collective."""
    device = comm.device()
    small, large = torch.zeros(1, device=device), torch.zeros(_MEBIBYTES * 2**18, device=device)
    comm.sum_(small, comm.WORLD)  # the first one opens connections
    latency = _seconds(lambda: comm.sum_(small, comm.WORLD), _SMALL)
    seconds = _seconds(lambda: comm.sum_(large, comm.WORLD), _LARGE)
    ranks = comm.world_size()
    # what every rank sends and receives in a ring
    bandwidth = 2 * (ranks - 1) / ranks * _MEBIBYTES * 2**20 / seconds
    return (
        f"all-reduce of {ranks} ranks on {device.type}: {1e3 * latency:.2f} ms for 4 bytes, "
        f"{bandwidth / 1e9:.2f} GB/s for {_MEBIBYTES} MiB"
    )


def _seconds(work: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    if comm.device().type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def main() -> int:
    die_with_parent()
    try:
        comm.init()
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        return MISTAKE
    text = measure()
    if comm.is_main():
        print(text, flush=True)
    comm.barrier()
    comm.shutdown()
    return DONE


if __name__ == "__main__":
    leave(main())

"""What this machine gives its ranks when all of them work at once: `python -m kto_dist.cluster.rates`, on every rank.

In:  how many ranks. Out: `Rates`: of a processor the rate of its matmuls and copies, and how much slower the host's own
work is than beside idle ranks; of several ranks the links between them. A GPU's rates are not asked for: what a run
takes of what is computed from the maker's says more.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.exits import leave
from kto_dist.base.ports import held_port
from kto_dist.cluster.allreduce import Links, links, told_by_rank_0
from kto_dist.model.causal_lm import pick_dtype

_SECONDS = 0.5
"""That each rate is measured for."""
_LIMIT = 300.0
"""Seconds until ranks that say nothing are given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of each rank, while the others do the same."""

    flops: float
    """FLOP a second of its matmuls, in bf16 where that is what training uses; 0 of a GPU, which was not asked."""
    bandwidth: float
    """Bytes read and written a second; 0 of a GPU."""
    crowding: float = 1.0
    """Times what the host's own work takes while the other ranks wait."""
    links: Links | None = None
    """None of a rank alone."""


def rates(ranks: int = 1, threads: int | None = None) -> Rates:
    """`threads`: of a rank; None: all cores, divided among the ranks as the launcher does it. Takes a second of a rank
    alone, and as long as a process takes to start of several. Raises `UserError` where they do not meet."""
    if ranks > 1:
        with held_port() as port:
            return _of_processes(ranks, threads or max(1, (os.cpu_count() or 1) // ranks), port)
    with _threads(threads):
        return Rates(flops=_matmul_rate(), bandwidth=_copy_rate())


def _of_processes(ranks: int, threads: int, port: int) -> Rates:
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "kto_dist.cluster.rates"]
        environment = dict(os.environ) | meeting | own
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        said = [process.communicate(timeout=_LIMIT) for process in processes]
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{ranks} ranks of this machine have not measured their links in {_LIMIT:.0f} s: check that they reach "
            "each other (kto-dist launch with this host alone says more)"
        ) from None
    finally:
        for process in processes:
            process.kill()
    failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]
    if failed:
        rank, status = failed[0]
        reason = (said[rank][1].strip().splitlines() or ["no word of why"])[-1]
        raise UserError(f"{ranks} ranks of this machine could not measure their links: rank {rank}, {status}: {reason}")
    return read(json.loads(said[0][0].strip().splitlines()[-1]))


def read(found: dict[str, Any]) -> Rates:
    """Of plain values, as `asdict` gives them."""
    return Rates(**{**found, "links": Links(**found["links"]) if found["links"] else None})


def _measured() -> Rates:
    """Collective, of several ranks."""
    found = {"flops": 0.0, "bandwidth": 0.0, "crowding": 1.0}
    if comm.device().type == "cpu":
        alone = _host_work() if comm.is_main() else 0.0
        comm.barrier()
        beside = _host_work()
        comm.barrier()
        found["flops"] = _matmul_rate()
        comm.barrier()
        found["bandwidth"] = _copy_rate()
        alone = comm.broadcast(alone)
        found["crowding"] = max(1.0, beside / alone)
    all_ranks = comm.gather(found)
    # ranks wait for the slowest
    slowest = {name: min(each[name] for each in all_ranks) for name in ("flops", "bandwidth")}
    crowding = max(each["crowding"] for each in all_ranks)
    return Rates(**slowest, crowding=crowding, links=links())


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matmul_rate(size: int = 1024) -> float:
    a = torch.ones(size, size, dtype=pick_dtype("auto", torch.device("cpu")))
    return 2 * size**3 / _median(lambda: a @ a)


def _copy_rate(size: int = 2**26) -> float:
    a, b = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / _median(lambda: b.copy_(a))


def _host_work(operations: int = 1000) -> float:
    """Seconds of what a step does beside its arithmetic: Python that calls operations of a few numbers."""
    few = torch.ones(8)

    def work() -> None:
        for _ in range(operations):
            few.add(1.0)

    return _median(work)


def _median(work: Callable[[], object]) -> float:
    work()  # memory is taken, kernels are chosen
    seconds: list[float] = []
    ends = time.perf_counter() + _SECONDS
    while time.perf_counter() < ends or len(seconds) < 3:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    leave(told_by_rank_0(lambda: json.dumps(asdict(_measured()))))

"""Ranks: who am I, sums over a group of them, and values that all get. Identity at world size 1.

A sum names the group that it runs over; barriers, broadcasts and what ranks agree on are always of the world.
The launcher's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) name the ranks; without
them this is a single process, which gets a process group of its own, since DeepSpeed wants one.
"""

import ctypes
import os
from datetime import timedelta
from enum import Enum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not re-export it

from kto_dist.base import doing
from kto_dist.base.meeting import meet

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""Until a run has said another one: `set_timeout`."""

NO_PORT = "0"
"""`MASTER_PORT` of a single process: it has nobody to meet, so that it opens no port which another could take."""
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": NO_PORT}
"""The environment of a single process."""


class Group(Enum):
    """Who takes part. Sequences are whole here: every rank has rows of its own, so that `DATA` is the world."""

    WORLD = "all ranks"
    DATA = "the ranks that a step's rows are divided among: z0, metrics, gradients"
    SEQUENCE = "the ranks that one sequence is divided among: each rank alone"


WORLD, DATA, SEQUENCE = Group.WORLD, Group.DATA, Group.SEQUENCE


def stay_alone() -> None:
    """Ahead of `init`: this process joins nobody, whatever started it."""
    os.environ["MASTER_PORT"] = NO_PORT


def init() -> None:
    """Joins the process group; a second call does nothing."""
    if dist.is_initialized():
        return
    alone = "RANK" not in os.environ or os.environ.get("MASTER_PORT") == NO_PORT
    if alone:
        # DeepSpeed reads them; a process that this one starts inherits them, and is alone as well
        os.environ.update(ALONE)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    else:
        _keep_large_blocks()
    # Both backends: values on the host (keys, messages, sums) never travel through the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if alone:
        dist.init_process_group(backend, timeout=TIMEOUT, store=HashStore(), rank=0, world_size=1)
    else:
        own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=TIMEOUT, store=meet(own, ranks, TIMEOUT), rank=own, world_size=ranks)


def _keep_large_blocks() -> None:
    """Lets glibc reuse logits-sized blocks instead of mapping them afresh for every operation: on the CPU page faults
    took 15 % of a training step. What is free is still given back where `malloc_trim` is called."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def set_timeout(seconds: float) -> None:
    """How long ranks wait for each other in a collective: in the groups that there are now, and in those to come of
    which `apply_timeout` is told."""
    _patience.seconds = seconds
    apply_timeout()


def timeout() -> float:
    return _patience.seconds


def apply_timeout() -> None:
    """After somebody has made groups: DeepSpeed's would wait torch's half an hour, whatever ours do."""
    if world_size() == 1:
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=_patience.seconds), group)


class _Patience:
    seconds = TIMEOUT.total_seconds()


_patience = _Patience()


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank(group: Group = WORLD) -> int:
    """This process's number in the group."""
    return dist.get_rank() if dist.is_initialized() and group is not SEQUENCE else 0


def size(group: Group) -> int:
    """Ranks of the group."""
    return dist.get_world_size() if dist.is_initialized() and group is not SEQUENCE else 1


def world_size() -> int:
    return size(WORLD)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(device_ids=[local_rank()] if torch.cuda.is_available() else None)
        doing.count()


def sum_(values: Tensor, group: Group) -> Tensor:
    """Sum over the group's ranks, in place; the tensor lives on the CPU or the device."""
    if size(group) > 1:
        dist.all_reduce(values)
        doing.count()
    return values


def min_(values: Tensor, group: Group) -> Tensor:
    """Minimum over the group's ranks, in place."""
    if size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        doing.count()
    return values


def any_(flag: bool) -> bool:
    """True everywhere when it is true on some rank of the world."""
    return bool(sum_(torch.tensor([int(flag)]), WORLD)[0])


def broadcast(value: T) -> T:
    """Rank 0's picklable value, on every rank of the world."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        doing.count()
    return box[0]


def from_(source: int, values: Tensor) -> Tensor:
    """The values of one rank, on the CPU, in place of those of the others."""
    if world_size() > 1:
        dist.broadcast(values, source)
        doing.count()
    return values


def gather(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank of the world."""
    boxes = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(boxes, value)
        doing.count()
    return boxes

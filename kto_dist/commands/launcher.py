"""The deepspeed launcher on this machine, stopped as a whole; a single rank is started without it.

`deepspeed` itself, when it is told to terminate, exits and leaves its ranks running, and its helper kills ranks that
take more than 30 seconds to save. Here the launcher and the ranks form one process group of their own: a signal goes to
the ranks, which save and end, the launcher ends with them, and nothing of the group stays behind. When this process
itself is killed, its ranks die with it. `deepspeed` also reports success when one of its own processes is killed, so
rank 0 leaves a mark when the job is done. A single rank has nobody to be launched beside: it is started directly, since
`deepspeed` is two more processes, one after the other, that import torch before the rank may.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from kto_dist.base import comm
from kto_dist.base.exits import DONE_MARK, LAUNCHER
from kto_dist.base.ports import held_port
from kto_dist.base.processes import whereabouts
from kto_dist.base.signals import stops_to

# A rank finishes its step and saves a checkpoint before it ends.
GRACE_SECONDS = 600
# What every rank runs.
ENTRY = "kto_dist.commands.entry"

DONE = ".done-"
"""How the name of the mark begins."""

Start = Callable[..., subprocess.Popen[bytes]]


def run(
    job: str,
    arguments: list[str],
    ranks: int | None = None,
    *,
    folder: Path,
    grace: float = GRACE_SECONDS,
    start: Start = subprocess.Popen,
) -> int:
    """Runs a job of `kto_dist.commands.entry` on every rank. Returns the exit status, 128 + n after signal n.

    `ranks`: processes; None is one a GPU, or without GPUs one a core up to two. `folder`: the run's own, where rank 0
    leaves a mark at the end; cleaners of temporary folders don't come there. `grace`: seconds that ranks have to save
    and end after a signal. `start`: makes the launcher's process.
    """
    mark = folder.absolute() / f"{DONE}{uuid.uuid4().hex}"
    environment = dict(os.environ) | {DONE_MARK: str(mark), LAUNCHER: json.dumps(whereabouts())}
    with held_port() as port:
        status = _run(job, arguments, ranks, port, environment, grace, start)
    if not mark.exists():
        if status == 0:
            print(f"error: the ranks ended without finishing {job}", file=sys.stderr, flush=True)
        return status or 1
    mark.unlink()
    return status


def _run(
    job: str,
    arguments: list[str],
    ranks: int | None,
    port: int,
    environment: dict[str, str],
    grace: float,
    start: Start,
) -> int:
    if not torch.cuda.is_available():
        # without GPUs: one a core, but two at the most, since more ranks only split the same cores
        ranks = ranks or min(2, os.cpu_count() or 1)
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # each rank would otherwise start a thread a core, and they would fight for them
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if ranks == 1 or (not ranks and torch.cuda.device_count() == 1):
        environment |= comm.ALONE
        command = [sys.executable, "-u", "-m", ENTRY, job, *arguments]
    else:
        command = [*_deepspeed(ranks, port), ENTRY, job, *arguments]
    child = start(command, env=environment, start_new_session=True)

    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        ranks_now = _ranks_of(child.pid)
        for process in ranks_now:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        if not ranks_now:  # they have not started yet
            _signal_group(child.pid, signal.SIGTERM)

    with stops_to(forward):
        try:
            status = child.wait()
            _wait_for_group(child.pid, grace if received else 30)
        finally:
            _signal_group(child.pid, signal.SIGKILL)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def _deepspeed(ranks: int | None, port: int) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical"]
    if ranks:
        # not given for all GPUs: the launcher would overrule CUDA_VISIBLE_DEVICES
        command += ["--num_gpus", str(ranks)]
    return [*command, "--master_port", str(port), "--module"]


def _ranks_of(pid: int) -> list[psutil.Process]:
    """The processes that run `ENTRY`, without DeepSpeed's own, whose command lines name it as well."""
    ranks = []
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(pid)
        for process in [child, *child.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                if ENTRY in words and not any(word.startswith("deepspeed.launcher") for word in words):
                    ranks.append(process)
    return ranks


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # everyone has ended
        os.killpg(group, number)


def _wait_for_group(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)

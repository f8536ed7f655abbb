"""The faults of `cluster_faults.py`: each disturbs a job of two hosts once. A new kind is a row of `KINDS`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster_faults import Trial
    from nodes import Nodes

FIRST, OTHER = "node-a", "node-b"
SLOW_SECONDS = 8.0
_FILLER = "filler"


def nothing(trial: Trial) -> None:
    """Where a fault needs no mending."""


def usual_disks(nodes: Nodes) -> AbstractContextManager[None]:
    return nullcontext()


def rank_gets(number: int) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        os.kill(trial.nodes.ranks()[trial.draw.randrange(2)], number)

    return inject


def launcher_gets(number: int) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        assert trial.job is not None
        trial.job.signal(number)

    return inject


def slow(trial: Trial) -> None:
    """One rank stands still for some seconds, fewer than `cluster.timeout`."""
    rank_gets(signal.SIGSTOP)(trial)

    def wake() -> None:
        time.sleep(SLOW_SECONDS)
        for pid in trial.nodes.ranks().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    threading.Thread(target=wake, daemon=True).start()


def off(*names: str) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        for name in names:
            trial.nodes.kill(name)

    return inject


def on(trial: Trial) -> None:
    for name in trial.nodes.names:
        if not trial.nodes.runs(name):
            trial.nodes.start(name)


@contextmanager
def small_disk(nodes: Nodes) -> Iterator[None]:
    disk = nodes.seen(OTHER, nodes.disk)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(trial: Trial) -> None:
    """All but some bytes, which a checkpoint does not go into; what the run itself gives free is taken as well."""
    disk, job = trial.nodes.seen(OTHER, trial.nodes.disk), trial.job
    assert job is not None

    def keep_full() -> None:
        while job.runs():
            room = shutil.disk_usage(disk).free - 16 * 1024
            with suppress(OSError), (disk / _FILLER).open("ab") as filler:
                filler.write(bytes(max(0, room)))
            time.sleep(0.01)

    threading.Thread(target=keep_full, daemon=True).start()


def make_room(trial: Trial) -> None:
    assert trial.job is not None
    while trial.job.runs():
        time.sleep(0.02)
    time.sleep(0.5)  # the filling ends with the job
    (trial.nodes.seen(OTHER, trial.nodes.disk) / _FILLER).unlink(missing_ok=True)


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def damage(trial: Trial) -> None:
    """A flipped bit in the newest checkpoint of one host; everything has been switched off."""
    off(*trial.nodes.names)(trial)
    files = sorted(path for path in _newest(trial.run(OTHER)).rglob("*") if path.is_file() and path.stat().st_size)
    file = trial.draw.choice(files)
    content = bytearray(file.read_bytes())
    content[trial.draw.randrange(len(content))] ^= 1 << trial.draw.randrange(8)
    file.write_bytes(content)


def lose_disk(trial: Trial) -> None:
    """Everything has been switched off, and one host comes back with an empty disk; its copy is put back later."""
    off(*trial.nodes.names)(trial)
    trial.run(OTHER).rename(trial.nodes.folder / "copy")


def put_back(trial: Trial) -> None:
    """As its user does it, once a start has said what is missing."""
    on(trial)
    job = trial.start()
    if job.wait(300.0) != 2:
        raise RuntimeError(f"a start with a lost disk was not refused:\n{trial.words()}")
    shutil.rmtree(trial.run(OTHER), ignore_errors=True)
    (trial.nodes.folder / "copy").rename(trial.run(OTHER))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of the table."""

    name: str
    title: str
    inject: Callable[[Trial], None]
    names: tuple[str, ...]
    """What has to be said of it, as regular expressions; nothing where nobody is left who could."""
    mend: Callable[[Trial], None] = nothing
    """When it is noticed, or the job has ended."""
    itself: bool = False
    """Whether the launcher starts it again; else the same command does."""
    goes_on: bool = False
    """Whether nothing has to be started again."""
    disks: Callable[[Nodes], AbstractContextManager[None]] = usual_disks


_OF_RANK = r"node-[ab] \(rank [01]\)"

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="rank-killed",
            title="SIGKILL of a rank",
            inject=rank_gets(signal.SIGKILL),
            names=(r"rank [01] on node-[ab] was killed by signal 9",),
            itself=True,
        ),
        Kind(
            name="rank-stopped",
            title="a rank stops for good",
            inject=rank_gets(signal.SIGSTOP),
            names=(_OF_RANK + ": nothing was heard",),
            itself=True,
        ),
        Kind(
            name="host-off",
            title="a host is switched off, and on again",
            inject=off(OTHER),
            mend=on,
            names=(r"node-b \(rank 1\): nothing was heard", "last seen in phase", "node-b is lost"),
            itself=True,
        ),
        Kind(
            name="link-down",
            title="a host's link is down until that is noticed",
            inject=lambda trial: trial.nodes.cut(OTHER),
            mend=lambda trial: trial.nodes.mend(OTHER),
            names=(r"node-[ab] \(rank [01]\): nothing was heard|node-b is lost",),
            itself=True,
        ),
        Kind(
            name="launcher-killed",
            title="SIGKILL of the launching process",
            inject=launcher_gets(signal.SIGKILL),
            names=(),
        ),
        Kind(name="all-off", title="all hosts are switched off", inject=off(FIRST, OTHER), mend=on, names=()),
        Kind(
            name="sigterm",
            title="SIGTERM, with 20 s left",
            inject=launcher_gets(signal.SIGTERM),
            names=(r"stopped by a signal after step \d+",),
        ),
        Kind(
            name="slow",
            title=f"a rank stands still for {SLOW_SECONDS:g} s",
            inject=slow,
            names=(),
            goes_on=True,
        ),
        Kind(
            name="disk-full",
            title="one host's disk is full when a checkpoint is due",
            inject=fill,
            mend=make_room,
            names=("is full: make room", "node-b"),
            disks=small_disk,
        ),
        Kind(
            name="damaged",
            title="all off, and a bit of one host's newest checkpoint is flipped",
            inject=damage,
            mend=on,
            names=("is damaged: .*it is passed over|is not on node-b",),
        ),
        Kind(
            name="disk-lost",
            title="all off, one host's disk is empty, and a copy is put back",
            inject=lose_disk,
            mend=put_back,
            names=(r"node-b \(rank 1\) has none: bring back",),
        ),
    )
}

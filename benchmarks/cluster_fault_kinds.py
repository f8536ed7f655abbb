"""The faults of `cluster_faults.py`: each disturbs a job of two hosts. A new kind is a row of `KINDS`."""

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

import cluster_mlflow

if TYPE_CHECKING:
    from cluster_job import Trial
    from nodes import Nodes

FIRST, OTHER = "node-a", "node-b"
SLOW_SECONDS = 6.0
SLOW_LINK = "2mbit"
"""A step's gradients are 0.5 MB."""
_FILLER = "filler"


def nothing(trial: Trial) -> None:
    """Where a fault needs no mending."""


def no_help(trial: Trial) -> bool:
    return False


def usual_disks(nodes: Nodes) -> AbstractContextManager[None]:
    return nullcontext()


def rank_gets(number: int) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        ranks = trial.nodes.ranks()
        with suppress(ProcessLookupError):
            os.kill(ranks[trial.draw.choice(sorted(ranks))], number)

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


def slow_link(trial: Trial) -> None:
    """Until some steps are made, or the job has ended."""
    first = trial.done()
    trial.nodes.slow(OTHER, SLOW_LINK)

    def quicken() -> None:
        while trial.runs() and trial.done() < first + 4:
            time.sleep(0.1)
        with suppress(RuntimeError):
            trial.nodes.quicken(OTHER)

    threading.Thread(target=quicken, daemon=True).start()


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


def fill(room: int) -> Callable[[Trial], None]:
    """All of a disk but so many bytes; what the job itself gives free is taken as well."""

    def inject(trial: Trial) -> None:
        disk, job = trial.nodes.seen(OTHER, trial.nodes.disk), trial.job
        assert job is not None

        def take_all() -> None:
            with suppress(OSError), (disk / _FILLER).open("ab") as filler:
                filler.write(bytes(max(0, shutil.disk_usage(disk).free - room)))

        def keep_full() -> None:
            while job.runs():
                take_all()
                time.sleep(0.01)

        take_all()
        threading.Thread(target=keep_full, daemon=True).start()

    return inject


def make_room(trial: Trial) -> None:
    while trial.runs():
        time.sleep(0.02)
    time.sleep(0.5)  # the filling ends with the job
    (trial.nodes.seen(OTHER, trial.nodes.disk) / _FILLER).unlink(missing_ok=True)


def _checkpoints(trial: Trial, name: str) -> list[Path]:
    return sorted((trial.run(name) / "checkpoints").glob("step-*"))


def has_checkpoints(number: int) -> Callable[[Trial], bool]:
    def ready(trial: Trial) -> bool:
        found = ({path.name for path in _checkpoints(trial, name)} for name in trial.nodes.names)
        return len(set.intersection(*found)) >= number

    return ready


def scores(trial: Trial) -> bool:
    """Whether the other host's store has been opened for writing."""
    return any(trial.nodes.seen(OTHER, trial.nodes.disk / "store").glob("*/use-*"))


def damage(trial: Trial) -> None:
    """A flipped bit in the newest checkpoint of one host; everything has been switched off."""
    off(*trial.nodes.names)(trial)
    newest = _checkpoints(trial, OTHER)[-1]
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
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
        raise RuntimeError("a start with a lost disk was not refused")
    shutil.rmtree(trial.run(OTHER), ignore_errors=True)
    (trial.nodes.folder / "copy").rename(trial.run(OTHER))


def further(trial: Trial, made: int) -> bool:
    """Whether the job has made a step since, and not only ended one that was under way."""
    return trial.done() > made + 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of the table."""

    name: str
    title: str
    inject: Callable[[Trial], None]
    names: tuple[str, ...]
    """What has to be said of it, as regular expressions; nothing where nobody is left who could."""
    early: tuple[str, ...] | None = None
    """The same where it hits a job that is starting; None: it does not."""
    ready: Callable[[Trial], bool] = lambda trial: True
    """Whether it may come."""
    mend: Callable[[Trial], None] = nothing
    """When it is noticed, or the command has ended."""
    itself: bool = False
    """Whether the launcher starts the job again, once; else, and the next time, the same command does."""
    goes_on: bool = False
    """Whether nothing has to be started again."""
    several: bool = True
    """Whether a job can be hit several times."""
    starting: bool = False
    """Whether it hits a job that is starting, as soon as it is `ready`."""
    words: tuple[str, ...] = ()
    """Overrides."""
    without: tuple[str, ...] = ()
    """Of what the undisturbed job has left, what is not there."""
    disks: Callable[[Nodes], AbstractContextManager[None]] = usual_disks
    begin: Callable[[Trial], None] = nothing
    """Before the first start."""
    reaches: Callable[[Trial, int], bool] = further
    """Where it goes on: whether it is further than so many steps."""
    settle: Callable[[Trial], bool] = no_help
    """What its user does when the job has ended; whether there was anything to do."""
    judge: Callable[[Trial], str] = lambda trial: ""
    """What is wrong when all is over, beside metrics and weights."""


_OF_RANK = r"node-[ab] \(rank [01]\)"

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="rank-killed",
            title="SIGKILL of a rank",
            inject=rank_gets(signal.SIGKILL),
            names=(r"rank [01] on node-[ab] was killed by signal 9",),
            early=(r"rank [01] on node-[ab] was killed by signal 9",),
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
            early=("node-b is lost",),
            itself=True,
        ),
        Kind(
            name="first-off",
            title="the launching host is switched off, and on again",
            inject=off(FIRST),
            mend=on,
            names=(),
            early=(),
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
            early=(),
        ),
        Kind(
            name="all-off",
            title="all hosts are switched off",
            inject=off(FIRST, OTHER),
            mend=on,
            names=(),
            early=(),
        ),
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
            name="slow-link",
            title="a host's link takes 2 Mbit/s for four steps",
            inject=slow_link,
            names=(),
            ready=lambda trial: not trial.nodes.is_slow(OTHER),
            goes_on=True,
        ),
        Kind(
            name="disk-full",
            title="one host's disk is full when a checkpoint is due",
            inject=fill(16 * 1024),
            mend=make_room,
            names=("is full: make room", "node-b"),
            disks=small_disk,
        ),
        Kind(
            name="store-full",
            title="one host's disk is full in the midst of the reference's pass",
            inject=fill(0),
            mend=make_room,
            names=(),
            early=(r"reference\.store .*(is full: make room|make room, or give another)", "node-b"),
            ready=scores,
            several=False,
            starting=True,
            without=("store",),
            disks=small_disk,
        ),
        Kind(
            name="damaged",
            title="all off, and a bit of one host's newest checkpoint is flipped",
            inject=damage,
            ready=has_checkpoints(2),
            mend=on,
            names=("is damaged: .*it is passed over|is not on node-b",),
        ),
        Kind(
            name="disk-lost",
            title="all off, one host's disk is empty, and a copy is put back",
            inject=lose_disk,
            ready=has_checkpoints(1),
            mend=put_back,
            names=(r"node-b \(rank 1\) has none: bring back",),
        ),
        Kind(
            name="mlflow",
            title="MLflow's server is killed, and is back up to 15 s later",
            inject=cluster_mlflow.kill,
            names=("warning: MLflow at .* failed",),
            goes_on=True,
            several=False,
            words=cluster_mlflow.WORDS,
            begin=cluster_mlflow.begin,
            reaches=cluster_mlflow.has_beyond,
            settle=cluster_mlflow.settle,
            judge=cluster_mlflow.judge,
        ),
    )
}

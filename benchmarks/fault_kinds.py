"""The faults of `faults.py`: each disturbs a run once. A new kind is a row of `KINDS`."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults import Trial

Disk = Callable[[Path, int, random.Random], AbstractContextManager[bool]]
"""(folder, bytes that a run writes, chance) -> whether it can be used"""


def usual_disk(folder: Path, size: int, draw: random.Random) -> AbstractContextManager[bool]:
    return nullcontext(True)


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    words = ["mount", "-t", "tmpfs", *(["-o", options] if options else []), "tmpfs", str(folder)]
    usable = shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield usable
    finally:
        if usable:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def small_disk(folder: Path, size: int, draw: random.Random) -> AbstractContextManager[bool]:
    return _mounted(folder, f"size={int(size * draw.uniform(0.05, 0.9)) // 1024 + 8}k")


def own_disk(folder: Path, size: int, draw: random.Random) -> AbstractContextManager[bool]:
    return _mounted(folder, "")


def _remount(trial: Trial, how: str) -> bool:
    words = ["mount", "-o", f"remount,{how}", str(trial.folder / "disk")]
    return subprocess.run(words, capture_output=True).returncode == 0


def full(trial: Trial) -> bool:
    """A disk that fills up; its user then makes room."""
    status, words = trial.again()
    if status == 0:  # there was room after all
        return False
    if reason := trial.refused(status, words):
        trial.wrong.append(reason)
    return _remount(trial, "size=512m")


def read_only(trial: Trial) -> bool:
    """A disk that has turned read-only when a killed run is started again; its user then makes it writable.

    In the midst of a run a disk cannot be remounted so: the lock in the run's folder is open for writing.
    """
    if not signalled(signal.SIGKILL)(trial) or not _remount(trial, "ro"):
        return False
    status, words = trial.again()
    if reason := trial.refused(status, words):
        trial.wrong.append(reason)
    return _remount(trial, "rw")


def signalled(number: int, *, one: bool = False, times: int = 1) -> Callable[[Trial], bool]:
    """At random moments, to all ranks as a launcher does it, or to one of them."""

    def inject(trial: Trial) -> bool:
        hit = False
        for _ in range(times):
            done, job = trial.steps_done(), trial.start()
            running = trial.wait_for_a_moment(job)
            job.kill(number, trial.draw.randrange(trial.ranks) if one else None)
            status, words = job.wait(), job.words()
            if not running or status == 0:
                return hit
            hit = True
            if number == signal.SIGTERM and status not in (143, -signal.SIGTERM):
                trial.wrong.append(f"SIGTERM gave status {status}: {words[-300:]}")
            if "going on from step-" in words:
                trial.lost += max(0, done - int(words.split("going on from step-")[1][:8]))
        return hit

    return inject


def damaged(pattern: str, how: Callable[[Path, random.Random], None]) -> Callable[[Trial], bool]:
    """One of the files of a run that was killed on its way; in its newest checkpoint where they are a checkpoint's."""

    def inject(trial: Trial) -> bool:
        newest = max((path.name for path in (trial.output / "checkpoints").glob("step-*")), default="")
        files = sorted(path for path in trial.folder.glob(pattern.replace("NEWEST", newest)) if path.stat().st_size)
        if not files:
            return False
        how(trial.draw.choice(files), trial.draw)
        return True

    return inject


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut_short(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def second_run(trial: Trial) -> bool:
    """Another start in the same folder, while the first one is at work."""
    job = trial.start()
    while job.runs() and not (trial.output / ".run.lock").exists():
        sleep(0.01)
    sleep(trial.draw.uniform(0.0, trial.pace.begin))
    if not job.runs():
        job.wait()
        return False
    other = trial.start()
    status, words = other.wait(), other.words()
    if reason := trial.refused(status, words):
        trial.wrong.append(f"the second run: {reason}")
    # the first one is killed, so that there is something left to be judged
    job.kill(signal.SIGKILL)
    job.wait()
    return True


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of the table."""

    name: str
    inject: Callable[[Trial], bool]
    """Disturbs the run; whether that came about."""
    begun: bool = False
    """Whether the run has been killed on its way before."""
    disk: Disk = usual_disk


FILES = {
    "weights of a checkpoint": "disk/run/checkpoints/NEWEST/*model_states.pt",
    "optimizer states of a checkpoint": "disk/run/checkpoints/NEWEST/*optim_states.pt",
    "random states, state.json, manifest.json of a checkpoint": "disk/run/checkpoints/NEWEST/[rsm]*.[sj]*",
    "config and logs of the run": "disk/run/*.[yj]*",
    "reference store": "store/*/*",
    "tokenised rows": "tokenised/*/*/*",
}

KINDS = [
    Kind(name="SIGKILL at a random moment", inject=signalled(signal.SIGKILL)),
    Kind(name="SIGKILL of one rank", inject=signalled(signal.SIGKILL, one=True)),
    Kind(name="SIGKILL, three times in one run", inject=signalled(signal.SIGKILL, times=3)),
    Kind(name="SIGTERM at a random moment", inject=signalled(signal.SIGTERM)),
    Kind(name="a disk that fills up", inject=full, disk=small_disk),
    Kind(name="SIGKILL, and the disk is read-only afterwards", inject=read_only, disk=own_disk),
    Kind(name="a second run in the same folder", inject=second_run),
    *(
        Kind(name=f"{how}: {name}", inject=damaged(pattern, change), begun=True)
        for how, change in (("a flipped bit", flip), ("cut short", cut_short))
        for name, pattern in FILES.items()
    ),
]

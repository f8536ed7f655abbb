"""A job of two hosts that `cluster_faults.py` disturbs: its starts, the moment of a fault, and what the fault comes to.

In:  hosts (`nodes.py`), a kind of fault, chance. Out: an `Outcome` a fault.
"""

import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nodes import Job, Nodes

if TYPE_CHECKING:
    from cluster_fault_kinds import Kind

STEPS, EVERY, TIMEOUT, GRACE = 60, 4, 15, 20
LIMIT = 300.0
"""Seconds after which a start hangs, or a job does not come back from a fault."""
STARTS = 4
"""Of the same command, within which it has to."""
_TOLD = re.compile(
    r"^(error: |stopped: |Traceback|the job failed |warning: checkpoint |warning: MLflow )|: error: ", re.MULTILINE
)
"""How a line begins by which somebody learns of it."""
_AGAIN = re.compile(r"start \d+ of \d+ in ")
_RESUMED = re.compile(r"going on from step-(\d+)")


class Broken(Exception):
    """The job is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault came to."""

    fault: str
    starting: bool
    """Whether it hit while the job was starting, and had made no step since."""
    status: int = 0
    """Of the command that was disturbed; 0 where it went on, or started the job again by itself."""
    itself: bool = False
    """Whether no other command was needed."""
    equal: bool = False
    """Whether the job ended with the metrics and weights of the undisturbed one, to the bit."""
    apart: float = 0.0
    """Relative distance of the weights that are furthest from it."""
    named: bool = False
    """Whether what was said names the cause, and the host or rank."""
    steps_lost: int = 0
    """That were made again."""
    notice_seconds: float | None = None
    """From the fault to the first word of it; None where there is nothing to notice, or nobody left who could."""
    end_seconds: float | None = None
    """From the fault to the end of the command; None where that went on."""
    back_seconds: float | None = None
    """From the fault to the first step beyond those that had been made; None where another fault came first."""
    left: list[str] = field(default_factory=list)
    """On hosts that run, after the command that was disturbed; and at the job's end."""
    note: str = ""


@dataclass
class Trial:
    """A job that is going to be disturbed."""

    nodes: Nodes
    draw: random.Random
    kind: "Kind | None" = None
    job: Job | None = None
    said: list[Path] = field(default_factory=list)
    point: int = 0
    """The step that the newest start has gone on from, as far as is known."""
    before: int | None = None
    """Which file the metrics were when that start began: one that goes on writes another."""
    held: list[IO[bytes]] = field(default_factory=list)
    is_due: bool = False
    """The next fault, which comes while the job is starting after the one before."""
    begun_after: float = 10.0
    """Seconds from ranks to the first step, as the last start took them."""

    @property
    def config(self) -> Path:
        return self.nodes.disk / "config.yaml"

    def start(self, *words: str) -> Job:
        said = self.nodes.folder / f"said-{len(self.said)}"
        self.said.append(said)
        more = [] if self.kind is None else [*(["--max-restarts", "1"] if self.kind.itself else []), *self.kind.words]
        self.begins()
        self.job = Job(self.nodes, self.config, said, ["--no-preflight", *more, *words])
        return self.job

    def begins(self) -> None:
        self.before = self.held_log()

    def run(self, name: str) -> Path:
        """The run's folder on a host, from outside."""
        return self.nodes.seen(name, self.nodes.disk / "run")

    def log(self) -> int | None:
        """Which file the metrics are."""
        file = self.run(self.nodes.names[0]) / "metrics.jsonl"
        return file.stat().st_ino if file.exists() else None

    def held_log(self) -> int | None:
        """The same, kept open: the number of a file that is gone is given to another one."""
        with suppress(FileNotFoundError):
            self.held.append((self.run(self.nodes.names[0]) / "metrics.jsonl").open("rb"))
        return self.log()

    def done(self) -> int:
        """Steps that the metrics have."""
        file = self.run(self.nodes.names[0]) / "metrics.jsonl"
        numbers = re.findall(rb'^\{"step": (\d+),.*\}$', file.read_bytes(), re.MULTILINE) if file.exists() else []
        return max(map(int, numbers), default=0)

    def made(self) -> int:
        """Steps by the newest start; until it makes one, those that it goes on from."""
        return self.point if self.log() == self.before else self.done()

    def runs(self) -> bool:
        return self.job is not None and self.job.runs()

    def words(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.said)

    def comes_to_a_moment(self, low: int, high: int, *, early: bool) -> bool:
        """Waits until it is to be disturbed: while it is starting (`early`), or after a number of steps from `low` on
        that chance draws. False where it has ended."""
        kind = self.kind
        assert kind is not None
        if kind.starting:
            self._until(lambda: kind.ready(self))
            time.sleep(self.draw.uniform(0.0, 0.02))  # what it is to hit is short
            return self.runs()
        if early and self.is_due:
            self.is_due = False
            return self.runs()
        if early and self.made() <= self.point:  # else the start that it was to hit is over
            self._until(lambda: len(self.nodes.ranks()) == len(self.nodes.names), pause=0.1)
            at = time.monotonic() + self.draw.uniform(0.0, self.begun_after)
            self._until(lambda: time.monotonic() >= at)
            return self.runs()
        wanted = self.draw.randint(max(low, self.made()) + 1, max(high, self.made() + 1))
        self._until(lambda: self.log() != self.before and self.done() >= wanted and kind.ready(self))
        if self.runs():
            time.sleep(self.draw.uniform(0.0, 0.1))
        return self.runs()

    def _until(self, happened, pause: float = 0.005) -> None:
        deadline = time.monotonic() + LIMIT
        while self.runs() and not happened():
            if time.monotonic() > deadline:
                raise Broken("the job hangs, undisturbed")
            time.sleep(pause)

    def tidy(self, seconds: float = 60.0) -> list[str]:
        """What is left on the hosts when ranks that were cut off have had time enough to end."""
        deadline = time.monotonic() + seconds
        while (left := self.nodes.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def hit(trial: Trial, again: float | None) -> Outcome:
    """Injects one fault, and follows the job until it is further than before; or, where `again` says so, until that
    share of its new start has passed: then the next one comes. Raises `Broken`."""
    kind, job = trial.kind, trial.job
    assert kind is not None and job is not None
    ranks, log = set(trial.nodes.ranks().values()), trial.held_log()
    began, heard, made = time.monotonic(), len(trial.words()), trial.made()
    starting = made <= trial.point
    kind.inject(trial)
    status, ends, noticed, back, end, mended, since = 0, 0, None, None, None, False, None
    left: list[str] = []
    restarted, tidied, helped, looked = False, False, False, 0.0
    while back is None:
        now, words, over = time.monotonic() - began, trial.words()[heard:], not job.runs()
        if not restarted and not kind.goes_on and trial.log() == log:
            made = max(made, trial.made())
        if noticed is None and _TOLD.search(words):
            noticed = now
        if over and not tidied and job.wait(LIMIT):
            tidied = True
            left += trial.tidy()
        if not mended and (over or noticed is not None):
            mended = True
            kind.mend(trial)
        if not restarted and _AGAIN.search(words):
            restarted = True
            trial.begins()
        if over:
            found = job.wait(LIMIT)
            if end is None:
                status, end = found, now
            ends += 1
            if found == 0:
                helped = kind.settle(trial)
                back = time.monotonic() - began if kind.goes_on else None
                break
            if ends == STARTS:
                raise Broken(f"the job does not come back: status {found}")
            job, restarted, since = trial.start(), True, None
        if kind.reaches(trial, made) if kind.goes_on else (trial.log() not in (None, log) and trial.done() > made):
            back = now
        if restarted and back is None and now - looked > 0.2:
            looked = now
            pids = set(trial.nodes.ranks().values())
            if since is None and len(pids) == len(trial.nodes.names) and not pids & ranks:
                since = now
            if again is not None and since is not None and now - since > again * trial.begun_after:
                trial.is_due = True
                break
        if now > LIMIT:
            raise Broken("the job hangs")
        time.sleep(0.02)
    words = trial.words()[heard:]
    resumed = [int(number) for number in _RESUMED.findall(words)]
    if not kind.goes_on:
        # where the next fault came before it was said, what was made is that one's to lose
        trial.point = resumed[-1] if resumed else made if back is None else 0
    if back is not None and since is not None:
        trial.begun_after = max(1.0, back - since)
    names = (kind.early or ()) if starting else kind.names
    return Outcome(
        fault=kind.name,
        starting=starting,
        status=status,
        itself=ends == 0 or (kind.goes_on and status == 0 and not helped),
        named=all(re.search(text, words) for text in names),
        steps_lost=0 if kind.goes_on else max(0, made - trial.point),
        notice_seconds=noticed if names else None,
        end_seconds=end,
        back_seconds=back,
        left=left,
    )


def to_the_end(trial: Trial) -> None:
    """Raises `Broken`, `TimeoutError`."""
    assert trial.job is not None
    if status := trial.job.wait(LIMIT):
        raise Broken(f"the job ends with status {status}, undisturbed")


def configured(nodes: Nodes, prepared: Path) -> None:
    """The same config on every host's own disk."""
    import yaml

    tree = {
        "model": {"path": str(prepared / "model")},
        "reference": {"store": str(nodes.disk / "store"), "dtype": "fp32", "tokens_per_batch": 256},
        "data": {
            "train": str(prepared / "log.jsonl"),
            "max_length": 64,
            "cache": str(nodes.disk / "tokenised"),
            "workers": 1,
        },
        "train": {
            "output": str(nodes.disk / "run"),
            "global_batch": 8,
            "max_steps": STEPS,
            "lr": 1e-3,
            "eps": 1e-4,
            "dtype": "fp32",
            "tokens_per_microbatch": 256,
        },
        "checkpoint": {"every_steps": EVERY},
        "cluster": {"timeout": TIMEOUT, "grace": GRACE},
        "tracking": {"enabled": False, "report": False},
    }
    for name in nodes.names:
        nodes.seen(name, nodes.disk / "config.yaml").write_text(yaml.safe_dump(tree))


@contextmanager
def hosts(work: Path, kept: Path, kind: "Kind | None" = None) -> Iterator[Nodes]:
    """Switched on, with what the undisturbed job has left of the reference and the rows."""
    folder = work / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    nodes = Nodes(folder)
    without = () if kind is None else kind.without
    with nullcontext() if kind is None else kind.disks(nodes):
        for name in nodes.names:
            for part in (kept / name).iterdir() if (kept / name).exists() else ():
                if part.name not in without:
                    shutil.copytree(part, nodes.seen(name, nodes.disk) / part.name)
        configured(nodes, kept)
        with nodes:
            yield nodes
    shutil.rmtree(folder, ignore_errors=True)

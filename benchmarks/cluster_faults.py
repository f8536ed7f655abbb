"""Faults injected into a job of two hosts under `kto-dist launch`, and what became of it: one kind a command.

    python benchmarks/cluster_faults.py KIND [--repeats 3] [--json FILE] [--work FOLDER]
    python benchmarks/cluster_faults.py --list

The hosts are `nodes.py`'s, with a network, an sshd and a disk each, so that it takes root. A tiny run is disturbed
after a number of steps that chance draws, goes on by itself (`--max-restarts`) or by the same command, and is compared
with one that nobody disturbed. Each trial is written to the file as it ends; a later command adds to it.

1. prepared   the undisturbed run, once a work folder; its store and tokenised rows are there for the trials
2. trial      a fault of `cluster_fault_kinds.py`, and the seconds and steps until the run is further than before
3. results    a line a trial
"""

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import records
from nodes import Job, Nodes, why_not

if TYPE_CHECKING:
    from cluster_fault_kinds import Kind

STEPS, EVERY, TIMEOUT, GRACE = 40, 4, 30, 20
LIMIT = 300.0
"""Seconds after which a start hangs."""
_TOLD = re.compile(r"^(error: |stopped: |Traceback|the job failed |warning: checkpoint )|: error: ", re.MULTILINE)
"""How a line begins by which somebody learns of it."""


@dataclass
class Trial:
    """A job that is going to be disturbed."""

    nodes: Nodes
    draw: random.Random
    job: Job | None = None
    said: list[Path] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.nodes.disk / "config.yaml"

    def start(self, *words: str) -> Job:
        said = self.nodes.folder / f"said-{len(self.said)}"
        self.said.append(said)
        self.job = Job(self.nodes, self.config, said, ["--no-preflight", *words])
        return self.job

    def run(self, name: str) -> Path:
        """The run's folder on a host, from outside."""
        return self.nodes.seen(name, self.nodes.disk / "run")

    def done(self) -> int:
        """Steps."""
        file = self.run(self.nodes.names[0]) / "metrics.jsonl"
        numbers = re.findall(rb'^\{"step": (\d+),.*\}$', file.read_bytes(), re.MULTILINE) if file.exists() else []
        return max(map(int, numbers), default=0)

    def words(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.said)

    def wait_for_a_moment(self) -> None:
        """Until so many steps are made that there is a checkpoint; which number of them, chance draws."""
        assert self.job is not None
        wanted = self.draw.randint(EVERY + 1, STEPS - 2 * EVERY)
        while self.done() < wanted:
            if not self.job.runs():
                raise RuntimeError(f"the job ended before it was disturbed:\n{self.words()}")
            time.sleep(0.005)
        time.sleep(self.draw.uniform(0.0, 0.1))

    def tidy(self, seconds: float = 60.0) -> list[str]:
        """What is left on the hosts when ranks that were cut off have had time enough to end."""
        deadline = time.monotonic() + seconds
        while (left := self.nodes.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One trial."""

    fault: str
    status: int
    """Of the start that was disturbed; 0 where it went on, or was started again by itself."""
    itself: bool
    """Whether no other command was needed."""
    equal: bool
    """Whether metrics and weights are those of the undisturbed run, to the bit."""
    named: bool
    """Whether what was said names the cause, and the host or rank."""
    steps_lost: int
    """That were made again."""
    notice_seconds: float | None
    """From the fault to the first word of it; None where there is nothing to notice, or nobody left who could."""
    back_seconds: float
    """From the fault to the first step beyond those that had been made."""
    left: list[str]
    """On hosts that run, after the start that was disturbed and at the end."""
    note: str = ""


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
def hosts(work: Path, kind: "Kind | None" = None) -> Iterator[Nodes]:
    """Switched on, with what the undisturbed run has left of the reference and the rows."""
    folder, kept = work / "trial", work / "prepared"
    shutil.rmtree(folder, ignore_errors=True)
    nodes = Nodes(folder)
    with kind.disks(nodes) if kind is not None else _nothing():
        for name in nodes.names:
            if (kept / name).exists():
                shutil.copytree(kept / name, nodes.seen(name, nodes.disk), dirs_exist_ok=True)
        configured(nodes, kept)
        with nodes:
            yield nodes
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def prepared(work: Path) -> Path:
    """Its folder: model, log, and what the undisturbed run came to; made where it is not there."""
    import random_model

    folder = work / "prepared"
    if (folder / "export").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random_model.make_model("tiny", folder / "model")
    random_model.write_log("tiny", "mixed", 160, 400, folder / "log.jsonl")
    with hosts(work) as nodes:
        trial = Trial(nodes=nodes, draw=random.Random(0))
        if status := trial.start().wait(LIMIT):
            sys.exit(f"the undisturbed run ends with {status}:\n{trial.words()}")
        shutil.copy(trial.run("node-a") / "metrics.jsonl", folder)
        for name in nodes.names:
            for part in ("store", "tokenised"):
                found = nodes.seen(name, nodes.disk / part)
                if found.exists():
                    shutil.copytree(found, folder / name / part)
        shutil.copytree(trial.run("node-a") / "export", folder / "export")
    return folder


def is_equal(run: Path, kept: Path) -> bool:
    """To the bit, but for what a clock says."""
    from safetensors.torch import load_file

    def untimed(file: Path) -> list[dict[str, Any]]:
        lines = map(json.loads, file.read_text().splitlines())
        return [{name: value for name, value in line.items() if "second" not in name} for line in lines]

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "export", kept / "export"))
    same = all(bool((ours[name] == tensor).all()) for name, tensor in theirs.items())
    return same and untimed(run / "metrics.jsonl") == untimed(kept / "metrics.jsonl")


def disturbed(kind: "Kind", nodes: Nodes, kept: Path, draw: random.Random) -> Outcome:
    """One trial."""
    trial = Trial(nodes=nodes, draw=draw)
    job = trial.start(*(["--max-restarts", "3"] if kind.itself else []))
    trial.wait_for_a_moment()
    began, heard = time.monotonic(), len(trial.words())
    done, noticed, back, mended = trial.done(), None, None, False
    kind.inject(trial)
    status, left, starts = 0, list[str](), 1
    while True:
        now = time.monotonic() - began
        words = trial.words()
        if noticed is None and _TOLD.search(words[heard:]):
            noticed = now
        ended = not job.runs()
        if not mended and (ended or noticed is not None):
            mended = True
            done = max(done, trial.done())
            if ended:
                left += trial.tidy()
            kind.mend(trial)
        if back is None and (starts > 1 or kind.goes_on or "going on from" in words[heard:]) and trial.done() > done:
            back = now
        if ended:
            found = job.wait(LIMIT)
            if starts == 1:
                status = found
            if found == 0:
                break
            if starts == 3 or now > LIMIT:
                raise RuntimeError(f"the run does not come back:\n{words}")
            done, starts = max(done, trial.done()), starts + 1
            job = trial.start()
        if now > LIMIT:
            raise RuntimeError(f"the run hangs:\n{words}")
        time.sleep(0.02)
    left += trial.tidy()
    words = trial.words()[heard:]
    resumed = re.findall(r"going on from step-(\d+)", words)
    if not (resumed or kind.goes_on):
        raise RuntimeError(f"the run ended before it was disturbed:\n{words}")
    return Outcome(
        fault=kind.name,
        status=status,
        itself=starts == 1,
        equal=is_equal(trial.run("node-a"), kept),
        named=all(re.search(text, words) for text in kind.names),
        steps_lost=0 if kind.goes_on else done - int(resumed[0]),
        notice_seconds=noticed if kind.names else None,
        back_seconds=back or time.monotonic() - began,
        left=left,
    )


def added(file: Path | None, outcome: Outcome) -> dict[str, Any]:
    """The results with one more. Raises `click.UsageError` where the file has those of another job."""
    settings = {"steps": STEPS, "checkpoint_every": EVERY, "timeout": TIMEOUT, "grace": GRACE}
    content = records.frame("cluster-faults", settings)
    before: list[dict[str, Any]] = []
    if file is not None and file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        if (old["settings"], old["device"]) != (settings, content["device"]):
            raise click.UsageError(f"{file} holds results of another job or machine: name another file")
        before = old["results"]
    return content | {"results": [*before, asdict(outcome)]}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("name", metavar="KIND", required=False)
@click.option("--list", "lists", is_flag=True, help="The kinds.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="A line a trial is added to it.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/cluster-faults"), show_default=True)
@click.option("--seed", type=int, help="Of the moments; default: another one each time.")
def main(name: str | None, lists: bool, repeats: int, file: Path | None, work: Path, seed: int | None) -> None:
    from cluster_fault_kinds import KINDS

    if lists or name not in KINDS:
        for known in KINDS.values():
            click.echo(f"{known.name:16} {known.title}")
        raise SystemExit(0 if lists else 2)
    if reason := why_not():
        raise click.UsageError(reason)
    work = work.absolute()
    kept, draw = prepared(work), random.Random(seed)
    for number in range(repeats):
        with hosts(work, KINDS[name]) as nodes:
            outcome = disturbed(KINDS[name], nodes, kept, draw)
        records.write_json(file, added(file, outcome))
        click.echo(f"{number + 1}: {json.dumps(asdict(outcome))}")


if __name__ == "__main__":
    main()

"""Faults injected into jobs of two hosts under `kto-dist launch`, and what became of them: one kind a command.

    python benchmarks/cluster_faults.py KIND [--repeats 20] [--json FILE] [--work FOLDER]
    python benchmarks/cluster_faults.py --list

The hosts are `nodes.py`'s, with a network, an sshd and a disk each, so that it takes root. A job of tiny steps is hit
several times, each time at a moment that chance draws: among its steps, or while it is starting. It goes on by itself
(`--max-restarts`) or by the same command, and is compared with one that nobody disturbed. What became of the faults is
added to the file when their job has ended, whatever it was.

1. prepared   the undisturbed job, once a work folder; its store and tokenised rows are there for the others
2. jobs       `cluster_job.py`: starts, moments, and what a fault of `cluster_fault_kinds.py` comes to
3. results    a line a fault
"""

import json
import random
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import records
from cluster_job import EVERY, GRACE, LIMIT, STEPS, TIMEOUT, Broken, Outcome, Trial, hit, hosts, to_the_end
from nodes import Nodes, why_not

if TYPE_CHECKING:
    from cluster_fault_kinds import Kind

FAULTS_A_JOB = 5
WINDOW = (STEPS - 10) // FAULTS_A_JOB
"""Steps within which each of them comes."""
SHARE_AT_START = 0.3
"""Of the faults that may come while a job is starting."""


def prepared(work: Path) -> Path:
    """Its folder: model, log, and what the undisturbed job came to; made where it is not there."""
    import random_model

    folder = work / f"prepared-{STEPS}"
    if (folder / "export").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random_model.make_model("tiny", folder / "model")
    random_model.write_log("tiny", "mixed", 160, 400, folder / "log.jsonl")
    with hosts(work, folder) as nodes:
        trial = Trial(nodes=nodes, draw=random.Random(0))
        if status := trial.start().wait(LIMIT):
            sys.exit(f"the undisturbed job ends with {status}:\n{trial.words()}")
        shutil.copy(trial.run("node-a") / "metrics.jsonl", folder)
        for name in nodes.names:
            for part in ("store", "tokenised"):
                found = nodes.seen(name, nodes.disk / part)
                if found.exists():
                    shutil.copytree(found, folder / name / part)
        shutil.copytree(trial.run("node-a") / "export", folder / "export")
    return folder


def untimed(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what a clock says."""
    lines = map(json.loads, file.read_text().splitlines())
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def apart(run: Path, kept: Path) -> float:
    """How far weights and metrics are from those of the undisturbed job, relative to these; 0 to the bit."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (run, kept))
    furthest = max(float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items())
    lines, wanted = untimed(run / "metrics.jsonl"), untimed(kept / "metrics.jsonl")
    if [list(line) for line in lines] != [list(line) for line in wanted]:
        return float("inf")
    pairs = [(line[name], other[name]) for line, other in zip(lines, wanted, strict=True) for name in line]
    return max([furthest, *(abs(own - other) / max(1.0, abs(other)) for own, other in pairs)])


def disturbed(kind: "Kind", nodes: Nodes, kept: Path, draw: random.Random, faults: int, failed: Path) -> list[Outcome]:
    """One job, hit so many times, or fewer where it has ended before."""
    trial, found, note, left = Trial(nodes=nodes, draw=draw, kind=kind), list[Outcome](), "", list[str]()
    furthest = float("inf")

    def is_next_early(number: int) -> bool:
        able = kind.early is not None and not kind.starting
        return able and number < faults and draw.random() < SHARE_AT_START

    try:
        kind.begin(trial)
        trial.start()
        early = is_next_early(0)
        for number in range(faults):
            if not trial.comes_to_a_moment(number * WINDOW, (number + 1) * WINDOW, early=early):
                break
            early = is_next_early(number + 1)
            found.append(Outcome(fault=kind.name, starting=False))  # until it is known to be more
            found[-1] = hit(trial, again=draw.random() if early else None)
        to_the_end(trial)
        furthest = apart(trial.run("node-a"), kept)
        note = kind.judge(trial)
        left = trial.tidy()
    except (Broken, RuntimeError, TimeoutError, OSError, LookupError) as error:
        note = str(error) or repr(error)
    if note or not found:
        failed.mkdir(parents=True, exist_ok=True)
        file = failed / f"{kind.name}-{time.strftime('%H%M%S')}.txt"
        file.write_text(f"{note}\n\n{trial.words()}")
        click.echo(f"{kind.name}: {note}: see {file}", err=True)
    return [
        replace(
            outcome,
            apart=furthest,
            equal=furthest == 0 and not note,
            left=[*outcome.left, *(left if outcome is found[-1] else [])],
            note=note.splitlines()[0][:300] if note else "",
        )
        for outcome in found
    ]


def added(file: Path | None, outcomes: list[Outcome], beside: str) -> dict[str, Any]:
    """The results with these. Raises `click.UsageError` where the file has those of another job."""
    settings = {"steps": STEPS, "checkpoint_every": EVERY, "timeout": TIMEOUT, "grace": GRACE}
    content = records.frame("cluster-faults", settings)
    before: list[dict[str, Any]] = []
    if file is not None and file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        if (old["settings"], old["device"]) != (settings, content["device"]):
            raise click.UsageError(f"{file} holds results of another job or machine: name another file")
        before, beside = old["results"], beside or old["beside"]
    lines = [line | {"apart": min(line["apart"], 1e9)} for line in map(asdict, outcomes)]  # JSON has no infinity
    return content | {"beside": beside, "results": [*before, *lines]}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("name", metavar="KIND", required=False)
@click.option("--list", "lists", is_flag=True, help="The kinds.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Faults.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="A line a fault is added to it.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/cluster-faults"), show_default=True)
@click.option("--seed", type=int, help="Of the moments; default: another one each time.")
@click.option("--beside", default="", help="What else the machine did meanwhile, in words: seconds depend on it.")
def main(
    name: str | None, lists: bool, repeats: int, file: Path | None, work: Path, seed: int | None, beside: str
) -> None:
    from cluster_fault_kinds import KINDS

    if lists or name not in KINDS:
        for known in KINDS.values():
            click.echo(f"{known.name:16} {known.title}")
        raise SystemExit(0 if lists else 2)
    if reason := why_not():
        raise click.UsageError(reason)
    work, kind = work.absolute(), KINDS[name]
    kept, draw, done = prepared(work), random.Random(seed), 0
    while done < repeats:
        with hosts(work, kept, kind) as nodes:
            faults = min(repeats - done, FAULTS_A_JOB if kind.several else 1)
            outcomes = disturbed(kind, nodes, kept, draw, faults, work / "failed")
        if not outcomes:
            raise click.ClickException("the job ended before it could be disturbed")
        records.write_json(file, added(file, outcomes, beside))
        for outcome in outcomes:
            done += 1
            click.echo(f"{done}: {json.dumps(asdict(outcome))}")


if __name__ == "__main__":
    main()

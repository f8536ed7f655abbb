"""The benchmark of cluster faults: what it counts as lost, as a start, and as wrong; its table."""

import json
import random
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cluster_mlflow
import pytest
from cluster_fault_kinds import KINDS
from cluster_job import Outcome, Trial, hit
from cluster_table import cluster_faults


class FakeJob:
    """A command that a test ends."""

    def __init__(self) -> None:
        self.status: int | None = None

    def runs(self) -> bool:
        return self.status is None

    def wait(self, seconds: float) -> int:
        assert self.status is not None
        return self.status


class FakeNodes:
    """Hosts whose disks are folders, and on which nothing runs."""

    names = ("node-a", "node-b")

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        for name in self.names:
            self.seen(name, self.disk / "run").mkdir(parents=True)

    def seen(self, name: str, path: Path) -> Path:
        return self.folder / "hosts" / name / path.relative_to(self.folder)

    def ranks(self) -> dict[int, int]:
        return {}

    def runs(self, name: str) -> bool:
        return True

    def left(self) -> list[str]:
        return []


class FakeTrial(Trial):
    """Whose starts are a script: each writes what its command would."""

    scripts: list[Any]

    def start(self, *words: str) -> Any:
        self.begins()
        said = self.nodes.folder / f"said-{len(self.said)}"
        said.touch()
        self.said.append(said)
        self.job = FakeJob()  # type: ignore[assignment]
        if self.scripts:
            self.scripts.pop(0)(self)
        return self.job

    def say(self, text: str) -> None:
        with self.said[-1].open("a") as file:
            file.write(text + "\n")

    def steps(self, last: int) -> None:
        """A log of its own, as a run that goes on from a checkpoint writes it."""
        file = self.run("node-a") / "metrics.jsonl"
        other = file.with_name("other")
        other.write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(1, last + 1)))
        other.replace(file)


def trial_of(folder: Path, name: str, inject: Any, *scripts: Any) -> FakeTrial:
    kind = SimpleNamespace(
        **{field: getattr(KINDS[name], field) for field in KINDS[name].__dataclass_fields__} | {"inject": inject}
    )
    trial = FakeTrial(nodes=FakeNodes(folder), draw=random.Random(0), kind=kind)  # type: ignore[arg-type]
    trial.scripts = list(scripts)
    trial.start()
    return trial


def ends_with(status: int) -> Any:
    def inject(trial: FakeTrial) -> None:
        trial.job.status = status  # type: ignore[union-attr]

    return inject


def test_steps_that_are_made_again_are_those_beyond_the_checkpoint(tmp_path):
    def goes_on(trial: FakeTrial) -> None:
        trial.say("going on from step-00000004 of 60 steps")
        trial.steps(8)

    trial = trial_of(tmp_path, "all-off", ends_with(137), lambda trial: trial.steps(7), goes_on)
    found = hit(trial, again=None)
    assert (found.steps_lost, found.status, found.itself, found.starting) == (3, 137, False, False)
    assert found.back_seconds is not None and found.named and trial.point == 4


def test_a_fault_while_a_job_starts_again_loses_nothing_that_the_one_before_had_lost(tmp_path):
    def goes_on(trial: FakeTrial) -> None:
        trial.say("going on from step-00000004 of 60 steps")
        trial.steps(4)

    def further(trial: FakeTrial) -> None:
        goes_on(trial)
        trial.steps(5)

    trial = trial_of(tmp_path, "all-off", ends_with(137), goes_on, further)
    trial.point = 4
    found = hit(trial, again=None)
    assert (found.steps_lost, found.starting) == (0, True)


def test_a_job_that_does_not_come_back_is_broken(tmp_path):
    from cluster_job import Broken

    ends = [lambda trial: ends_with(1)(trial)] * 4
    trial = trial_of(tmp_path, "all-off", ends_with(137), lambda trial: trial.steps(7), *ends)
    with pytest.raises(Broken, match="does not come back: status 1"):
        hit(trial, again=None)


def test_what_is_not_said_is_not_named(tmp_path):
    def goes_on(trial: FakeTrial) -> None:
        trial.steps(8)

    trial = trial_of(tmp_path, "rank-killed", ends_with(1), lambda trial: trial.steps(7), goes_on)
    assert not hit(trial, again=None).named


def test_a_job_that_goes_on_is_back_with_the_step_after_the_one_that_was_under_way(tmp_path):
    def one_more(trial: FakeTrial) -> None:
        with (trial.run("node-a") / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "loss": 0.5}\n{"step": 9, "loss": 0.5}\n')

    trial = trial_of(tmp_path, "slow", one_more, lambda trial: trial.steps(7))
    found = hit(trial, again=None)
    assert found.back_seconds is not None and found.end_seconds is None and found.itself and found.steps_lost == 0


@pytest.mark.parametrize(
    ("points", "statuses", "words"),
    [
        ([(1, 0.5), (2, 0.25)], ["FINISHED"], ""),
        ([(1, 0.5), (2, 0.25), (2, 0.25)], ["FINISHED"], "loss: 3 points for 2"),
        ([(2, 0.25), (1, 0.5)], ["FINISHED"], "loss: 2 points for 2, or in another order"),
        ([(1, 0.5)], ["FINISHED"], "loss: 1 points for 2"),
        ([(1, 0.5), (2, 0.25)], ["RUNNING"], "RUNNING"),
    ],
)
def test_mlflow_has_every_figure_once_in_order_of_a_run_that_has_ended(tmp_path, points, statuses, words):
    trial = trial_of(tmp_path, "mlflow", ends_with(0))
    run, server = trial.run("node-a"), trial.nodes.seen("node-b", trial.nodes.disk / "mlflow")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    (run / ".mlflow").mkdir()
    (run / ".mlflow" / "state.json").write_text(json.dumps({"status": "FINISHED"}))
    server.mkdir()
    with sqlite3.connect(server / "mlflow.db") as database:
        database.execute("create table runs (run_uuid text, status text)")
        database.execute("create table metrics (run_uuid text, key text, step int, value real)")
        database.executemany("insert into runs values ('a', ?)", [(status,) for status in statuses])
        database.executemany("insert into metrics values ('a', 'loss', ?, ?)", points)
    found = cluster_mlflow.judge(trial)
    assert found == "" if not words else words in found


def test_the_table_counts_what_went_wrong_and_says_why():
    lines = [
        Outcome(fault="rank-killed", starting=False, itself=True, equal=True, named=True, back_seconds=20.0),
        Outcome(fault="rank-killed", starting=True, equal=False, apart=1e-7, named=True, note="the job hangs"),
        Outcome(fault="store-full", starting=True, equal=False, apart=2e-7, named=True, back_seconds=9.0),
    ]
    content = {
        "device": "a CPU",
        "versions": {},
        "date": "2026-01-01",
        "settings": {"steps": 60, "checkpoint_every": 4, "timeout": 15, "grace": 20},
        "beside": "",
        "results": [line.__dict__ for line in lines],
    }
    killed, full, _, wrong = cluster_faults(content).splitlines()[-4:]
    assert killed.split("|")[2:7] == [" 2 ", " 1 ", " 1 ", " 2 ", " 0 "] and "1 by itself, 1 by the same" in killed
    assert "| 0, and 1 within 2e-07 |" in full
    assert wrong == "- SIGKILL of a rank: the job hangs"

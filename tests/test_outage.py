"""MLflow away, at the start or later: everything arrives in order, nothing twice, nothing is lost.

A real server, which the tests stop and start again at the same port.
"""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow_server import DIGEST, Server, begin, serving, wait_until

from kto_dist.commands.cli import main
from kto_dist.record.spool import Spool
from kto_dist.record.tracker import Tracker
from kto_dist.training.config import Config
from kto_dist.training.lock import RunLock

NEVER = 1e6


@pytest.fixture(scope="module")
def server_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "mlflow.db") as running:
        yield running


@pytest.fixture
def server(server_of_module: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    yield server_of_module
    server_of_module.away = server_of_module.loses_answers = False
    server_of_module.stop()
    server_of_module.start()


class Tracked:
    """A run's folder, and the processes that are at work in it one after the other."""

    def __init__(self, folder: Path, server: Server, experiment: str) -> None:
        self.folder, self.server, self.warnings = folder / "run", server, []
        self.folder.mkdir()
        self.config = Config(
            model={"path": "model"},
            data={"train": "rows.jsonl"},
            train={"output": str(self.folder)},
            tracking={"uri": server.uri, "experiment": experiment},
        )

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server.uri)

    def start(self, **more: Any) -> Tracker:
        settings = {"run_id": None, "tags": {}, "default_uri": "unused", "retry": 0.1, **more}
        return begin(self.config, warn=self.warnings.append, keep_in=self.folder, **settings)

    def steps(self, tracker: Tracker, *numbers: int, name: str = "loss") -> None:
        for step in numbers:
            tracker.log(step, {name: step / 4})

    def waits(self) -> int:
        return sum(len(op["values"]) for op in Spool(self.folder).waiting if op["kind"] == "metrics")

    @property
    def runs(self) -> list[Any]:
        found = self.client.get_experiment_by_name(self.config.tracking.experiment)
        return [] if found is None else self.client.search_runs([found.experiment_id])

    def points(self, name: str = "loss") -> list[tuple[int, float]]:
        """In the order in which MLflow shows them."""
        (run,) = self.runs
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, name)]


@pytest.fixture
def tracked(tmp_path: Path, server: Server, request: pytest.FixtureRequest) -> Tracked:
    return Tracked(tmp_path, server, request.node.name)


def expected(*numbers: int) -> list[tuple[int, float]]:
    return [(step, step / 4) for step in numbers]


def test_a_server_that_is_down_at_the_start_is_asked_again_and_gets_everything(tracked: Tracked) -> None:
    tracked.server.stop()
    tracker = tracked.start()
    assert tracker.run_id is None
    tracked.steps(tracker, 1, 2)
    tracker.log_dataset("train", "training", DIGEST, {"desirable": 1}, "rows.jsonl")
    assert len(tracked.warnings) == 1 and "what MLflow is to get waits in the run's folder" in tracked.warnings[0]
    tracked.server.start()
    wait_until(lambda: tracker.run_id is not None)
    tracked.steps(tracker, 3)
    tracker.finish("FINISHED")

    (run,) = tracked.runs
    assert tracked.points() == expected(1, 2, 3)
    assert run.data.params["train.output"] == str(tracked.folder) and run.info.status == "FINISHED"
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["train"]
    assert len(tracked.warnings) == 1


@pytest.mark.parametrize(
    "uri",
    ["http://user:secret@127.0.0.1:{closed}", "http://127.0.0.1:{silent}", "postgresql://u:p@127.0.0.1:{closed}/r"],
)
def test_a_server_that_never_answers_costs_no_patience_and_no_password(
    tmp_path: Path, server: Server, uri: str
) -> None:
    with socket.socket() as silent, socket.socket() as closed:
        for listener in (silent, closed):
            listener.bind(("127.0.0.1", 0))
        silent.listen()  # accepts, and never answers
        server.uri, kept = uri.format(closed=closed.getsockname()[1], silent=silent.getsockname()[1]), server.uri
        tracked = Tracked(tmp_path, server, "never")
        server.uri = kept
        tracker = tracked.start(run_id="old")  # MLflow's own patience would take hours
        tracked.steps(tracker, 1)
        tracker.finish("FAILED")
    assert tracker.run_id == "old" and tracked.waits() == 1
    first, last = tracked.warnings
    assert "secret" not in first and "Training goes on" in first
    assert "1 metric values" in last and f"kto-dist track {tracked.folder}" in last


def test_what_waits_at_the_end_is_sent_by_the_command_and_once(tracked: Tracked) -> None:
    tracker = tracked.start()
    tracked.steps(tracker, 1, 2, 3)
    wait_until(lambda: not tracked.waits())
    tracked.server.stop()
    tracked.steps(tracker, *range(4, 41))
    (tracked.folder / "summary.json").write_text("{}")
    tracker.log_artifact(tracked.folder / "summary.json")
    tracker.finish("FINISHED")
    assert tracked.waits() == 37

    away = CliRunner().invoke(main, ["track", str(tracked.folder)])
    assert away.exit_code == 1 and "what waits is still there" in away.output and tracked.waits() == 37
    tracked.server.start()
    assert tracked.runs[0].info.status == "RUNNING"
    for said in ("operations were sent", "nothing waited"):
        done = CliRunner().invoke(main, ["track", str(tracked.folder)])
        assert done.exit_code == 0 and said in done.output, done.output
        (run,) = tracked.runs
        assert tracked.points() == expected(*range(1, 41)) and run.info.status == "FINISHED"
        assert [file.path for file in tracked.client.list_artifacts(run.info.run_id)] == ["summary.json"]


def test_a_resumed_run_sends_what_the_killed_one_could_not_and_no_step_twice(tracked: Tracked) -> None:
    killed = tracked.start(retry=NEVER)
    tracked.steps(killed, 1, 2, 3, 4)
    wait_until(lambda: not tracked.waits())
    tracked.server.stop()
    killed.log(100, {"reference/share_done": 1.0})
    tracked.steps(killed, 5, 6, 7)
    wait_until(lambda: bool(tracked.warnings))  # and now it is killed: it sends no more

    # its newest checkpoint is that of step 5, or of step 3: the steps after it are done once more
    tracked.server.start()
    for step in (5, 3):
        again = tracked.start(step=step)
        tracked.steps(again, *range(step + 1, 9))
        again.finish("KILLED")
        assert tracked.points() == expected(*range(1, 9)), step
    assert tracked.points("reference/share_done") == [(100, 1.0)]


def test_steps_that_are_done_again_with_other_settings_are_told_again(tracked: Tracked) -> None:
    first = tracked.start()
    tracked.steps(first, 1, 2, 3)
    first.finish("KILLED")
    second = tracked.start(step=1, same=False)
    second.log(2, {"loss": 7.0})
    second.finish("FINISHED")
    assert sorted(tracked.points()) == [(1, 0.25), (2, 0.5), (2, 7.0), (3, 0.75)]


def test_a_run_that_begins_anew_in_a_folder_is_another_mlflow_run_and_the_first_one_has_ended(tracked: Tracked) -> None:
    killed = tracked.start(retry=NEVER)
    tracked.steps(killed, 1)
    wait_until(lambda: not tracked.waits())
    second = tracked.start()
    second.finish("FINISHED")
    assert second.run_id != killed.run_id
    assert {run.info.run_id: run.info.status for run in tracked.runs} == {
        killed.run_id: "KILLED",
        second.run_id: "FINISHED",
    }


def test_an_answer_that_is_lost_makes_no_point_twice(tracked: Tracked) -> None:
    tracker = tracked.start()
    tracked.server.loses_answers = True
    tracked.steps(tracker, 1, 2, 3)
    # the first request may have had the first step alone
    wait_until(lambda: bool(tracked.warnings) and tracked.points() == expected(1, 2, 3))
    assert tracked.waits() == 3
    tracked.server.loses_answers = False
    tracker.finish("FINISHED")
    assert tracked.points() == expected(1, 2, 3)


def test_a_name_that_is_refused_keeps_no_other_value_out(tracked: Tracked) -> None:
    tracker = tracked.start()
    tracker.log(1, {"loss": 0.25, "not#allowed": 1.0, "kl": 2.0})
    tracker.log(2, {"loss": 0.5})
    tracker.finish("FINISHED")
    assert tracked.points() == expected(1, 2) and tracked.points("kl") == [(1, 2.0)]
    assert "lacks: 1 metric values" in tracked.warnings[-1]


def test_a_line_that_a_crash_cut_short_costs_no_other(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for step in (1, 2):
        spool.add({"kind": "metrics", "step": step, "time": 0, "values": {"loss": float("nan")}})
    with (tmp_path / ".mlflow" / "spool.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "st')
    again = Spool(tmp_path)
    again.begin(step=2, same=True)
    assert [op["step"] for op in again.waiting] == [1, 2]
    again.add({"kind": "metrics", "step": 3, "time": 0, "values": {"loss": 1.0}})
    assert [op["step"] for op in Spool(tmp_path).waiting] == [1, 2, 3]


DAMAGES = [
    (b'"kind"', b'"kjnd"'),
    (b'"metrics"', b'"metrhcs"'),
    (b'"values"', b'"valuer"'),
    (b"{", b"\xff"),
    (None, b"[]"),
]


@pytest.mark.parametrize(("written", "found"), DAMAGES)
@pytest.mark.parametrize("sent", (0, 2))
def test_a_damaged_line_costs_itself_alone_and_is_told(
    tmp_path: Path, written: bytes | None, found: bytes, sent: int
) -> None:
    """Every further start of a run once ended with a `KeyError` over it, or lost what stands behind it."""
    spool = Spool(tmp_path)
    for step in (1, 2, 3):
        spool.add({"kind": "metrics", "step": step, "time": 0, "values": {"loss": 0.5}})
    spool.arrived(sent)
    file, warnings = tmp_path / ".mlflow" / "spool.jsonl", []
    lines = file.read_bytes().splitlines()
    lines[1] = lines[1].replace(written or lines[1], found, 1)
    file.write_bytes(b"\n".join(lines) + b"\n")
    again = Spool(tmp_path, warnings.append)
    again.begin(step=3, same=True)
    assert [op["step"] for op in again.waiting] == ([3] if sent else [1, 3])
    assert warnings == [f"1 lines of {file} could not be read: what they say, MLflow may lack"]
    assert [op["step"] for op in Spool(tmp_path, pytest.fail).waiting] == ([3] if sent else [1, 3])


def test_a_folder_that_takes_nothing_more_costs_a_warning_and_not_the_points(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / ".mlflow").write_text("in the way")
    spool = Spool(tmp_path, warnings.append)
    spool.add({"kind": "metrics", "step": 1, "time": 0, "values": {"loss": 1.0}})
    assert len(spool.waiting) == 1 and len(warnings) == 1 and "waits in memory" in warnings[0]


def test_a_folder_that_was_not_tracked_is_a_mistake(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["track", str(tmp_path)])
    assert done.exit_code == 2 and "holds nothing for MLflow" in done.output
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"


def test_a_run_that_is_at_work_tells_mlflow_itself(tmp_path: Path) -> None:
    Spool(tmp_path).add({"kind": "metrics", "step": 1, "time": 0, "values": {"loss": 1.0}})
    lock = RunLock(tmp_path, "a job")
    lock.take()
    try:
        done = CliRunner().invoke(main, ["track", str(tmp_path), "--uri", "http://127.0.0.1:1"])
    finally:
        lock.release()
    assert done.exit_code == 2 and "another run" in done.output and len(Spool(tmp_path).waiting) == 1

"""A run's record in MLflow, against real stores: what arrives, what a resume keeps, what trouble costs."""

import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import DIGEST, Server, begin, serving, wait_until
from tiny import save_tiny

from kto_dist.base.config import flatten
from kto_dist.record import tracking
from kto_dist.record.tracker import NullTracker, Tracker
from kto_dist.training.config import Config


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to create its tables, so that each test starts from a copy."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name("none")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("server") / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    with serving(database) as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


class Store:
    """A database in a folder whose name has a space, and the warnings of the runs in it."""

    def __init__(self, folder: Path, database: Path) -> None:
        self.folder = folder / "all runs"
        self.folder.mkdir()
        self.path = self.folder / "mlflow.db"
        self.path.write_bytes(database.read_bytes())
        self.uri = f"sqlite:///{self.path}"
        self.client = MlflowClient(self.uri)
        self.warnings: list[str] = []

    def start(self, config: Config, run_id: str | None = None, **tags: str) -> Tracker:
        tracker = begin(
            config,
            run_id=run_id,
            tags=tags,
            default_uri=self.uri,
            warn=self.warnings.append,
        )
        assert not isinstance(tracker, NullTracker), self.warnings
        return tracker

    def config(self, **sections: dict) -> Config:
        train = {"output": str(self.folder / "first")} | sections.pop("train", {})
        return Config(model={"path": "model"}, data={"train": "rows.jsonl"}, train=train, **sections)


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    return Store(tmp_path, empty_database)


def test_every_metric_arrives_under_its_name_and_step(store: Store) -> None:
    tracker = store.start(store.config())
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step / 4, "loss/desirable": step / 8, "kl": 0})
    tracker.log(4, {"loss": float("nan")})
    tracker.finish("FINISHED")

    for name, scale in (("loss/desirable", 8), ("loss", 4)):
        history = store.client.get_metric_history(tracker.run_id, name)
        assert [(m.step, m.value) for m in history][:3] == [(step, step / scale) for step in (1, 2, 3)]
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert store.warnings == []


def test_a_table_is_whole_each_time_and_mlflow_finds_it(store: Store) -> None:
    tracker = store.start(store.config())
    tracker.log_table("answers.json", ("step", "answer"), [(0, "old")])
    tracker.log_table("answers.json", ("step", "answer"), [(5, "new"), (0, "old")])
    tracker.finish("FINISHED")
    table = json.loads(Path(store.client.download_artifacts(tracker.run_id, "answers.json")).read_text())
    assert table == {"columns": ["step", "answer"], "data": [[5, "new"], [0, "old"]]} and store.warnings == []
    # by this tag MLflow's pages know that it is a table
    tags = store.client.get_run(tracker.run_id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]


def test_more_metrics_than_one_request_holds_all_arrive(store: Store) -> None:
    tracker = store.start(store.config())
    for step in range(300):
        tracker.log(step, {f"m/{i}": step + i for i in range(10)})
    tracker.finish("FINISHED")
    assert [len(store.client.get_metric_history(tracker.run_id, f"m/{i}")) for i in range(10)] == [300] * 10


def test_params_are_the_resolved_config_and_tags_are_kept(store: Store) -> None:
    config = Config(
        model={"path": "/".join(["m" * 200] * 35)},
        data={"train": "rows.jsonl", "heldout": 0.1},
        objective={"beta": 0.25},
        tracking={"experiment": "exp", "run_name": "chosen"},
    )
    tracker = store.start(config, reference="abc", git_commit="f00")
    tracker.finish("FINISHED")
    run = store.client.get_run(tracker.run_id)

    assert set(run.data.params) == {f"{section}.{key}" for section, key, _ in flatten(config)}
    assert run.data.params["objective.beta"] == "0.25"
    assert run.data.params["data.heldout"] == "0.1"
    assert run.data.params["model.path"] == config.model.path[:6000]
    assert run.data.tags["reference"] == "abc"
    assert run.data.tags["mlflow.source.git.commit"] == "f00"
    assert run.info.run_name == "chosen"
    assert store.client.get_experiment(run.info.experiment_id).name == "exp"


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(store: Store) -> None:
    first = store.start(store.config())
    first.log(1, {"loss": 0.5})
    first.finish("KILLED")

    second = store.start(store.config(), run_id=first.run_id)
    assert second.run_id == first.run_id
    assert store.client.get_run(first.run_id).info.status == "RUNNING"
    second.log(2, {"loss": 0.4})
    second.finish("FINISHED")

    assert [m.step for m in store.client.get_metric_history(first.run_id, "loss")] == [1, 2]
    assert store.client.get_run(first.run_id).info.status == "FINISHED"
    assert store.warnings == []


def test_a_setting_changed_at_resume_becomes_a_tag_and_is_told(store: Store) -> None:
    first = store.start(store.config())
    first.finish("KILLED")
    store.start(store.config(train={"max_steps": 7}), run_id=first.run_id).finish("FINISHED")

    data = store.client.get_run(first.run_id).data
    assert data.params["train.max_steps"] == "null"
    assert data.tags["resumed.train.max_steps"] == "7"
    assert len(store.warnings) == 1 and "train.max_steps (null -> 7)" in store.warnings[0]


@pytest.mark.parametrize("gone", ["unknown", "deleted"])
def test_a_run_that_is_gone_is_replaced_by_a_new_one(store: Store, gone: str) -> None:
    run_id = "0" * 32
    if gone == "deleted":
        old = store.start(store.config())
        old.finish("KILLED")
        run_id = old.run_id
        store.client.delete_run(run_id)
    tracker = store.start(store.config(), run_id=run_id)
    tracker.finish("FINISHED")
    assert tracker.run_id != run_id
    assert len(store.warnings) == 1 and run_id in store.warnings[0]


def test_a_dataset_shows_our_digest_its_class_counts_and_its_use(store: Store) -> None:
    tracker = store.start(store.config())
    counts = {"desirable": 30, "undesirable": 12}
    for _ in range(2):  # a resumed run says it again
        tracker.log_dataset("train", "training", DIGEST, counts, "rows.jsonl")
    tracker.finish("FINISHED")

    (logged,) = store.client.get_run(tracker.run_id).inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in logged.tags}
    assert (logged.dataset.name, logged.dataset.digest) == ("train", DIGEST[:36])
    assert json.loads(logged.dataset.profile) == counts
    assert json.loads(logged.dataset.source) == {"uri": "rows.jsonl"}
    assert tags == {
        "mlflow.data.context": "training", "digest": DIGEST, "desirable": "30", "undesirable": "12"
    }  # fmt: skip


def test_a_run_of_a_moment_has_system_metrics(store: Store) -> None:
    tracker = store.start(store.config())
    tracker.finish("FINISHED")
    metrics = store.client.get_run(tracker.run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert "system/cpu_utilization_percentage" in metrics


def test_artifacts_are_stored_beside_the_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = store.folder.parent / "elsewhere"
    (elsewhere / "plots").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    Path("plots/loss.png").write_bytes(b"png")
    Path("report.html").write_text("page")

    tracker = store.start(store.config())
    tracker.log_artifact("report.html")
    tracker.log_artifact("report.html", "page")
    tracker.log_artifact(Path("plots"))
    tracker.finish("FINISHED")

    stored = (store.folder / "mlflow-artifacts" / tracker.run_id).rglob("*.*")
    assert sorted(path.relative_to(store.folder).parts[3:] for path in stored) == [
        ("page", "report.html"), ("plots", "loss.png"), ("report.html",)
    ]  # fmt: skip
    assert sorted(path.name for path in elsewhere.iterdir()) == ["plots", "report.html"]


def test_the_registered_model_holds_the_weights_and_loads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import torch
    from transformers import LlamaForCausalLM

    export = save_tiny(store.folder / "export")
    tracker = store.start(store.config(tracking={"register": "helper"}))
    tracker.log(5, {"loss": 0.1})
    for _ in range(2):  # a second training of the same name makes a second version
        tracker.log_model(export)
    tracker.finish("FINISHED")
    assert store.warnings == []

    versions = store.client.search_model_versions("name = 'helper'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert {version.run_id for version in versions} == {tracker.run_id}
    weights = list((store.folder / "mlflow-artifacts").rglob("*.safetensors"))
    assert [path.read_bytes() for path in weights] == [(export / "model.safetensors").read_bytes()] * 2

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    pipeline = mlflow.transformers.load_model("models:/helper/1")
    original = LlamaForCausalLM.from_pretrained(export).state_dict()
    loaded = pipeline.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in original.items())
    assert pipeline.tokenizer.chat_template


def test_no_model_is_uploaded_unless_asked_for(store: Store) -> None:
    tracker = store.start(store.config())
    tracker.log_model(store.folder / "no such export")
    tracker.finish("FINISHED")
    assert store.client.get_run(tracker.run_id).outputs.model_outputs == []
    assert store.warnings == []


def test_an_export_without_a_config_is_a_warning_and_a_failed_model(store: Store) -> None:
    (store.folder / "export").mkdir()
    tracker = store.start(store.config(tracking={"register": "helper"}))
    tracker.log_model(store.folder / "export")
    tracker.finish("FINISHED")
    assert "config.json" in store.warnings[0]
    assert store.client.search_registered_models() == []


def test_log_returns_while_mlflow_hangs(store: Store, server: Server) -> None:
    tracker = store.start(store.config(tracking={"uri": server.uri}))
    asked = server.asked
    server.answers.clear()
    tracker.log(1, {"loss": 1.0})
    wait_until(lambda: server.asked > asked)
    for step in range(2, 50):
        tracker.log(step, {"loss": 1.0})
    assert server.asked == asked + 1  # one that waits for its answer would have given up and asked again
    server.answers.set()
    tracker.finish("FINISHED")
    assert len(MlflowClient(server.uri).get_metric_history(tracker.run_id, "loss")) == 49


def test_metrics_logged_while_mlflow_is_away_arrive_later(store: Store, server: Server) -> None:
    tracker = store.start(store.config(tracking={"uri": server.uri}))
    server.away = True
    for step in range(20):
        tracker.log(step, {"loss": 1.0})
    wait_until(lambda: bool(store.warnings))
    server.away = False
    tracker.finish("FINISHED")
    assert len(MlflowClient(server.uri).get_metric_history(tracker.run_id, "loss")) == 20
    assert len(store.warnings) == 1 and "503" in store.warnings[0]


def test_a_store_that_breaks_midway_costs_one_warning_and_a_list_of_losses(store: Store) -> None:
    tracker = store.start(store.config())
    with sqlite3.connect(store.path) as connection:
        for table in ("latest_metrics", "metrics", "input_tags", "inputs"):
            connection.execute(f"DROP TABLE {table}")
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.log_dataset("train", "training", DIGEST, {"desirable": 1}, "rows.jsonl")
    tracker.log_artifact(store.folder / "missing.html")
    tracker.finish("FAILED")
    tracker.finish("FAILED")

    assert len(store.warnings) == 2, store.warnings
    first, last = store.warnings
    assert store.uri in first and "Training goes on" in first
    assert all(what in last for what in ("3 metric values", "dataset train", "artifact missing.html"))


def test_a_name_that_mlflow_refuses_does_not_hold_up_later_metrics(store: Store) -> None:
    tracker = store.start(store.config())
    tracker.log(1, {"not#allowed": 1.0})
    wait_until(lambda: bool(store.warnings))
    tracker.log(2, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert [m.step for m in store.client.get_metric_history(tracker.run_id, "loss")] == [2]
    assert "1 metric values" in store.warnings[-1]


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///{folder}",
        "sqlite:///{folder}/text.db",
        "sqlite:////proc/nowhere/mlflow.db",
        "file://{folder}/mlruns",
        "{folder}/mlruns",
        "nonsense://host",
    ],
)
def test_an_unusable_uri_costs_one_warning_and_no_patience(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With this, MLflow takes a folder, and fails at the first metric below another's name.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    config = Config(
        model={"path": "model"},
        data={"train": "rows.jsonl"},
        tracking={"uri": uri.format(folder=tmp_path)},
    )
    warnings: list[str] = []
    tracker = begin(config, run_id="old", tags={}, default_uri="unused", warn=warnings.append)

    assert type(tracker) is NullTracker and tracker.run_id == "old"
    assert len(warnings) == 1, warnings
    assert config.tracking.uri in warnings[0]
    assert "tracking.uri=sqlite" in warnings[0]
    assert not (tmp_path / "mlruns").exists()


def test_a_deleted_experiment_is_named_with_its_remedy(store: Store) -> None:
    store.client.delete_experiment(store.client.create_experiment("kto"))
    tracker = begin(store.config(), run_id=None, tags={}, default_uri=store.uri, warn=store.warnings.append)
    assert type(tracker) is NullTracker
    assert "mlflow experiments restore" in store.warnings[0]


def test_the_uri_is_the_configs_then_the_environments_then_the_default(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    by_environment = begin(
        store.config(), run_id=None, tags={}, default_uri="sqlite:////proc/no.db", warn=store.warnings.append
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no.db")
    by_config = store.start(store.config(tracking={"uri": store.uri}))
    by_environment.finish("FINISHED")
    by_config.finish("FINISHED")
    assert by_environment.uri == by_config.uri == store.uri


def test_a_disabled_tracker_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(model={"path": "m"}, data={"train": "rows.jsonl"}, tracking={"enabled": False})
    tracker = begin(config, run_id=None, tags={}, default_uri="sqlite:///x.db", warn=pytest.fail)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_a_new_store_is_made_in_silence_and_only_where_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)  # as the launcher's logging does, which lets alembic's notices through
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = Config(model={"path": "m"}, data={"train": "rows.jsonl"}, train={"output": "../runs/first"})
    warnings: list[str] = []
    tracker = begin(config, run_id=None, tags={}, default_uri="sqlite:///../runs/mlflow.db", warn=warnings.append)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    captured = capfd.readouterr()
    assert (captured.out, captured.err, warnings, caplog.messages) == ("", "", [], [])
    assert list(Path().iterdir()) == []
    assert (tmp_path / "runs" / "mlflow.db").is_file()


def test_runs_that_start_together_share_a_new_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kto_dist import Config; from kto_dist.record import tracking;"
        "config = Config(model={'path': 'm'}, data={'train': 'rows'}, train={'output': sys.argv[1]});"
        "tracker = tracking.start(config.tracking, settings=config, name='run', folder=Path(sys.argv[1]).parent,"
        " run_id=None, tags={}, default_uri=sys.argv[2], warn=print);"
        "tracker.log(1, {'loss': 1.0}); tracker.finish('FINISHED')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), f"sqlite:///{tmp_path}/mlflow.db"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[0] for run in runs] == ["", ""]


def test_files_are_added_to_a_run_that_has_ended(store: Store) -> None:
    tracker = store.start(store.config())
    tracker.finish("FINISHED")
    page = store.folder / "report.html"
    page.write_text("late")
    tracking.attach(store.uri, tracker.run_id, [page])
    assert [item.path for item in store.client.list_artifacts(tracker.run_id)] == ["report.html"]
    assert store.client.get_run(tracker.run_id).info.status == "FINISHED"

"""One run in MLflow: parameters, metrics by step, datasets, system load, artifacts, the model.

The only importer of mlflow, and imported only where a run is tracked (`tracking.start`): it takes seconds.

1. metrics leave from a thread of their own, and wait there while MLflow is away;
2. trouble warns once, and `finish` says what MLflow lacks.
"""

import getpass
import json
import logging
import os
import re
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from alembic.util.exc import CommandError
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from kto_dist.base.config import Section, flatten
from kto_dist.base.secrets import masked
from kto_dist.record.config import TrackingConfig
from kto_dist.record.mlmodel import write_mlmodel
from kto_dist.record.tracker import Status, Tracker
from kto_dist.record.tracking_uri import Unusable, alone, artifact_location, check

# What MLflow raises when it, its database, its server or its disk fails.
_ERRORS = (OSError, ImportError, sqlite3.Error, MlflowException, SQLAlchemyError, CommandError)

# MLflow's own limits (mlflow/utils/validation.py); a longer value is cut, since its start is worth having.
_PARAM_LENGTH, _DIGEST_LENGTH, _TAG_LENGTH = 6000, 36, 5000
_METRICS_PER_BATCH, _TAGS_PER_BATCH = 900, 100  # 1,000 together

_SYSTEM_METRICS_SECONDS = 5.0  # 12 metrics a sample: 200,000 rows a day
_SEND_SECONDS = 1.0
_RETRY_SECONDS = 10.0
_GOODBYE_SECONDS = 20.0  # longest that `finish` waits for each of its two threads
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def open_run(
    section: TrackingConfig,
    uri: str,
    *,
    settings: Section,
    name: str,
    folder: Path,
    run_id: str | None,
    tags: dict[str, str],
    warn: Callable[[str], None],
) -> "MlflowRun":
    """As `tracking.start` says. Raises `Unusable`, within seconds, where the run cannot be opened."""
    _calm()
    try:
        with _patience(retries=1, timeout=4):
            with alone(uri):
                check(uri)
                client, run = _open(section, name, folder, uri, run_id, warn)
            _describe(client, run, settings, tags, warn)
    except _ERRORS as error:
        raise Unusable(_reason(error)) from error
    return MlflowRun(section, uri, client, run, resumed=run.info.run_id == run_id, warn=warn)


def attach(uri: str, run_id: str, paths: list[Path]) -> None:
    """As `tracking.attach` says. Raises what MLflow raises."""
    client = MlflowClient(uri)
    for path in paths:
        client.log_artifact(run_id, str(path))


class MlflowRun(Tracker):
    """An MLflow run that is open."""

    def __init__(
        self,
        section: TrackingConfig,
        uri: str,
        client: MlflowClient,
        run: Run,
        *,
        resumed: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.run_id: str = run.info.run_id
        self.uri: str | None = masked(uri)
        self._experiment_id = run.info.experiment_id
        self._settings = section
        self._client = client
        self._warn = warn
        self._lacks: list[str] = []
        self._tables: list[str] = []
        self._troubled = False
        self._finished = False
        self._last_step = 0
        self._sender = _Sender(client, self.run_id, self._trouble)
        self._monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=_SYSTEM_METRICS_SECONDS, resume_logging=resumed, tracking_uri=uri
        )
        self._monitor.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queues the metrics of a step; a thread sends them."""
        now = int(time.time() * 1000)
        self._last_step = step
        self._sender.add([Metric(name, float(value), now, step) for name, value in metrics.items()])

    def tag(self, tags: dict[str, str]) -> None:
        """Queues tags; the same thread sends them."""
        self._sender.add_tags({name: masked(value)[:_TAG_LENGTH] for name, value in tags.items()})

    def log_dataset(
        self,
        name: str,
        context: str,
        digest: str,
        counts: dict[str, int],
        source: str,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Records which rows a run read, what for (`context`: training, heldout), and rows per class."""
        # `mlflow.data`'s classes know no counts; the UI shows those of `profile`.
        dataset = Dataset(
            name, digest[:_DIGEST_LENGTH], "local", json.dumps({"uri": source}), profile=json.dumps(counts)
        )
        notes = {"mlflow.data.context": context, "digest": digest, **counts, **(tags or {})}
        labels = [InputTag(key, str(value)) for key, value in notes.items()]
        with self._guarded(f"dataset {name}"):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, labels)])

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Uploads a file into `folder`, or a folder's content as `folder` (default: its own name)."""
        path = Path(path)
        with self._guarded(f"artifact {path.name}"):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder or path.name)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As `MlflowClient.log_table` writes it, which would append. Not patient: training waits."""
        table = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]})
        with self._guarded(f"table {name}", retries=0, timeout=10):
            self._client.log_text(self.run_id, table, name)
            if name not in self._tables:
                self._tables.append(name)
                listed = [{"path": each, "type": "table"} for each in self._tables]
                self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(listed))

    def log_model(self, export_dir: str | Path) -> None:
        """Uploads and registers the exported model where `tracking.log_model` or `.register` asks for it."""
        name = self._settings.register_as
        if not (self._settings.log_model or name):
            return
        with self._guarded("model"):
            model = self._upload_model(Path(export_dir))
            if name:
                with _unless_it_exists():
                    self._client.create_registered_model(name)
                # Not `models:/id`: a database store looks that up at the tracking URI of the process, not at ours.
                self._client.create_model_version(name, model.artifact_location, self.run_id, model_id=model.model_id)

    def adopt(self, children: list[str]) -> None:
        """Ids of runs that have ended: they are shown below this one from now on."""
        with self._guarded("its children"):
            for child in children:
                self._client.set_tag(child, "mlflow.parentRunId", self.run_id)

    def finish(self, status: Status) -> None:
        """Sends what waits, stops the threads and closes the run. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        lost = self._sender.close()
        if lost:
            self._lacks.append(f"{lost} metric values")
        # In a thread, because the monitor waits for a silent server without limit.
        stopping = threading.Thread(target=self._stop_monitor, daemon=True)
        stopping.start()
        stopping.join(2 if self._troubled else _GOODBYE_SECONDS)
        with self._guarded(f"status {status}"):
            self._client.set_terminated(self.run_id, status)
        if self._lacks:
            lacks = "; ".join(self._lacks)
            self._warn(f"MLflow run {self.run_id} lacks: {lacks}; the run's folder has all of it")

    def _stop_monitor(self) -> None:
        with self._guarded("system metrics"):
            self._monitor.finish()
            # The monitor drops what it has sampled since it last sent, which is all there is of a short run.
            self._monitor.collect_metrics()
            self._monitor.publish_metrics(self._monitor.aggregate_metrics())
            self._monitor.mlflow_logger.flush()

    def _upload_model(self, export: Path) -> LoggedModel:
        name = self._settings.run_name or "model"
        model = self._client.create_logged_model(
            self._experiment_id, name=re.sub(r"[/:.%\"']", "-", name), source_run_id=self.run_id
        )
        state: Literal["READY", "FAILED"] = "FAILED"
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_mlmodel(Path(folder), export, model.model_id, self.run_id, model.artifact_location)
                self._client.log_model_artifacts(model.model_id, folder)
            for entry in sorted(export.iterdir()):
                if entry.is_file() and entry.suffix not in _WEIGHTS:
                    self._client.log_model_artifact(model.model_id, str(entry), "components/tokenizer")
            self._client.log_model_artifacts(model.model_id, str(export), "model")
            state = "READY"
        finally:
            self._client.finalize_logged_model(model.model_id, state)
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=self._last_step)])
        return model

    def _trouble(self, what: str, error: Exception) -> None:
        if not self._troubled:
            self._troubled = True
            self._warn(f"MLflow at {self.uri} failed ({what}): {_reason(error)}. Training goes on")

    @contextmanager
    def _guarded(self, what: str, *, retries: int = 2, timeout: int = 120) -> Iterator[None]:
        try:
            with _patience(retries=0 if self._troubled else retries, timeout=10 if self._troubled else timeout):
                yield
        except _ERRORS as error:
            self._lacks.append(f"{what} ({_reason(error)})")
            self._trouble(what, error)


class _Sender:
    """Sends metrics from a thread of its own; while MLflow is away they wait."""

    def __init__(self, client: MlflowClient, run_id: str, trouble: Callable[[str, Exception], None]) -> None:
        self._client, self._run_id, self._trouble = client, run_id, trouble
        self._waiting: list[Metric] = []
        self._tags: dict[str, str] = {}
        self._refused = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def add(self, metrics: list[Metric]) -> None:
        with self._lock:
            self._waiting += metrics

    def add_tags(self, tags: dict[str, str]) -> None:
        with self._lock:
            self._tags |= tags

    def close(self) -> int:
        """Sends the rest and returns how many values never arrived."""
        self._closing.set()
        self._thread.join(_GOODBYE_SECONDS)
        with self._lock:
            return len(self._waiting) + self._refused

    def _work(self) -> None:
        pause = _SEND_SECONDS
        while not self._closing.wait(pause):
            pause = _SEND_SECONDS if self._send() else _RETRY_SECONDS
        self._send()

    def _send(self) -> bool:
        while True:
            with self._lock:
                batch, tags = self._waiting[:_METRICS_PER_BATCH], dict([*self._tags.items()][:_TAGS_PER_BATCH])
            if not batch and not tags:
                return True
            try:
                with _patience(retries=0, timeout=10):
                    self._client.log_batch(self._run_id, metrics=batch, tags=[RunTag(*tag) for tag in tags.items()])
            except _ERRORS as error:
                self._trouble("metrics", error)
                # A value that MLflow will never take must not hold up those behind it.
                if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                    return False
                self._refused += len(batch)
            with self._lock:
                del self._waiting[: len(batch)]
                # one that was set anew meanwhile waits
                self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}


def _open(
    section: TrackingConfig, name: str, folder: Path, uri: str, run_id: str | None, warn: Callable[[str], None]
) -> tuple[MlflowClient, Run]:
    client = MlflowClient(tracking_uri=uri)
    if run_id is not None:
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                client.update_run(run_id, status="RUNNING")
                return client, run
            why = "it was deleted"
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            why = _reason(error)
        warn(f"MLflow run {run_id} cannot be continued: {why}; a new run holds the steps from here on")
    experiment = _experiment(client, section.experiment, artifact_location(uri, folder))
    return client, client.create_run(experiment.experiment_id, run_name=section.run_name or name)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> Experiment:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with _unless_it_exists():  # another run may have created it since
            client.create_experiment(name, artifact_location=artifacts)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise Unusable(
            f"experiment {name} was deleted: `mlflow experiments restore -x {experiment.experiment_id}` "
            "brings it back, or choose another tracking.experiment"
        )
    return experiment


def _describe(
    client: MlflowClient, run: Run, settings: Section, tags: dict[str, str], warn: Callable[[str], None]
) -> None:
    """Tags and parameters. A parameter never changes in MLflow, so a resumed run's new values become tags."""
    params = {}
    for section, key, value in flatten(settings):
        text = value if isinstance(value, str) else json.dumps(value)
        params[f"{section}.{key}"] = masked(text)[:_PARAM_LENGTH]
    known = run.data.params
    changed = {key: value for key, value in params.items() if key in known and known[key] != value}
    if changed:
        listed = ", ".join(f"{key} ({known[key]} -> {value})" for key, value in changed.items())
        warn(f"the resumed MLflow run keeps its parameters; changed ones are tags `resumed.*`: {listed}")
    notes = {"mlflow.source.type": "LOCAL", "mlflow.source.name": Path(sys.argv[0]).name or "python"}
    with suppress(KeyError, OSError):  # a container's user may have no name
        notes["mlflow.user"] = getpass.getuser()
    if "git_commit" in tags:
        notes["mlflow.source.git.commit"] = tags["git_commit"]
    notes |= tags | {f"resumed.{key}": value for key, value in changed.items()}
    # One request holds 100 of each; the config has some 60 keys.
    new = [Param(key, value) for key, value in params.items() if key not in known]
    client.log_batch(run.info.run_id, params=new, tags=[RunTag(key, value) for key, value in notes.items()])


@contextmanager
def _unless_it_exists() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _calm() -> None:
    """Keeps MLflow's notices out of progress bars."""
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        # What it would report, `MlflowRun` reports once.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    urllib3 = logging.getLogger("urllib3.connectionpool")
    if _is_not_mlflow not in urllib3.filters:
        urllib3.addFilter(_is_not_mlflow)


def _is_not_mlflow(record: logging.LogRecord) -> bool:
    return "/mlflow" not in record.getMessage()


_patient: list[dict[str, str]] = []
_patience_lock = threading.Lock()


@contextmanager
def _patience(*, retries: int, timeout: int) -> Iterator[None]:
    """MLflow's own patience with a silent server is 7 retries of 120 s; the user's settings win over ours.

    It reads both from the environment, which threads share: while several are inside, the newest's count for all.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
    with _patience_lock:
        set_by_us = {key for others in _patient for key in others}
        ours = {key: value for key, value in wanted.items() if key in set_by_us or key not in os.environ}
        _patient.append(ours)
        os.environ.update(ours)
    try:
        yield
    finally:
        with _patience_lock:
            _patient.remove(ours)
            for key in ours:
                del os.environ[key]
            for others in _patient[-1:]:
                os.environ.update(others)


def _reason(error: Exception) -> str:
    text = masked(str(error)).strip() or type(error).__name__
    # urllib3 buries the system's own words in a line of its objects.
    system = re.search(
        r"\[Errno -?\d+\] [^'\"):]+|Read timed out|[Cc]onnect(ion)? timed out|Failed to resolve '[^']+'", text
    )
    return system[0] if system else text.splitlines()[0][:300].rstrip(".")

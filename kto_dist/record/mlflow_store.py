"""What is said to MLflow, one operation of a spool at a time.

In:  operations (`record.spool`). Out: calls of MLflow's client; its own patience is held back, and its errors are told
apart: those that pass, and those that are an answer.

    open      params, tags: the run is made, or gone on with
    metrics   points, up to a thousand values a request
    tags, dataset, artifact, table, model, adopt
    status    the run has ended
    close     another run has, whose process was killed
"""

import json
import logging
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

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
from sqlalchemy.exc import SQLAlchemyError

from kto_dist.base.secrets import masked
from kto_dist.record.mlmodel import write_mlmodel
from kto_dist.record.spool import Operation, Spool
from kto_dist.record.tracking_uri import Unusable

# What MLflow raises when it, its database, its server or its disk fails.
ERRORS = (OSError, ImportError, sqlite3.Error, MlflowException, SQLAlchemyError, CommandError)
_ANSWERS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
_GONE = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}

_KEY, _TABLES = "kto_dist.key", "mlflow.loggedArtifacts"
_DIGEST_LENGTH, _VALUES, _TAGS = 36, 1000, 100  # MLflow's own limits (mlflow/utils/validation.py)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class Unsendable(OSError):
    """What is to be sent is not there, or not what it should be: to try again is in vain."""


class Store:
    """Tells MLflow what waits in a spool."""

    def __init__(self, uri: str, spool: Spool, warn: Callable[[str], None]) -> None:
        self._client = MlflowClient(tracking_uri=uri)
        self._spool, self._warn = spool, warn
        self._experiment_id: str | None = None
        self.opened = False
        """The run is open, by this process."""
        self.refused: list[str] = []
        """What MLflow has answered that it will not take, and why."""

    def send(self, *, points: bool = True, patience: Callable[[Operation], tuple[int, int]]) -> None:
        """All that waits, in order; up to the first points, where they are not wanted. Raises one of `ERRORS` where
        MLflow is away: the rest waits on. `patience`: retries, and seconds that an answer may take."""
        while operations := self._spool.first(_VALUES):
            kind = operations[0]["kind"]
            if kind == "metrics" and not points:
                return
            retries, timeout = patience(operations[0])
            with patient(retries=retries, timeout=timeout):
                self._tell(operations)
            self._spool.arrived(len(operations))

    def end(self, status: str) -> None:
        """The run has ended, whatever else still waits. Raises one of `ERRORS`."""
        if self._spool.run_id is not None:
            self._client.set_terminated(self._spool.run_id, status)
            self._spool.status = status
            self._spool.keep()

    def _tell(self, operations: Sequence[Operation]) -> None:
        """Raises one of `ERRORS` but for answers, which are noted."""
        if operations[0]["kind"] == "metrics":
            self._points(
                [
                    Metric(name, float(value), operation["time"], operation["step"])
                    for operation in operations
                    for name, value in operation["values"].items()
                ]
            )
            return
        (operation,) = operations
        tell: dict[str, Callable[[Operation], None]] = {
            "open": self._open,
            "tags": self._tags,
            "dataset": self._dataset,
            "artifact": self._artifact,
            "table": self._table,
            "model": self._model,
            "adopt": self._adopt,
            "status": lambda operation: self.end(operation["status"]),
            "close": self._close,
        }
        try:
            tell[operation["kind"]](operation)
        except ERRORS as error:
            if not _is_answer(error):
                raise
            self.refused.append(f"{named(operation)} ({reason(error)})")

    def _points(self, metrics: list[Metric]) -> None:
        """A name that MLflow does not take must not keep others out: halves are tried, until it is alone."""
        try:
            self._client.log_batch(self._id, metrics=metrics)
        except MlflowException as error:
            if error.error_code not in _ANSWERS:
                raise
            if len(metrics) == 1 or error.error_code != "INVALID_PARAMETER_VALUE":
                self.refused.append(f"{len(metrics)} metric values ({reason(error)})")
                return
            middle = len(metrics) // 2
            self._points(metrics[:middle])
            self._points(metrics[middle:])

    @property
    def _id(self) -> str:
        assert self._spool.run_id is not None, "a run is opened first"
        return self._spool.run_id

    def _open(self, operation: Operation) -> None:
        run = self._continued() or self._made(operation)
        self._experiment_id = run.info.experiment_id
        self._spool.run_id, self._spool.status = run.info.run_id, None
        self._spool.keep()
        self.opened = True
        self._describe(run, operation["params"], operation["tags"])

    def _continued(self) -> Run | None:
        """The run that is known already; None where there is none, or it is gone."""
        run_id = self._spool.run_id
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                self._client.update_run(run_id, status="RUNNING")
                return run
            why = "it was deleted"
        except MlflowException as error:
            if error.error_code not in _GONE:
                raise
            why = reason(error)
        self._warn(f"MLflow run {run_id} cannot be continued: {why}; a new run holds the steps from here on")
        return None

    def _made(self, operation: Operation) -> Run:
        experiment = self._experiment(operation["experiment"], operation["artifacts"]).experiment_id
        # an answer that was lost may have been a yes
        wanted = f"tags.`{_KEY}` = '{self._spool.key}'"
        found = self._client.search_runs([experiment], filter_string=wanted, max_results=1)
        if found:
            return found[0]
        return self._client.create_run(experiment, run_name=operation["name"], tags={_KEY: self._spool.key})

    def _experiment(self, name: str, artifacts: str | None) -> Experiment:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            with _unless_it_exists():  # another run may have created it since
                self._client.create_experiment(name, artifact_location=artifacts)
            experiment = self._client.get_experiment_by_name(name)
            assert experiment is not None
        if experiment.lifecycle_stage != "active":
            raise Unusable(
                f"experiment {name} was deleted: `mlflow experiments restore -x {experiment.experiment_id}` "
                "brings it back, or choose another tracking.experiment"
            )
        return experiment

    def _describe(self, run: Run, params: dict[str, str], tags: dict[str, str]) -> None:
        """Tags and parameters. A parameter never changes in MLflow, so a resumed run's new values become tags."""
        known = run.data.params
        changed = {key: value for key, value in params.items() if key in known and known[key] != value}
        if changed:
            listed = ", ".join(f"{key} ({known[key]} -> {value})" for key, value in changed.items())
            self._warn(f"the resumed MLflow run keeps its parameters; changed ones are tags `resumed.*`: {listed}")
        notes = tags | {f"resumed.{key}": value for key, value in changed.items()}
        # One request holds 100 of each; the config has some 60 keys.
        new = [Param(key, value) for key, value in params.items() if key not in known]
        self._client.log_batch(run.info.run_id, params=new, tags=[RunTag(key, value) for key, value in notes.items()])

    def _tags(self, operation: Operation) -> None:
        tags = [RunTag(name, value) for name, value in operation["tags"].items()]
        for start in range(0, len(tags), _TAGS):
            self._client.log_batch(self._id, tags=tags[start : start + _TAGS])

    def _dataset(self, operation: Operation) -> None:
        # `mlflow.data`'s classes know no counts; the UI shows those of `profile`.
        dataset = Dataset(
            operation["name"],
            operation["digest"][:_DIGEST_LENGTH],
            "local",
            json.dumps({"uri": operation["source"]}),
            profile=json.dumps(operation["counts"]),
        )
        notes = {
            "mlflow.data.context": operation["context"],
            "digest": operation["digest"],
            **operation["counts"],
            **operation["tags"],
        }
        labels = [InputTag(key, str(value)) for key, value in notes.items()]
        self._client.log_inputs(self._id, [DatasetInput(dataset, labels)])

    def _artifact(self, operation: Operation) -> None:
        path, folder = self._spool.place_of(operation["path"]), operation["folder"]
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self._id, str(path), folder)

    def _table(self, operation: Operation) -> None:
        """As `MlflowClient.log_table` writes it, which would append."""
        name = operation["name"]
        self._client.log_text(self._id, json.dumps(operation["table"]), name)
        listed = json.loads(self._client.get_run(self._id).data.tags.get(_TABLES, "[]"))
        if all(entry.get("path") != name for entry in listed):
            self._client.set_tag(self._id, _TABLES, json.dumps([*listed, {"path": name, "type": "table"}]))

    def _model(self, operation: Operation) -> None:
        model, name = self._upload(operation), operation["register"]
        if name:
            with _unless_it_exists():
                self._client.create_registered_model(name)
            # Not `models:/id`: a database store looks that up at the tracking URI of the process, not at ours.
            self._client.create_model_version(name, model.artifact_location, self._id, model_id=model.model_id)

    def _upload(self, operation: Operation) -> LoggedModel:
        export = self._spool.place_of(operation["path"])
        if self._experiment_id is None:
            self._experiment_id = self._client.get_run(self._id).info.experiment_id
        model = self._client.create_logged_model(
            self._experiment_id, name=re.sub(r"[/:.%\"']", "-", operation["name"]), source_run_id=self._id
        )
        state: Literal["READY", "FAILED"] = "FAILED"
        try:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    write_mlmodel(Path(folder), export, model.model_id, self._id, model.artifact_location)
                except OSError as error:
                    raise Unsendable(str(error)) from error
                self._client.log_model_artifacts(model.model_id, folder)
            for entry in sorted(export.iterdir()):
                if entry.is_file() and entry.suffix not in _WEIGHTS:
                    self._client.log_model_artifact(model.model_id, str(entry), "components/tokenizer")
            self._client.log_model_artifacts(model.model_id, str(export), "model")
            state = "READY"
        finally:
            self._client.finalize_logged_model(model.model_id, state)
        self._client.log_outputs(self._id, [LoggedModelOutput(model.model_id, step=operation["step"])])
        return model

    def _adopt(self, operation: Operation) -> None:
        for child in operation["children"]:
            self._client.set_tag(child, "mlflow.parentRunId", self._id)

    def _close(self, operation: Operation) -> None:
        if self._client.get_run(operation["run"]).info.status == "RUNNING":
            self._client.set_terminated(operation["run"], "KILLED")


def named(operation: Operation) -> str:
    """For a message: what MLflow lacks."""
    if operation["kind"] == "metrics":
        return f"{len(operation['values'])} metric values"
    what = operation.get("name") if operation["kind"] in ("dataset", "table") else operation.get("status")
    if operation["kind"] in ("artifact", "model"):
        what = Path(operation["path"]).name
    return operation["kind"] if what is None else f"{operation['kind']} {what}"


def _is_answer(error: Exception) -> bool:
    """Whether to ask again is in vain: MLflow has understood, or there is nothing to send."""
    if isinstance(error, MlflowException):
        return error.error_code in _ANSWERS
    return isinstance(error, FileNotFoundError | Unsendable)


@contextmanager
def _unless_it_exists() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def calm() -> None:
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
def patient(*, retries: int, timeout: int) -> Iterator[None]:
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


def reason(error: Exception) -> str:
    text = masked(str(error)).strip() or type(error).__name__
    # urllib3 buries the system's own words in a line of its objects.
    system = re.search(
        r"\[Errno -?\d+\] [^'\"):]+|Read timed out|[Cc]onnect(ion)? timed out|Failed to resolve '[^']+'", text
    )
    return system[0] if system else text.splitlines()[0][:300].rstrip(".")

"""One run in MLflow: parameters, metrics by step, datasets, system load, artifacts, the model.

Imported only where a run is tracked (`tracking.start`): MLflow takes seconds.

1. whatever is told goes into the spool first, and leaves from a thread of its own, in order;
2. while MLflow is away it waits there, and is tried again, also where MLflow was away from the start;
3. trouble warns once, and `finish` says what MLflow lacks.
"""

import getpass
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from kto_dist.base.config import Section, flatten
from kto_dist.base.secrets import masked
from kto_dist.record.config import TrackingConfig
from kto_dist.record.mlflow_store import ERRORS, Store, calm, named, patient, reason
from kto_dist.record.spool import Operation, Spool
from kto_dist.record.tracker import Status, Tracker
from kto_dist.record.tracking_uri import Unusable, alone, artifact_location, check, is_elsewhere

# MLflow's own limits (mlflow/utils/validation.py); a longer value is cut, since its start is worth having.
_PARAM_LENGTH, _TAG_LENGTH = 6000, 5000
_SYSTEM_METRICS_SECONDS = 5.0  # 12 metrics a sample: 200,000 rows a day
_SEND_SECONDS = 1.0
_GOODBYE_SECONDS = 20.0  # longest that `finish` waits where something is wrong, or the run was stopped


def open_run(
    section: TrackingConfig,
    uri: str,
    *,
    settings: Section,
    name: str,
    folder: Path,
    spool: Spool,
    tags: dict[str, str],
    warn: Callable[[str], None],
    retry: float,
) -> "MlflowRun":
    """As `tracking.start` says. Raises `Unusable`, within seconds, where waiting would not help."""
    calm()
    spool.uri = masked(uri)
    spool.add(
        {
            "kind": "open",
            "experiment": section.experiment,
            "artifacts": artifact_location(uri, folder),
            "name": section.run_name or name,
            "params": _params(settings),
            "tags": _tags(tags),
        }
    )
    run = MlflowRun(section, uri, spool, warn, retry)
    try:
        with patient(retries=1, timeout=4), alone(uri):
            check(uri)
            run.send_first()
    except ERRORS as error:
        if isinstance(error, Unusable | ImportError) or not is_elsewhere(uri):
            raise Unusable(reason(error)) from error
        run.away(error)
    run.start()
    return run


def attach(uri: str, run_id: str, paths: list[Path]) -> None:
    """As `tracking.attach` says. Raises what MLflow raises."""
    client = MlflowClient(uri)
    for path in paths:
        client.log_artifact(run_id, str(path))


def deliver(uri: str, spool: Spool, status: Status, warn: Callable[[str], None]) -> tuple[int, list[str]]:
    """As `tracking.deliver` says."""
    calm()
    waiting = len(spool.waiting)
    try:
        check(uri)
        store = Store(uri, spool, warn)
        store.send(patience=lambda operation: (1, 120))
        if spool.status is None:
            store.end(status)
    except ERRORS as error:
        raise Unusable(reason(error)) from error
    if status == "FINISHED":
        spool.empty()
    return waiting, store.refused


class MlflowRun(Tracker):
    """An MLflow run that is open, or is going to be as soon as MLflow answers."""

    def __init__(
        self, section: TrackingConfig, uri: str, spool: Spool, warn: Callable[[str], None], retry: float
    ) -> None:
        self.uri: str | None = masked(uri)
        self._address, self._settings, self._warn, self._retry = uri, section, warn, retry
        self._spool = spool
        self._resumed = spool.run_id is not None
        self._store: Store | None = None
        self._away = self._warned = self._finished = False
        self._last_step = 0
        self._monitor: SystemMetricsMonitor | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def run_id(self) -> str | None:  # type: ignore[override]  # it may come late
        return self._spool.run_id

    def send_first(self) -> None:
        """Opens the run, unless points of an earlier process wait before that. Raises one of `ERRORS`."""
        self._send(points=False)

    def start(self) -> None:
        self._thread.start()

    def away(self, error: Exception) -> None:
        """MLflow does not answer at the start."""
        self._away = True
        self.trouble("at the start", error)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queues the metrics of a step; a thread sends them."""
        self._last_step = step
        values = {name: float(value) for name, value in metrics.items()}
        self._spool.add({"kind": "metrics", "step": step, "time": int(time.time() * 1000), "values": values})

    def tag(self, tags: dict[str, str]) -> None:
        """Queues tags; the same thread sends them."""
        self._spool.add({"kind": "tags", "tags": {name: masked(value)[:_TAG_LENGTH] for name, value in tags.items()}})

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
        self._spool.add(
            {
                "kind": "dataset",
                "name": name,
                "context": context,
                "digest": digest,
                "counts": counts,
                "source": source,
                "tags": tags or {},
            }
        )

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Uploads a file into `folder`, or a folder's content as `folder` (default: its own name)."""
        self._spool.add({"kind": "artifact", "path": self._spool.path_of(Path(path)), "folder": folder})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of plain values, in place of an earlier one of this name (`<word>.json`)."""
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._spool.add({"kind": "table", "name": name, "table": table})

    def log_model(self, export_dir: str | Path) -> None:
        """Uploads and registers the exported model where `tracking.log_model` or `.register` asks for it."""
        register = self._settings.register_as
        if self._settings.log_model or register:
            self._spool.add(
                {
                    "kind": "model",
                    "path": self._spool.path_of(Path(export_dir)),
                    "name": self._settings.run_name or "model",
                    "register": register,
                    "step": self._last_step,
                }
            )

    def adopt(self, children: list[str]) -> None:
        """Ids of runs that have ended: they are shown below this one from now on."""
        self._spool.add({"kind": "adopt", "children": children})

    def finish(self, status: Status) -> None:
        """Sends what waits, stops the threads and closes the run. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._spool.add({"kind": "status", "status": status})
        self._closing.set()
        self._thread.join(None if status == "FINISHED" and not self._away else _GOODBYE_SECONDS)
        waiting, refused = self._spool.waiting, [] if self._store is None else self._store.refused
        if not waiting and status == "FINISHED":
            self._spool.empty()
        if waiting or refused:
            self._warn(self._lacks(waiting, refused))

    def trouble(self, what: str, error: Exception) -> None:
        """Warns the first time."""
        if not self._warned:
            self._warned = True
            waits = "in the run's folder" if self._spool.folder is not None else "in memory"
            self._warn(
                f"MLflow at {self.uri} failed ({what}): {reason(error)}. Training goes on; what MLflow is to get waits "
                f"{waits}, and is sent when it answers"
            )

    def _lacks(self, waiting: list[Operation], refused: list[str]) -> str:
        values = sum(len(operation["values"]) for operation in waiting if operation["kind"] == "metrics")
        others = [named(operation) for operation in waiting if operation["kind"] not in ("metrics", "status", "close")]
        lacks = "; ".join([*([f"{values:,} metric values"] if values else []), *others, *refused])
        text = f"MLflow run {self.run_id or 'yet to be made'} lacks: {lacks or 'how the run has ended'}"
        if waiting and self._spool.folder is not None:
            return f"{text}; what waits is sent by `kto-dist track {self._spool.folder.parent}` when MLflow is back"
        return f"{text}; the run's folder has all of it"

    def _work(self) -> None:
        pause = _SEND_SECONDS
        while not self._closing.wait(pause):
            pause = _SEND_SECONDS if self._try() else self._retry
        if self._monitor is not None:
            self._stop_monitor(self._monitor)
        if not self._try() and self._store is not None:
            # what waits is sent another time; that the run has ended can be told already
            with suppress(*ERRORS), patient(retries=0, timeout=5):
                self._store.end(self._spool.waiting[-1]["status"])

    def _try(self) -> bool:
        """Whether all has arrived."""
        try:
            self._send()
        except ERRORS as error:
            self._away = True
            self.trouble(named(self._spool.first(1)[0]) if self._spool.waiting else "the run", error)
            return False
        self._away = False
        return True

    def _send(self, *, points: bool = True) -> None:
        if self._store is None:
            self._store = Store(self._address, self._spool, self._warn)
        refused = len(self._store.refused)
        try:
            self._store.send(points=points, patience=self._patience)
        finally:
            if self._monitor is None and self._store.opened and not self._closing.is_set():
                assert self._spool.run_id is not None
                self._start_monitor(self._spool.run_id)
            for what in self._store.refused[refused:]:
                self.trouble("it does not take all", Unusable(what))

    def _patience(self, operation: Operation) -> tuple[int, int]:
        if operation["kind"] in ("artifact", "model") and not self._away:
            return 2, 120
        return 0, 4 if operation["kind"] == "open" else 10

    def _start_monitor(self, run_id: str) -> None:
        self._monitor = SystemMetricsMonitor(
            run_id,
            sampling_interval=_SYSTEM_METRICS_SECONDS,
            resume_logging=self._resumed,
            tracking_uri=self._address,
        )
        self._monitor.start()

    def _stop_monitor(self, monitor: SystemMetricsMonitor) -> None:
        """In a thread, because the monitor waits for a silent server without limit."""

        def stop() -> None:
            with suppress(*ERRORS), patient(retries=0, timeout=10):
                monitor.finish()
                # it drops what it has sampled since it last sent, which is all there is of a short run
                monitor.collect_metrics()
                monitor.publish_metrics(monitor.aggregate_metrics())
                monitor.mlflow_logger.flush()

        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(2 if self._away else _GOODBYE_SECONDS)


def _params(settings: Section) -> dict[str, str]:
    params = {}
    for section, key, value in flatten(settings):
        text = value if isinstance(value, str) else json.dumps(value)
        params[f"{section}.{key}"] = masked(text)[:_PARAM_LENGTH]
    return params


def _tags(tags: dict[str, str]) -> dict[str, str]:
    notes = {"mlflow.source.type": "LOCAL", "mlflow.source.name": Path(sys.argv[0]).name or "python"}
    with suppress(KeyError, OSError):  # a container's user may have no name
        notes["mlflow.user"] = getpass.getuser()
    if "git_commit" in tags:
        notes["mlflow.source.git.commit"] = tags["git_commit"]
    return notes | tags

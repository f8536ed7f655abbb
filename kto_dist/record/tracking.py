"""A run's record, opened: in MLflow if it can be, else nowhere.

In:  the config, tags, and (from the tracker's methods) each step's metrics as plain floats.
Out: one MLflow run, which a resumed training continues.

Training matters more than its record (`metrics.jsonl` and the report are complete without MLflow). So trouble at the
start is found within seconds, and costs one warning. Where a server does not answer, what it is to get waits in the
run's folder; what can never work costs the tracking.
"""

import os
from collections.abc import Callable
from pathlib import Path

from kto_dist.base.config import Section
from kto_dist.base.secrets import masked
from kto_dist.record.config import TrackingConfig
from kto_dist.record.spool import FOLDER, Spool
from kto_dist.record.tracker import NullTracker, Status, Tracker
from kto_dist.record.tracking_uri import Unusable, absolute

RETRY_SECONDS = 10.0
"""After which a server that was away is asked again."""


def start(
    section: TrackingConfig,
    *,
    settings: Section,  # the whole config, whose values become the run's params
    name: str,  # of the run, where `tracking.run_name` gives none
    folder: Path,  # where artifacts go by default: that of the runs
    run_id: str | None,  # of the interrupted run, None for a new one
    tags: dict[str, str],
    default_uri: str,  # used where neither `tracking.uri` nor MLFLOW_TRACKING_URI is set
    warn: Callable[[str], None],
    keep_in: Path | None = None,  # the run's own folder, for what MLflow has not got yet; None: in memory
    step: int = 0,  # done, by the checkpoint that the run goes on from
    same: bool = True,  # the steps after it are going to give the values that they gave before
    retry: float = RETRY_SECONDS,
) -> Tracker:
    """Opens (or continues) the MLflow run. Never raises for MLflow's sake: `warn`, and a `NullTracker`."""
    if not section.enabled:
        return NullTracker(run_id)
    uri = absolute(section.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri)
    _quiet()
    spool = Spool(keep_in, warn)
    spool.begin(step=step, same=same)
    spool.run_id = spool.run_id or run_id
    try:
        # here, because the import of MLflow takes seconds
        from kto_dist.record.mlflow_run import open_run

        return open_run(
            section, uri, settings=settings, name=name, folder=folder, spool=spool, tags=tags, warn=warn, retry=retry
        )
    except (Unusable, ImportError) as error:
        warn(
            f"MLflow at {masked(uri)} cannot be used: {error}. The run goes on without it "
            "(metrics.jsonl and report.html have everything). To track it, start that server or set "
            "tracking.uri=sqlite:////path/to/mlflow.db; tracking.enabled=false silences this"
        )
        return NullTracker(run_id)


def attach(uri: str, run_id: str, paths: list[Path]) -> None:
    """Adds files to a run that has ended, in place of earlier ones of the same name."""
    from kto_dist.record import mlflow_run

    mlflow_run.attach(uri, run_id, paths)


def has_spool(run: Path) -> bool:
    """Whether a run's folder says anything of an MLflow run."""
    return (run / FOLDER).is_dir()


def address_of(run: Path) -> str | None:
    """The tracking URI that a run's folder tells, with `***` for a password."""
    return Spool(run).uri


def deliver(uri: str, run: Path, status: Status, warn: Callable[[str], None]) -> tuple[int, list[str], str | None]:
    """Sends what waits in a run's folder, and closes the MLflow run with `status` where it is still open.

    Returns how many operations waited, which of them MLflow refused, and the MLflow run. Raises `Unusable`.
    """
    _quiet()
    from kto_dist.record import mlflow_run

    spool = Spool(run, warn)
    waiting, refused = mlflow_run.deliver(absolute(uri), spool, status, warn)
    return waiting, refused, spool.run_id


def _quiet() -> None:
    """MLflow's usage statistics stay at home, and its notices out of progress bars: read by its import."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

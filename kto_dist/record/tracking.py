"""A run's record, opened: in MLflow if it can be, else nowhere.

In:  the config, tags, and (from the tracker's methods) each step's metrics as plain floats.
Out: one MLflow run, which a resumed training continues.

Training matters more than its record (`metrics.jsonl` and the report are complete without MLflow). So trouble at the
start is found within seconds, and costs one warning and the tracking, not the run.
"""

import os
from collections.abc import Callable
from pathlib import Path

from kto_dist.base.config import Section
from kto_dist.base.secrets import masked
from kto_dist.record.config import TrackingConfig
from kto_dist.record.tracker import NullTracker, Tracker
from kto_dist.record.tracking_uri import Unusable, absolute


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
) -> Tracker:
    """Opens (or continues) the MLflow run. Never raises for MLflow's sake: `warn`, and a `NullTracker`."""
    if not section.enabled:
        return NullTracker(run_id)
    uri = absolute(section.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri)
    # its usage statistics stay at home, and its notices out of progress bars: read by MLflow's import
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        # here, because the import of MLflow takes seconds
        from kto_dist.record.mlflow_run import open_run

        return open_run(section, uri, settings=settings, name=name, folder=folder, run_id=run_id, tags=tags, warn=warn)
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

"""Fills the reference store for a config and trains nothing: for other nodes than the policy's, or the night before.

It is an MLflow run of its own, named after the training run that it is for, with the pass's progress as metrics.
"""

from pathlib import Path

from kto_dist import comm, tracking
from kto_dist.config import Config
from kto_dist.console import Console
from kto_dist.environment import environment_tags
from kto_dist.errors import UserError
from kto_dist.pass_record import PassRecord
from kto_dist.prepare import prepare
from kto_dist.reference import Outcome, together
from kto_dist.score import find_reference, score_reference


def precompute(config: Config) -> Outcome:
    """Collective. Raises `UserError`."""
    comm.init()
    console = Console()
    prepared = prepare(config, console)
    setup, identity = find_reference(prepared, console)
    record = PassRecord(lambda: _open_run(config, identity.digest, console))
    status: tracking.Status = "FAILED"
    try:
        with record.ended_by_sigterm():
            scores = score_reference(prepared, setup, identity, console, record.watch, record.open)
        together(record.open)
        record.end(scores.outcome)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        record.finish(status)
    return scores.outcome


def _open_run(config: Config, fingerprint: str, console: Console) -> tracking.Tracker | tracking.NullTracker:
    output = Path(config.train.output).resolve()
    name = f"precompute-{config.tracking.run_name or output.name}"
    named = config.model_copy(update={"tracking": config.tracking.model_copy(update={"run_name": name})})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output ({output}) cannot be written: {error}; give a folder with room") from None
    return tracking.start(
        named,
        run_id=None,
        tags={
            **environment_tags(),
            "job": "precompute",
            "reference_fingerprint": fingerprint,
            "world_size": str(comm.world_size()),
        },
        default_uri=f"sqlite:///{output.parent / 'mlflow.db'}",
        warn=console.warn,
    )

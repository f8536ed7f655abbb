"""`kto-dist track RUN`: MLflow is told what it missed while it was away."""

import os
import uuid
from pathlib import Path

import click

from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked
from kto_dist.record import tracking
from kto_dist.record.run_folder import RunFolder
from kto_dist.record.tracker import Status
from kto_dist.record.tracking_uri import Unusable
from kto_dist.training.lock import RunLock


@click.command(short_help="Tell MLflow what it missed of a run while it was away.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--uri", help="MLflow tracking URI; default: that of the run.")
def track(run: Path, uri: str | None) -> None:
    """Tell MLflow what it missed of RUN while it was away: metrics, datasets, artifacts, and how the run ended.

    RUN is the folder of a run (train.output) that nobody is at work in. What MLflow has already is not sent again.
    """
    if not tracking.has_spool(run):
        raise UserError(f"{run} holds nothing for MLflow: give the folder (train.output) of a run that was tracked")
    lock = RunLock(run, uuid.uuid4().hex)
    lock.take()
    try:
        # how a run ends whose process was killed before it could say so
        status: Status = "FINISHED" if RunFolder(run).summary.exists() else "KILLED"
        address = uri or _uri_of(run)
        waiting, refused, run_id = tracking.deliver(address, run, status, lambda text: click.echo(f"warning: {text}"))
    except Unusable as error:
        raise click.ClickException(f"MLflow at {masked(address)} failed: {error}; what waits is still there") from None
    finally:
        lock.release()
    click.echo(f"MLflow run {run_id}: {'nothing waited' if not waiting else f'{waiting:,} operations were sent'}")
    for what in refused:
        click.echo(f"warning: MLflow does not take {what}")


def _uri_of(run: Path) -> str:
    """Where the run was tracked. Raises `UserError` where the folder must not say."""
    known = tracking.address_of(run)
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    if known is None or "***" in known:
        if environment is None:
            raise UserError(
                f"where {run} was tracked is not kept in its folder, or has a password ({known}): give it by --uri"
            )
        return environment
    return known

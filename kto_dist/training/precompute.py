"""Fills the reference store for a config and trains nothing: for other nodes than the policy's, or the night before.

`precompute` is an MLflow run of its own, named after the training run that it is for, with the pass's progress as
metrics. `work` does the same as one of several workers (`reference/worker.py`), which are no runs: they come and go.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from kto_dist.base import agree, comm, restart
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.signals import before_sigterm
from kto_dist.model.memory import NeedsRestart
from kto_dist.record import tracking
from kto_dist.record.environment import environment_tags
from kto_dist.record.tracker import Status, Tracker
from kto_dist.reference.logps import fill_store, score_reference
from kto_dist.reference.progress import Progress, Watch
from kto_dist.reference.record import PassRecord
from kto_dist.reference.scoring import Outcome
from kto_dist.reference.worker import Working
from kto_dist.store.leases import Leases
from kto_dist.store.storage import LocalStorage
from kto_dist.training.agreement import begin_together
from kto_dist.training.config import Config
from kto_dist.training.prepare import find, prepare, wanted


def precompute(config: Config, watch: Watch | None = None) -> Outcome:
    """Collective. `watch` is called on every rank after each micro-batch. Raises `UserError`."""
    comm.init()
    begin_together("precompute", config)
    console = Console()
    prepared = prepare(config, console)
    setup, fingerprint = find(prepared, console)
    record = PassRecord(lambda: _open_run(config, fingerprint.digest, console))

    def both(progress: Progress) -> None:
        record.watch(progress)
        if watch is not None:
            watch(progress)

    status: Status = "FAILED"
    try:
        with record.ended_by_sigterm(), restart.before(record.last_words):
            refs = score_reference(wanted(prepared, console), setup, fingerprint, console, both, record.open)
        agree.together(record.open)
        record.end(refs.outcome)
        status = "FINISHED"
    except (NeedsRestart, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        record.finish(status)
    return refs.outcome


def work(config: Config, working: Working | None = None, watch: Watch = lambda progress: None) -> Outcome:
    """Scores pieces of what the store lacks until it lacks nothing, beside whatever other workers there are.

    Raises `UserError`, and `Stopped` after a SIGTERM.
    """
    comm.init()
    if comm.world_size() > 1:
        raise UserError(
            f"a worker scores alone, and this is one of {comm.world_size()} ranks: start it without a launcher, once "
            "for each device"
        )
    console = Console()
    prepared = prepare(config, console, partial(_turn, Path(config.data.cache), console))
    setup, fingerprint = find(prepared, console)
    return fill_store(wanted(prepared, console), setup, fingerprint, console, working or Working(), watch)


@contextmanager
def _turn(cache: Path, console: Console, folders: Callable[[], list[Path]]) -> Iterator[None]:
    """Of workers that start together on one `data.cache` one makes the tokens, and the others wait for them."""
    wanted = folders()
    if all(folder.exists() for folder in wanted):
        yield
        return
    leases, lease, said = Leases(LocalStorage(cache)), None, False
    with before_sigterm(leases.give_back):
        while (lease := leases.take([wanted[-1].name])) is None and not all(folder.exists() for folder in wanted):
            if not said:
                console.say(f"waiting for {', '.join(leases.holders([wanted[-1].name]))}, which makes the tokens")
            said = True
            time.sleep(leases.pause)
        with lease or nullcontext():
            yield


def _open_run(config: Config, fingerprint: str, console: Console) -> Tracker:
    output = Path(config.train.output).resolve()
    name = f"precompute-{config.tracking.run_name or output.name}"
    section = config.tracking.model_copy(update={"run_name": name})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output ({output}) cannot be written: {error}; give a folder with room") from None
    return tracking.start(
        section,
        settings=config.model_copy(update={"tracking": section}),
        name=name,
        folder=output.parent,
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

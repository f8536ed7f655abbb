"""Fills the reference store for a config and trains nothing: for other nodes than the policy's, or the night before.

It is an MLflow run of its own, named after the training run that it is for, with the pass's progress as metrics.
"""

import time
from pathlib import Path

from kto_dist import comm, tracking
from kto_dist.config import Config
from kto_dist.console import Console
from kto_dist.environment import environment_tags
from kto_dist.prepare import prepare, score_reference
from kto_dist.reference import Outcome, Progress

SECONDS_BETWEEN_POINTS = 10.0


def precompute(config: Config) -> Outcome:
    """Collective. Raises `UserError`."""
    comm.init()
    console = Console()
    prepared = prepare(config, console)
    record = _Record(config, console)
    status = "FAILED"
    try:
        scores = score_reference(prepared, console, record.watch)
        record.end(scores.outcome)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        record.tracker.finish(status)
    return scores.outcome


class _Record:
    """The pass in MLflow: a point now and then; its step is the number of pairs that are scored."""

    def __init__(self, config: Config, console: Console):
        self.tracker = tracking.NullTracker()
        if comm.is_main():
            output = Path(config.train.output).resolve()
            name = f"precompute-{config.tracking.run_name or output.name}"
            named = config.model_copy(update={"tracking": config.tracking.model_copy(update={"run_name": name})})
            output.parent.mkdir(parents=True, exist_ok=True)
            self.tracker = tracking.start(
                named,
                run_id=None,
                tags={**environment_tags(), "job": "precompute", "world_size": str(comm.world_size())},
                default_uri=f"sqlite:///{output.parent / 'mlflow.db'}",
                warn=console.warn,
            )
        self._step, self._said = 0, 0.0

    def watch(self, progress: Progress) -> None:
        self._step = progress.before + progress.done
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_POINTS or progress.done == progress.total:
            self._said = now
            self.tracker.log(
                self._step,
                {
                    "reference/rows_per_second": progress.rows_per_second,
                    "reference/tokens_per_second": progress.tokens_per_second,
                    "reference/seconds_left": progress.seconds_left,
                    "reference/share_done": progress.done / progress.total,
                },
            )

    def end(self, outcome: Outcome) -> None:
        self.tracker.log(self._step, outcome.figures())

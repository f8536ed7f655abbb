"""A run's checkpoints, one after the other: at once, or while training goes on (`checkpoint.background`).

In:  the policy after a step. Out: a checkpoint, committed at once, or after the first later step by which every rank
has written its part. Another one, and the end of the run, wait for it.
"""

from dataclasses import dataclass, field, replace

from kto_dist.base.console import Console
from kto_dist.model.engines import Policy
from kto_dist.training.best import Best
from kto_dist.training.checkpoint import Saving
from kto_dist.training.figures import beyond_grace
from kto_dist.training.prepare import PreparedTraining
from kto_dist.training.run import Run


@dataclass
class Saves:
    """What a loop asks for its checkpoints."""

    policy: Policy
    prepared: PreparedTraining
    run: Run
    console: Console
    _under_way: Saving | None = field(default=None, init=False)
    _seconds: float = field(default=0.0, init=False)
    """That its step took."""

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *_: object) -> None:
        """A run that fails leaves no thread behind which writes where the next one does."""
        if self._under_way is not None:
            self._under_way.give_up()

    def save(self, step: int, best: Best | None, seconds: float, *, at_once: bool) -> None:
        """Collective. Of the policy after `step` updates, the last of which took `seconds`. Raises `UserError`."""
        self.finish()
        self.console.phase("checkpoint")
        section, run = self.prepared.config.checkpoint, self.run
        self._seconds = seconds
        self._under_way = Saving(
            self.policy,
            run.folder.path,
            replace(run.now, step=step, mlflow_run=run.mlflow_run),
            section.keep,
            None if best is None else best.step,
            background=section.background and not at_once,
        )
        if at_once or not section.background:
            self.finish()
        self.console.phase("training")

    def look(self) -> None:
        """Collective. Commits the checkpoint that is under way, if it is written."""
        if self._under_way is not None and self._under_way.is_written():
            self.finish()

    def finish(self) -> None:
        """Collective. Waits for the checkpoint that is under way, if one is."""
        saving = self._under_way
        if saving is None:
            return
        saving.commit()
        self._under_way = None
        first, self.run.saved = self.run.saved == 0, saving.step
        long = beyond_grace(self._seconds, saving.seconds, self.prepared.config.cluster.grace)
        if first and long is not None:
            self.console.warn(long)

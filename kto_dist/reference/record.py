"""The reference pass as an MLflow run shows it: a point now and then, and what the pass did.

In:  `Progress` of the pass, and at its end the `Outcome`. Out: metrics; their step is the number of pairs scored.

The run is opened when something has to be scored, or after the pass, so that a pass which is refused before that
leaves no run behind.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from kto_dist.base import comm
from kto_dist.base.signals import before_sigterm
from kto_dist.record.tracker import NullTracker, Status, Tracker
from kto_dist.reference.progress import Progress
from kto_dist.reference.scoring import Outcome

SECONDS_BETWEEN_POINTS = 10.0


class PassRecord:
    """`open_run` is called once, on rank 0; the other ranks track nothing."""

    def __init__(self, open_run: Callable[[], Tracker]):
        self._open_run = open_run
        self.tracker: Tracker = NullTracker()
        self._opened = self._finished = False
        self._step, self._said = 0, 0.0

    def open(self) -> None:
        """Does nothing the second time."""
        if comm.is_main() and not self._opened:
            self.tracker = self._open_run()
        self._opened = True

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

    def finish(self, status: Status) -> None:
        """Closes the run if it was opened; does nothing the second time."""
        if not self._finished:
            self._finished = True
            self.tracker.finish(status)

    def last_words(self, failed: bool) -> None:
        """Of a process that is going to be replaced, or that ends because another rank has failed."""
        self.finish("FAILED" if failed else "KILLED")

    def ended_by_sigterm(self) -> AbstractContextManager[None]:
        """Inside, SIGTERM ends the process as it always does, and the MLflow run as KILLED before."""
        return before_sigterm(lambda: self.finish("KILLED"))

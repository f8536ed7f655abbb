"""The reference pass as an MLflow run shows it: a point now and then, and what the pass did.

In:  `Progress` of the pass, and at its end the `Outcome`. Out: metrics; their step is the number of pairs scored.

The run is opened with the first point, so that a pass which is refused before it scores anything leaves no run behind.
"""

import time
from collections.abc import Callable

from kto_dist.reference import Outcome, Progress
from kto_dist.tracking import NullTracker, Status, Tracker

SECONDS_BETWEEN_POINTS = 10.0


class PassRecord:
    """`open_run` is called once, on the first use of `tracker`."""

    def __init__(self, open_run: Callable[[], Tracker | NullTracker]):
        self._open_run = open_run
        self._tracker: Tracker | NullTracker | None = None
        self._step, self._said = 0, 0.0

    @property
    def tracker(self) -> Tracker | NullTracker:
        if self._tracker is None:
            self._tracker = self._open_run()
        return self._tracker

    def watch(self, progress: Progress) -> None:
        self._step = progress.before + progress.done
        now = time.monotonic()
        if self._tracker is None or now - self._said >= SECONDS_BETWEEN_POINTS or progress.done == progress.total:
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
        """Closes the run if it was opened."""
        if self._tracker is not None:
            self._tracker.finish(status)

"""What a person sees while a run goes on: phases, lines, progress bars. Rank 0 speaks, the others are silent.

Phases are timed here as well, since where a run's seconds went is the first thing that one asks after it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kto_dist.base import comm, doing
from kto_dist.base.secrets import masked

SECONDS_BETWEEN_LINES = 10


class Console:
    """`clock` gives seconds, of which differences count."""

    seconds: dict[str, float]
    """By phase, complete once `end` was called."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = rich.console.Console(quiet=not comm.is_main(), highlight=False, soft_wrap=True)
        self._clock, self._started = clock, clock()
        self._phase: str | None = None
        self.seconds = {}

    def phase(self, name: str) -> None:
        """Ends the phase before, and starts `name` (again, if it has been one before)."""
        self.end()
        self._phase, self._started = name, self._clock()
        doing.enter(name)

    def end(self) -> None:
        if self._phase is not None:
            spent = self._clock() - self._started
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent
        self._phase = None

    def say(self, text: str) -> None:
        self._out.print(masked(text), markup=False)

    def warn(self, text: str) -> None:
        self._out.print("warning: " + masked(text), style="yellow", markup=False)

    def show(self, renderable: object) -> None:
        self._out.print(renderable)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int, float, float, float], None]]:
        """Yields a function of (done, total, rows a second, tokens a second, seconds left)."""
        # rich's own estimate goes by rows, of which the longest come first
        bar = self._bar()
        task = bar.add_task(title, total=None, note="")
        line = self._line(title)

        def update(
            done: int, total: int, rows_per_second: float, tokens_per_second: float, seconds_left: float
        ) -> None:
            left = timedelta(seconds=round(seconds_left))
            note = f"{rows_per_second:,.1f} rows/s, {tokens_per_second:,.0f} tokens/s, {left} left"
            if not self._out.is_terminal:
                line(done, total, note)
                return
            bar.start()  # only when there is something to show; a second start does nothing
            bar.update(task, completed=done, total=total, note=note)

        try:
            yield update
        finally:
            if bar.live.is_started:
                bar.stop()

    @contextmanager
    def steps(self, title: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yields a function of (steps done, what to say beside the bar)."""
        if not self._out.is_terminal:
            line = self._line(title)
            yield lambda step, note: line(step, total, note)
            return
        with self._bar(TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            yield lambda step, note: bar.update(task, completed=step, note=note)

    def _line(self, title: str) -> Callable[[int, int, str], None]:
        """For a log file, where a bar would appear only when it is complete: a line now and then."""
        said: float | None = None
        last: int | None = None

        def say(done: int, total: int, note: str) -> None:
            nonlocal said, last
            now = self._clock()
            if done != last and (said is None or done == total or now - said >= SECONDS_BETWEEN_LINES):
                said, last = now, done
                self.say(f"{title}: {done:,} of {total:,}  {note}")

        return say

    def _bar(self, *more: ProgressColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            *more,
            TextColumn("{task.fields[note]}"),
            console=self._out,
            refresh_per_second=2,
        )

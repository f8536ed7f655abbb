"""`train.profile`: where three steps spent their time, as a Chrome trace and a table.

The parts are those of a step: the wait for its batches, KL forwards, forwards, the head in them, backwards, the
optimizer. On a GPU a part has the time of the kernels that it started, and what is left of the wall clock is waiting.
"""

import gzip
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.files import write_whole
from kto_dist.model.profile import DATA, PARTS

WAIT, ACTIVE = 2, 3
"""Steps before the first that is looked at, and steps that are."""
MAKING = "making batches (a thread beside the others)"

Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class Profiling:
    """What the loop does for a profile."""

    tick: Callable[[], None]
    """Is called after every step."""
    making: list[float] | None = None
    """Seconds that each step's batches took; None: nobody asks."""

    def making_of(self, make: Callable[[int], Work]) -> Callable[[int], Work]:
        """`make`, timed: the profiler sees the thread of the loop alone."""
        seconds = self.making
        if seconds is None:
            return make

        def timed(step: int) -> Work:
            started = time.monotonic()
            work = make(step)
            seconds.append(time.monotonic() - started)
            return work

        return timed


def window(steps: int) -> tuple[int, int]:
    """Of so many steps to come, those that are passed over, and those that are looked at then."""
    passed = min(WAIT, steps - 1)
    return passed, min(ACTIVE, steps - passed)


@contextmanager
def profiled(wanted: bool, steps: int, folder: Path, console: Console) -> Iterator[Profiling]:
    """Rank 0 writes `profile/trace.json.gz` and `profile/table.md`. `steps`: those to come."""
    if not wanted or steps < 1 or not comm.is_main():
        yield Profiling(lambda: None)
        return
    passed, active = window(steps)
    if passed < WAIT:
        console.say(
            f"train.profile looks at the run's last step, and what a process does once is in it: of {WAIT + ACTIVE} "
            f"steps or more it looks at {ACTIVE} later ones"
        )
    seconds: list[float] = []
    making: list[float] = []

    def ready(profiler: profile) -> None:
        looked_at = slice(passed, min(passed + active, len(seconds)))
        target = folder / "profile"
        target.mkdir(parents=True, exist_ok=True)
        plain = target / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(target / "trace.json.gz", "wb") as packed:
            shutil.copyfileobj(source, packed)
        plain.unlink()
        text = table(profiler, seconds[looked_at], making[looked_at])
        write_whole(target / "table.md", text.encode())
        console.say(f"profile of {len(seconds[looked_at])} steps ({target}):\n{text}")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    started = time.monotonic()
    plan = schedule(wait=max(0, passed - 1), warmup=min(1, passed), active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=ready) as profiler:

        def tick() -> None:
            nonlocal started
            now = time.monotonic()
            seconds.append(now - started)
            started = now
            profiler.step()

        yield Profiling(tick, making)
    if len(seconds) <= passed:
        console.warn(f"train.profile wrote nothing: the run ended within the {passed} steps that it passes over")


def table(profiler: profile, seconds: Sequence[float], making: Sequence[float]) -> str:
    """Markdown: milliseconds of each part of the steps, and their share of the wall clock."""
    on_gpu, wall = torch.cuda.is_available(), sum(seconds)
    found = {event.key: event for event in profiler.key_averages()}

    def milliseconds(key: str, *, of_host: bool = not on_gpu) -> float:
        event = found.get(key)
        if event is None:
            return 0.0
        return (event.cpu_time_total if of_host else event.device_time_total) / 1000

    # a host that waits for its batches starts no kernel
    rows = {name: milliseconds(key, of_host=not on_gpu or name == DATA) for name, key in PARTS.items()}
    reduced = [name for name in found if name.startswith(("nccl:", "gloo:", "c10d::"))]
    rows["communication (within the others)"] = sum(milliseconds(name) for name in reduced)
    rows[MAKING] = 1000 * sum(making)
    busy = sum(rows[name] for name in (DATA, "KL forwards", "forwards", "backwards", "optimizer"))
    rows["waiting and the rest"] = max(0.0, 1000 * wall - busy)
    lines = [f"| {name} | {value:,.1f} | {value / (10 * wall):.1f} % |" for name, value in rows.items()]
    return "\n".join(["| part | ms | of the wall clock |", "|---|---|---|", *lines]) + "\n"

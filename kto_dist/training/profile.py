"""`train.profile`: where three steps spent their time, as a Chrome trace and a table.

The parts are those of a step: KL forwards, forwards, the head in them, backwards, the optimizer. On a GPU a part has
the time of the kernels that it started, and what is left of the wall clock is waiting.
"""

import gzip
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.files import write_whole
from kto_dist.model.profile import PARTS

WAIT, ACTIVE = 2, 3
"""Steps before the first that is looked at, and steps that are."""


@contextmanager
def profiled(wanted: bool, folder: Path, console: Console) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step. Rank 0 writes `profile/trace.json.gz` and `profile/table.md`."""
    if not wanted or not comm.is_main():
        yield lambda: None
        return
    seconds: list[float] = []

    def ready(profiler: profile) -> None:
        target = folder / "profile"
        target.mkdir(parents=True, exist_ok=True)
        plain = target / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(target / "trace.json.gz", "wb") as packed:
            shutil.copyfileobj(source, packed)
        plain.unlink()
        text = table(profiler, sum(seconds[-ACTIVE:]))
        write_whole(target / "table.md", text.encode())
        console.say(f"profile of {ACTIVE} steps ({target}):\n{text}")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    started = time.monotonic()
    with profile(
        activities=activities, schedule=schedule(wait=WAIT - 1, warmup=1, active=ACTIVE, repeat=1), on_trace_ready=ready
    ) as profiler:

        def tick() -> None:
            nonlocal started
            now = time.monotonic()
            seconds.append(now - started)
            started = now
            profiler.step()

        yield tick


def table(profiler: profile, wall: float) -> str:
    """Markdown: milliseconds of each part of the steps, and their share of the wall clock."""
    on_gpu = torch.cuda.is_available()
    found = {event.key: event for event in profiler.key_averages()}

    def milliseconds(key: str) -> float:
        event = found.get(key)
        if event is None:
            return 0.0
        return (event.device_time_total if on_gpu else event.cpu_time_total) / 1000

    rows = {name: milliseconds(key) for name, key in PARTS.items()}
    reduced = [name for name in found if name.startswith(("nccl:", "gloo:", "c10d::"))]
    rows["communication (within the others)"] = sum(milliseconds(name) for name in reduced)
    busy = sum(rows[name] for name in ("KL forwards", "forwards", "backwards", "optimizer"))
    rows["waiting and the rest"] = max(0.0, 1000 * wall - busy)
    lines = [f"| {name} | {value:,.1f} | {value / (10 * wall):.1f} % |" for name, value in rows.items()]
    return "\n".join(["| part | ms | of the wall clock |", "|---|---|---|", *lines]) + "\n"

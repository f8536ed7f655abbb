"""Where this process stands, for who watches it: its phase, and its main thread's place in the code.

The phase is said by the console, and every collective counts, so that a thread which only looks can tell a rank that
works from one that waits, and one that waits from one that hangs.
"""

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_OURS = str(Path(__file__).resolve().parents[1])
# a rank that has failed is there as well, and waits for the end
_WAITS = ("/torch/distributed/", "/deepspeed/comm/", "/kto_dist/base/comm.py", "/kto_dist/base/restart.py")
_LONGEST_LOOK = 5.0
_DEPTH = 8
"""Innermost frames that are searched for a collective."""


class _Now:
    phase = "start"
    count = 0


def enter(phase: str) -> None:
    """What is being done from now on."""
    _Now.phase = phase


def count() -> None:
    """One more collective is over: this rank goes on."""
    _Now.count += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Of the main thread."""

    phase: str
    at: str
    """Innermost place in this project's code, as `training/step.py:120 in descend`."""
    waits: bool
    """In a collective, for other ranks."""
    still: float
    """Seconds since it was last seen to move."""


class Clock:
    """Seconds between looks that follow each other; those in which this process was itself stopped hardly count."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def passed(self) -> float:
        before, self._last = self._last, time.monotonic()
        return min(self._last - before, _LONGEST_LOOK)


class Observer:
    """Looks at the main thread from another one."""

    def __init__(self) -> None:
        self._mark: tuple[object, ...] = ()
        self._clock, self._still = Clock(), 0.0

    def place(self) -> Place:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        mark = (_Now.count, _Now.phase, None if frame is None else (id(frame), frame.f_lasti))
        passed = self._clock.passed()
        self._still = self._still + passed if mark == self._mark else 0.0
        self._mark = mark
        return Place(
            phase=_Now.phase,
            at=_place_of(frame),
            waits=_waits(frame),
            still=self._still,
        )


def _waits(frame: FrameType | None) -> bool:
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in _WAITS):
            return True
        frame = frame.f_back
    return False


def _place_of(frame: FrameType | None) -> str:
    """Who asks for a collective is of interest, not the collective."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) and not name.endswith(("base/comm.py", "base/agree.py", "base/restart.py")):
            return f"{name[len(_OURS) + 1 :]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no place of this project's code"

"""SIGTERM: taken note of while a step runs, or acted on at once after some last words; and what launchers pass on."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):
    """A signal has come, and what was being done is left undone: the same command does it again."""


@contextmanager
def stops_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, signals that are to stop this process are the handler's; those stay ignored that it was started to ignore
    (`nohup`)."""
    before = {number: signal.getsignal(number) for number in STOPS}
    taken = [number for number, old in before.items() if old is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def heed_sigterm_as_process_1() -> None:
    """Process 1 of a container is sent no signal that it does not handle, so SIGTERM would not end it."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is only taken note of; yields the question whether it has come."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def before_sigterm(last_words: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM ends the process as it always does, after `last_words`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        last_words()
        os.kill(os.getpid(), number)
        # process 1 of a container outlives a signal that it does not handle
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

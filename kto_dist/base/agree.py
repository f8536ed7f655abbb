"""One thing, or one error, on all ranks and hosts: who decides, who works, and who hears of a failure.

All of these are collective: every rank calls them, in the same order.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from kto_dist.base import comm
from kto_dist.base.errors import UserError

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Collective. Does the work, and raises a `UserError` of any rank on all of them."""
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    failures = [text for text in comm.gather(failure) if text]
    if failures:
        raise UserError(failures[0])
    return result


def same_everywhere(value: T, what: str, remedy: str) -> T:
    """Collective. Raises `UserError`, on every rank, where ranks have different values of what all must agree on."""
    values = comm.gather(value)
    if all(other == values[0] for other in values):
        return value
    first = {text: rank for rank, text in reversed([(rank, str(other)) for rank, other in enumerate(values)])}
    listed = ", ".join(f"rank {rank}: {text}" for text, rank in sorted(first.items(), key=lambda item: item[1]))
    raise UserError(f"{what} differs between hosts ({listed}), and every host must have the same: {remedy}")


def on_main(work: Callable[[], T]) -> T:
    """Rank 0 does the work, however long it takes; every rank gets its result, or the same error.

    The others wait in short collectives, so that hours of tokenising never meet the process group's time-out, while
    the death of rank 0 still does.
    """
    return _while_others_wait(work if comm.is_main() else None)[0]


def once_per_host(work: Callable[[], T]) -> T:
    """Like `on_main`, then again by local rank 0 of each host: for files, where hosts may not share a file system.

    The work must find its own earlier result, so that hosts that do share one don't repeat it.
    """
    first = on_main(work)
    if comm.world_size() == 1:
        return first
    results = _while_others_wait(work if comm.local_rank() == 0 and not comm.is_main() else None)
    head = comm.rank() - comm.local_rank()  # ranks of a host are neighbours
    return first if head == 0 else cast(T, results[head])


def _while_others_wait(work: Callable[[], T] | None) -> list[T | None]:
    result: list[Any] = [None, None]

    def run() -> None:
        try:
            result[0] = work()
        except BaseException as error:  # handed to every rank below
            result[1] = error

    if comm.world_size() == 1:
        return [work()]
    thread = threading.Thread(target=run, daemon=True) if work else None
    if thread:
        thread.start()
    pause = 0.01
    while True:
        running = comm.any_(thread is not None and thread.is_alive())
        if not running:
            break
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    failed = None if result[1] is None else (isinstance(result[1], UserError), str(result[1]))
    outcomes = comm.gather((result[0], failed))
    if result[1] is not None:
        raise result[1]
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure[1]) if failure[0] else RuntimeError(f"another rank failed: {failure[1]}")
    return [value for value, _ in outcomes]

"""One function over many chunks of rows, in several processes, results in order.

In:  a function that can be pickled, and chunks. Out: its result of each chunk.
"""

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any, TypeVar

from kto_dist.base.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """How rows are handed out."""

    rows: int = 1000
    """Of a chunk."""
    alone: int = 20
    """Chunks before other processes help: starting them takes about as long as this one takes for so many."""


CHUNKING = Chunking()


class _Process(SpawnProcess):
    """Starts afresh, without the script that was run.

    A fork is unsafe beside the threads of torch, NCCL and the tokenizer. A spawned process would first import the
    script again: seconds for a training script, and a hang where the script has no `if __name__ == "__main__"`.
    """

    def start(self) -> None:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class _Context(SpawnContext):
    Process = _Process


_work: Callable[[list[Any]], Any]


def _start_worker(work: Callable[[list[Any]], Any]) -> None:
    # One process a core already: threads below it would only fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _work
    _work = work


def _work_on(chunk: list[Any]) -> Any:
    return _work(chunk)


def over_chunks(
    work: Callable[[list[Item]], Result], items: Iterable[Item], *, workers: int | None, chunking: Chunking
) -> Iterator[Result]:
    """Chunks in order: the first in this process, the rest in `workers` processes. Raises `UserError`."""
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, chunking.rows)), [])
    workers = workers or min(8, _cores())
    for chunk in chunks if workers == 1 else itertools.islice(chunks, chunking.alone):
        yield work(chunk)
    following = next(chunks, None)
    if following is None:
        return
    with ProcessPoolExecutor(workers, _Context(), _start_worker, (work,)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for chunk in itertools.chain([following], chunks):
                pending.append(pool.submit(_work_on, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenises ended early, most likely because memory ran out: "
                f"lower data.workers ({workers}); 1 starts no process"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    # A job that shares its node may use fewer than the node has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

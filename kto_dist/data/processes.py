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
    least: int = 4 * 2**20
    """Bytes of a file that are worth a host's while: fewer are tokens before other processes have started."""


CHUNKING = Chunking()


class ProcessLost(UserError):
    """A process has ended that should not have: nothing that is wrong with the rows."""


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
    """Chunks in order: the first in this process, the rest in `workers` processes.

    Raises `UserError`: of several the one of the first chunk, or of the items that come first.
    """
    chunks = _chunks(items, chunking.rows)
    workers = workers or min(8, _cores())
    for chunk in chunks if workers == 1 else itertools.islice(chunks, chunking.alone):
        yield work(_sound(chunk))
    following = next(chunks, None)
    if following is None:
        return
    _sound(following)
    with ProcessPoolExecutor(workers, _Context(), _start_worker, (work,)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for chunk in itertools.chain([following], chunks):
                if isinstance(chunk, UserError):
                    break
                pending.append(pool.submit(_work_on, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            _sound(chunk)
        except BrokenProcessPool:
            raise ProcessLost(
                "a process that tokenises ended early, most likely because memory ran out: "
                f"lower data.workers ({workers}); 1 starts no process"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item], rows: int) -> Iterator[list[Item] | UserError]:
    """The items; at last the error that ended them, when those before it have been worked on: one of these may be wrong
    too, and stands first."""
    chunk: list[Item] = []
    trouble = None
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == rows:
                yield chunk
                chunk = []
    except UserError as error:
        trouble = error
    if chunk:
        yield chunk
    if trouble is not None:
        yield trouble


def _sound(chunk: list[Item] | UserError) -> list[Item]:
    if isinstance(chunk, UserError):
        raise chunk
    return chunk


def _cores() -> int:
    # A job that shares its node may use fewer than the node has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""One function over many chunks, in several processes, results in order.

In:  a function that can be pickled, and chunks. Out: each chunk with its result.
"""

import itertools
import multiprocessing
import os
import sys
import threading
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
    """Of a chunk, at most."""
    alone: int = 20
    """Chunks before other processes help: starting them takes about as long as this one takes for so many."""
    least: int = 4 * 2**20
    """Bytes of a file that are worth a host's while: fewer are tokens before other processes have started."""
    look: float = 2.0
    """Seconds after which a host asks again whether rows of the hosts before it are wrong."""


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


_work: Callable[[Any], Any]


def _start_worker(work: Callable[[Any], Any]) -> None:
    # One process a core already: threads below it would only fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _work
    _work = work


def _end_with_parent() -> None:
    """The pool's processes hold both ends of its queue, and would wait for ever for one that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_on(chunk: Any) -> Any:
    return _work(chunk)


def over_chunks(
    work: Callable[[Item], Result], chunks: Iterable[Item], *, workers: int | None, chunking: Chunking
) -> Iterator[tuple[Item, Result]]:
    """Chunks in order, with their results: the first in this process, the rest in `workers` processes.

    A `UserError` of the chunks is raised after the results of all that came before it.
    """
    coming, workers = iter(chunks), workers or min(8, _cores())
    for chunk in coming if workers == 1 else itertools.islice(coming, chunking.alone):
        yield chunk, work(chunk)
    following = list(itertools.islice(coming, 1))
    if not following:
        return
    coming = itertools.chain(following, coming)
    with ProcessPoolExecutor(workers, _Context(), _start_worker, (work,)) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        trouble = None
        try:
            while True:
                try:
                    chunk = next(coming)
                except StopIteration:
                    break
                except UserError as error:
                    trouble = error
                    break
                pending.append((chunk, pool.submit(_work_on, chunk)))
                if len(pending) > 2 * workers:
                    yield _first_of(pending)
            while pending:
                yield _first_of(pending)
            if trouble is not None:
                raise trouble
        except BrokenProcessPool:
            raise ProcessLost(
                "a process that tokenises ended early, most likely because memory ran out: "
                f"lower data.workers ({workers}); 1 starts no process"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _first_of(pending: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    chunk, future = pending.popleft()
    return chunk, future.result()


def _cores() -> int:
    # A job that shares its node may use fewer than the node has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The next step's work, made by a thread while this step runs."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kto_dist.model.profile import DATA, part

Work = TypeVar("Work")


def ahead(make: Callable[[int], Work], steps: Iterable[int]) -> Iterator[Work]:
    """`make(step)` for each step, in order. `make` must touch neither the model nor the process group.

    What it raises is raised when the step's turn comes.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-step") as thread:
        coming = None
        for step in steps:
            following = thread.submit(make, step)
            if coming is not None:
                yield _waited_for(coming)
            coming = following
        if coming is not None:
            yield _waited_for(coming)


def _waited_for(coming: Future[Work]) -> Work:
    with part(DATA):
        return coming.result()

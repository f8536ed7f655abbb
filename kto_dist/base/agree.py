"""One thing, or one error, on all ranks and hosts: who decides, who works, and who hears of a failure.

All of these are collective: every rank calls them, in the same order.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kto_dist.base import comm, hosts
from kto_dist.base.errors import UserError
from kto_dist.base.hosts import Host

T = TypeVar("T")


class OthersFailed(RuntimeError):
    """Another rank has failed, and tells of it itself."""

    def __init__(self, failure: str, *, of_disk: bool = False, where: str = ""):
        super().__init__(f"another rank failed: {failure}")
        self.failure = failure
        """Its words."""
        self.of_disk = of_disk
        """It was an `OSError`."""
        self.where = where
        """Its host, as `hosts.here` says it."""


def together(work: Callable[[], T]) -> T:
    """Collective. Every rank does the work; a `UserError` of any of them is raised on all, another failure as well.

    One small sum where all is well: it may be asked at every step.
    """
    results: list[T] = []
    failed: Exception | None = None
    try:
        results.append(work())
    except Exception as error:  # handed to every rank below
        failed = error
    if comm.any_(failed is not None):
        # results stay where they are: they may be models, and stores
        _all_succeed(_Outcome[T].of([], failed), failed)
    return results[0]


def same_everywhere(value: T, what: str, remedy: str) -> T:
    """Collective. Raises `UserError`, on every rank, where ranks have different values of what all must agree on."""
    values = comm.gather(value)
    if all(other == values[0] for other in values):
        return value
    listed = _by_value([str(other) for other in values], hosts.by_rank())
    raise UserError(f"{what} differs between hosts ({listed}), and every host must have the same: {remedy}")


def facts(known: Mapping[str, Mapping[str, str]]) -> None:
    """Collective. Raises `UserError`, on every rank, where ranks know different values of anything.

    `known`: by what is to be done where it differs, the facts by name. The message has a line for each that differs.
    """
    everyone = comm.gather({remedy: dict(part) for remedy, part in known.items()})
    if all(other == everyone[0] for other in everyone):
        return
    by_rank = hosts.by_rank()
    lines: list[str] = []
    for remedy in dict.fromkeys(remedy for other in everyone for remedy in other):
        parts = [other.get(remedy, {}) for other in everyone]
        names = dict.fromkeys(name for part in parts for name in part)
        differing = [name for name in names if len({part.get(name) for part in parts}) > 1]
        lines += [f"  {name}: {_by_value([part.get(name, 'none') for part in parts], by_rank)}" for name in differing]
        lines += [f"  -> {remedy}"] if differing else []
    raise UserError("\n".join(["hosts disagree, and every host must have the same:", *lines]))


def _by_value(values: list[str], by_rank: list[Host]) -> str:
    """Which ranks have which: `node-a (ranks 0 to 7): 1e-06, node-b (rank 8): 2e-06`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{hosts.named(those, by_rank)}: {value if len(value) <= 200 else value[:200] + '...'}"
        for value, those in ranks.items()
    )


def on_main(work: Callable[[], T]) -> T:
    """Rank 0 does the work, however long it takes; every rank gets its result, or the same error.

    The others wait in short collectives, so that hours of tokenising never meet the process group's time-out, while
    the death of rank 0 still does.
    """
    return _while_others_wait(work if comm.is_main() else None)[0].results[0]


def once_per_host(work: Callable[[], T]) -> T:
    """Like `on_main`, then again by local rank 0 of each host: for files, where hosts may not share a file system.

    The work must find its own earlier result, so that hosts that do share one don't repeat it.
    """
    first = on_main(work)
    if comm.world_size() == 1:
        return first
    outcomes = _while_others_wait(work if comm.local_rank() == 0 and not comm.is_main() else None)
    head = comm.rank() - comm.local_rank()  # ranks of a host are neighbours
    return first if head == 0 else outcomes[head].results[0]


def side_by_side(work: Callable[[], T]) -> list[T]:
    """Every rank does its own work, however long it takes; returns all results, in rank order, on every rank."""
    return [outcome.results[0] for outcome in _while_others_wait(work)]


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What a rank's work came to."""

    results: tuple[T, ...] = ()
    """One; none where the work failed, or the rank had none to do."""
    failure: str | None = None
    is_mistake: bool = False
    """The failure was a `UserError`."""
    of_disk: bool = False
    """The failure was an `OSError`."""
    where: str = field(default_factory=hosts.here)
    host: Host = field(default_factory=hosts.own)

    @classmethod
    def of(cls, results: list[T], failed: BaseException | None) -> "_Outcome[T]":
        kinds = isinstance(failed, UserError), isinstance(failed, OSError)
        return cls(tuple(results), None if failed is None else str(failed), *kinds)


def _all_succeed(own: _Outcome[T], failed: BaseException | None) -> list[_Outcome[T]]:
    """Collective. The outcomes by rank, none of which is a failure: those are raised, on every rank.

    Of mistakes every rank raises the same one, the first; else each that failed raises its own.
    """
    outcomes = comm.gather(own)
    mistakes = [outcome.failure for outcome in outcomes if outcome.is_mistake and outcome.failure is not None]
    if mistakes:
        raise UserError(_where(mistakes[0], outcomes)) from failed
    if failed is not None:
        raise failed
    for outcome in outcomes:
        if outcome.failure is not None:
            raise OthersFailed(outcome.failure, of_disk=outcome.of_disk, where=outcome.where)
    return outcomes


def _where(mistake: str, outcomes: "list[_Outcome[T]]") -> str:
    """The mistake, and of several hosts those that have it, unless all have."""
    by_rank = [outcome.host for outcome in outcomes]
    those = [rank for rank, outcome in enumerate(outcomes) if outcome.failure == mistake]
    says_it_itself = any(outcomes[rank].where and outcomes[rank].where in mistake for rank in those)
    if says_it_itself or {by_rank[rank].head for rank in those} == {host.head for host in by_rank}:
        return mistake
    return f"on {hosts.named(those, by_rank)}: {mistake}"


def _while_others_wait(work: Callable[[], T] | None) -> list[_Outcome[T]]:
    """Collective. The outcomes by rank, none of which is a failure: those are raised, on every rank."""
    if comm.world_size() == 1:
        return [_Outcome() if work is None else _Outcome((work(),))]
    results: list[T] = []
    errors: list[BaseException] = []

    def run(work: Callable[[], T]) -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to every rank below
            errors.append(error)

    thread = None if work is None else threading.Thread(target=run, args=(work,), daemon=True)
    if thread is not None:
        thread.start()
    pause = 0.01
    while comm.any_(thread is not None and thread.is_alive()):
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    failed = errors[0] if errors else None
    return _all_succeed(_Outcome[T].of(results, failed), failed)

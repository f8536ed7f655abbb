"""What is wrong with a job whose ranks wait: who is silent, or holds the others up, on which host, in which phase.

In:  the ranks' beats, which each of them puts down once a second (`base.restart`), and how long each has been silent.
Out: a sentence, or nothing where all is well.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kto_dist.base import hosts
from kto_dist.base.doing import Place
from kto_dist.base.hosts import Host

_OF_COLLECTIVES = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "timed out waiting",
    "timeoutmillis",
    "watchdog",
    "nccl",
    "gloo",
    "rank 0 has",
)


_A_FEW_BEATS = 4.0
"""Seconds without one, which a busy machine seldom has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """Of one rank."""

    number: int
    """Another one each time."""
    place: Place

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Beat":
        content = json.loads(text)
        return cls(number=content["number"], place=Place(**content["place"]))


def limit(timeout: float) -> float:
    """Seconds after which a rank counts as lost, so that the job has ended when `timeout` is over."""
    return timeout - min(10.0, timeout / 5)


def verdict(
    beats: Sequence[Beat],  # the last of each rank
    silent_for: Sequence[float],  # seconds
    by_rank: Sequence[Host],
    seconds: float,  # that a rank may be silent, or hold others up
    waited: float | None = None,  # that a rank has, which has given up by now
) -> str | None:
    """What is wrong, if anything is."""
    silent = [rank for rank, age in enumerate(silent_for) if age >= seconds]
    if silent:
        return _silence(silent, silent_for, beats, by_rank)
    waiting = [rank for rank, beat in enumerate(beats) if beat.place.waits]
    longest = waited or max((beats[rank].place.still for rank in waiting), default=0.0)
    if waited is None and longest < seconds:
        return None
    busy = [rank for rank in range(len(beats)) if rank not in waiting]
    quiet = [rank for rank in busy if silent_for[rank] >= min(seconds, _A_FEW_BEATS)]
    if quiet:
        return _silence(quiet, silent_for, beats, by_rank)
    if busy:
        return (
            f"{hosts.named(busy, by_rank)}: the other ranks have waited {longest:.0f} s. {_last(busy, beats, by_rank)}"
        )
    return (
        f"all ranks have waited {longest:.0f} s for each other, in collectives that do not belong together, or over a "
        f"connection that is lost. {_last(waiting, beats, by_rank)}"
    )


def _silence(ranks: Sequence[int], ages: Sequence[float], beats: Sequence[Beat], by_rank: Sequence[Host]) -> str:
    age = max(ages[rank] for rank in ranks)
    return (
        f"{hosts.named(ranks, by_rank)}: nothing was heard for {age:.0f} s: killed, stopped or cut off. "
        f"{_last(ranks, beats, by_rank)}"
    )


def _last(ranks: Sequence[int], beats: Sequence[Beat], by_rank: Sequence[Host]) -> str:
    """Where they were: ranks at one place together, and not more than a few places."""
    places: dict[str, list[int]] = {}
    for rank in ranks:
        place = beats[rank].place
        places.setdefault(f"in phase {place.phase}, at {place.at}", []).append(rank)
    parts = [f"{hosts.named(those, by_rank)}: last seen {text}" for text, those in list(places.items())[:4]]
    return "; ".join(parts)


def is_timeout(error: BaseException) -> bool:
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def is_of_collective(error: BaseException) -> bool:
    """Whether it may be another rank's fault."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError) and any(part in text for part in _OF_COLLECTIVES)

"""How sure a figure is: intervals from resampling prompts.

Rows of one prompt are alike, so whole prompts are drawn with replacement, with all of their rows. A figure is a
function of how often each row counts; all figures of one call see the same draws, so that a difference of two of them
is paired.

| where                                                  | interval                                           |
|--------------------------------------------------------|----------------------------------------------------|
| 50 prompts and more                                    | bootstrap: quantiles of the resampled figure       |
| fewer, a share of rows                                 | wilson, with the rows of one prompt taken as alike |
| fewer, another figure                                  | bca: bias-corrected and accelerated (Efron 1987)   |
| a share, or an AUC, that is the same in every resample | wilson: 12 of 12 right does not mean all           |
| a difference of two shares that is                     | wilson: of rows that may differ after all          |
| another figure that is                                 | constant: the rows have no spread to judge by      |

A figure that exists in fewer than half of the resamples, or that rests on one prompt, has no interval. A constant one
has a range of width 0, which does not mean that it is sure: whoever shows it says "no spread" in its place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.special import ndtr, ndtri  # the normal distribution, without all of scipy.stats

FEW = 50
"""Prompts below which the quantiles of a bootstrap are too narrow."""
CONFIDENCE = 0.95
RESAMPLES = 1000
_EQUAL = 1e-12
"""A spread of resamples, next to the figure, that is rounding."""
_CHUNK = 2**22
"""Numbers that one chunk of resamples takes at most."""

Method = Literal["bootstrap", "bca", "wilson", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure and the range that holds its true value in 95 of 100 samples of prompts."""

    value: float
    low: float
    high: float
    method: Method
    prompts: int
    """That the figure rests on; of an AUC, those of the class that has fewer."""


class Figure(Protocol):
    """A number made of U rows."""

    def of(self, times: np.ndarray) -> np.ndarray:  # (B, U) how often each row counts -> (B,), NaN where it is none
        """The figure of each of B samples."""

    @property
    def rests_on(self) -> np.ndarray:  # (U,) bool, or as many of the first rows as there may be
        """The rows without which it would be another number."""

    def prompts(self, member: np.ndarray) -> int:  # (U,) number of each row's prompt
        """How many prompts it rests on; of an AUC, those of the class that has fewer."""

    def alike(self, value: float, member: np.ndarray) -> float | None:
        """As how many independent rows a share's rows count; None where the figure is no share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean of some of the rows."""

    values: np.ndarray
    """(U,) fp64"""
    counted: np.ndarray
    """(U,) bool: the rows that have a value."""
    share: bool = False
    """Whether every value is a verdict, between 0 (no) and 1 (yes)."""
    weight: np.ndarray | None = None
    """(U,) fp64, how much of each row counts; None: all of those that do."""

    def of(self, times: np.ndarray) -> np.ndarray:
        # only the rows that count: a class is half of them, a slice far less
        times = times[:, self.counted]
        if self.weight is not None:
            times = times * self.weight[self.counted]
        with np.errstate(invalid="ignore"):
            return (times @ self.values[self.counted]) / times.sum(1)

    @property
    def rests_on(self) -> np.ndarray:
        return self.counted

    def prompts(self, member: np.ndarray) -> int:
        return np.unique(member[self.counted]).size

    def alike(self, value: float, member: np.ndarray) -> float | None:
        """By the design effect: the variance over prompts, next to that of rows that know nothing of each other."""
        if not self.share:
            return None
        each = np.ones(int(self.counted.sum())) if self.weight is None else self.weight[self.counted]
        rows, prompts = float(each.sum()), self.prompts(member)
        apart = np.bincount(member[self.counted], each * (self.values[self.counted] - value))
        variance = prompts / max(1, prompts - 1) * float(apart @ apart) / rows**2
        if not variance:
            return float(prompts)
        return float(np.clip(value * (1 - value) / variance, 1, max(1.0, rows)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """The chance that a desirable row's score exceeds an undesirable one's; ties count half."""

    score: np.ndarray
    """(U,)"""
    desirable: np.ndarray
    """(U,) whether each row is, or the probability of it: then it is both, each by its share."""
    counted: np.ndarray
    """(U,) bool"""

    def of(self, times: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(self.counted)
        order = rows[self.score[rows].argsort(kind="stable")]
        if not order.size:
            return np.full(len(times), np.nan)
        new = np.flatnonzero(np.diff(self.score[order], prepend=np.nan) != 0)
        up, down = (np.add.reduceat(times[:, order] * share[order], new, axis=1) for share in self._shares())
        below = down.cumsum(1) - down / 2
        with np.errstate(invalid="ignore"):
            return (up * below).sum(1) / (up.sum(1) * down.sum(1))

    @property
    def rests_on(self) -> np.ndarray:
        return self.counted

    def prompts(self, member: np.ndarray) -> int:
        return min(np.unique(member[self.counted & (share > 0)]).size for share in self._shares())

    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        up = self.desirable.astype(np.float64)
        return up, 1 - up

    def alike(self, value: float, member: np.ndarray) -> float | None:
        """Where not one pair of rows is in the wrong order, or every one; else its variance is not a share's."""
        return float(self.prompts(member)) if value in (0.0, 1.0) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A sum over rows by another one: what a token has of it, where rows have many."""

    above: np.ndarray
    """(U,) fp64"""
    below: np.ndarray
    """(U,) fp64, 0 or more."""

    def of(self, times: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (times @ self.above) / (times @ self.below)

    @property
    def rests_on(self) -> np.ndarray:
        return self.below > 0

    def prompts(self, member: np.ndarray) -> int:
        return np.unique(member[self.below > 0]).size

    def alike(self, value: float, member: np.ndarray) -> float | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Of two figures over the same rows: of two classes, or of two models."""

    first: Figure
    second: Figure

    def of(self, times: np.ndarray) -> np.ndarray:
        return self.first.of(times) - self.second.of(times)

    @property
    def rests_on(self) -> np.ndarray:
        return np.asarray(self.first.rests_on | self.second.rests_on)

    def prompts(self, member: np.ndarray) -> int:
        return min(self.first.prompts(member), self.second.prompts(member))

    def alike(self, value: float, member: np.ndarray) -> float | None:
        return None

    @property
    def of_shares(self) -> bool:
        return all(isinstance(figure, Mean) and figure.share for figure in (self.first, self.second))


def intervals(
    figures: Mapping[str, Figure],
    prompts: np.ndarray,  # (U,) equal for rows of one prompt
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """The interval of each figure that has one."""
    if not prompts.size:
        return {}
    member = np.unique(prompts, return_inverse=True)[1].ravel()
    whole = {name: float(figure.of(np.ones((1, member.size)))[0]) for name, figure in figures.items()}
    wanted = {name: figure for name, figure in figures.items() if np.isfinite(whole[name])}
    drawn = _drawn(wanted, member, seed, resamples)
    found = {}
    for name, figure in wanted.items():
        interval = _interval(figure, whole[name], drawn[name], member)
        if interval is not None:
            found[name] = interval
    return found


def wilson(share: float, rows: float) -> tuple[float, float]:
    """Wilson's interval of a share of so many independent rows (JASA 22, 1927)."""
    z = float(ndtri((1 + CONFIDENCE) / 2))
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    # rounding alone would put the end of 27 of 27 below 1
    return float(max(0.0, min(share, middle - half))), float(min(1.0, max(share, middle + half)))


def _interval(figure: Figure, value: float, drawn: np.ndarray, member: np.ndarray) -> Interval | None:
    prompts = figure.prompts(member)
    there = drawn[np.isfinite(drawn)]
    if prompts < 2 or there.size < drawn.size / 2:
        return None
    alike = figure.alike(value, member)
    method: Method = "bootstrap" if prompts >= FEW else "bca"
    if alike is not None and (prompts < FEW or there.min() == there.max()):
        method = "wilson"
        low, high = wilson(value, alike)
    elif there.min() == there.max() and isinstance(figure, Difference) and figure.of_shares:
        # of no prompt that differs, so many may yet
        method, beyond = "wilson", wilson(0.0, prompts)[1]
        low, high = max(-1.0, value - beyond), min(1.0, value + beyond)
    elif np.ptp(there) <= _EQUAL * max(1.0, abs(value)):
        method, low, high = "constant", value, value
    else:
        edges = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        if method == "bca":
            edges = _corrected(edges, value, there, _jackknife(figure, member))
        low, high = (float(edge) for edge in np.quantile(there, edges))
    return Interval(value=value, low=low, high=high, method=method, prompts=prompts)


def _drawn(figures: Mapping[str, Figure], member: np.ndarray, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """(resamples,) of each figure."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in figures}
    for times in _times(member, seed, resamples):
        for name, figure in figures.items():
            parts[name].append(figure.of(times))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _times(member: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Chunks of (B, U): how often each row counts when prompts are drawn."""
    rng, prompts = np.random.default_rng(seed), int(member.max()) + 1
    chunk = max(1, _CHUNK // member.size)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = np.stack([np.bincount(rng.integers(prompts, size=prompts), minlength=prompts) for _ in range(size)])
        yield counts.astype(np.float64)[:, member]


def _jackknife(figure: Figure, member: np.ndarray) -> np.ndarray:
    """(G,) the figure without each of the prompts that it rests on: few of them may stand among very many."""
    rows = figure.rests_on
    prompts, chunk = np.unique(member[: rows.size][rows]), max(1, _CHUNK // member.size)
    parts = [
        figure.of((member[None, :] != prompts[start : start + chunk, None]).astype(np.float64))
        for start in range(0, prompts.size, chunk)
    ]
    values = np.concatenate(parts)
    return values[np.isfinite(values)]


def _corrected(edges: np.ndarray, value: float, drawn: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """The quantiles of BCa (Efron, JASA 82, 1987, Eq. 6.8): for bias in the median, and a spread that changes."""
    below = ((drawn < value).sum() + (drawn == value).sum() / 2) / drawn.size
    bias = ndtri(np.clip(below, 1 / drawn.size, 1 - 1 / drawn.size))
    apart = left_out.mean() - left_out
    spread = float((apart**2).sum())
    acceleration = float((apart**3).sum()) / (6 * spread**1.5) if spread else 0.0
    moved = bias + ndtri(edges)
    return np.asarray(ndtr(bias + moved / (1 - acceleration * moved)))

"""The ratio of the classes: now, over time, by model version, and against what deployment is expected to see.

In:  counts of thumbs up and down by stage, by day and by model version.
Out: `Balance` and `Drift`.

Drift is tested with the chi-square test of independence (scipy). It treats votes as independent, so that with many
votes by few users, or with very many votes at all, it finds differences that don't matter: a check therefore asks for
a small p-value and for a large distance, and Cramer's V says how strong the association is (0 none, 1 perfect).

A small p-value of the whole table says that some group differs, not which: the largest distance may be that of a small
group by chance. Each group is therefore also tested alone, against all others together, with its p-value times the
number of groups (Bonferroni), and the distance that is named is the largest of the groups that pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

import numpy as np
from scipy import stats

from kto_dist.base.class_weights import class_weights
from kto_dist.feedback.agreement import Estimate
from kto_dist.feedback.concentration import rate

Unit = Literal["day", "week", "month"]

# The chi-square approximation wants so many expected votes in every cell.
_EXPECTED = 5
_DAYS_SHOWN = 35
_WEEKS_SHOWN = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """Counts of one stage."""

    up: int
    down: int
    up_share: float | None

    @classmethod
    def of(cls, up: int, down: int) -> "Classes":
        return cls(up=up, down=down, up_share=up / (up + down) if up + down else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """The classes from the log to the dataset, and the loss weights that the paper's rule gives them."""

    labelled: Classes
    """Votes with a label."""
    judgements: Classes
    """Of them, those left by the steps that look at one vote or answer at a time."""
    dataset: Classes
    """Rows of both splits."""
    train: Classes
    """Rows of the training split."""
    train_weight_up: float
    """Summed row weights of thumbs up in the training split."""
    train_weight_down: float
    desirable_weight: float | None
    """What objective.desirable_weight: auto is going to choose from these sums; None: a class is absent."""
    undesirable_weight: float | None
    weighted_ratio: float | None
    """(desirable_weight * train_weight_up) / (undesirable_weight * train_weight_down), within [1, 1.5]."""
    deployment_up_share: float | None
    """As stated by balance.deployment_up_share."""
    deployment_gap: float | None
    """Share of up in the dataset minus the stated one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Judgements of one period (named by its first day) or model version."""

    name: str
    up: int
    down: int
    up_share: Estimate
    gap: float
    """This group's up_share minus that of all other groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftTest:
    """Chi-square test of independence of class and group."""

    statistic: float
    degrees: int
    p_value: float
    cramers_v: float
    groups: int
    left_out: int
    """Votes of groups too small to test."""
    largest_gap: float
    """Of the groups that differ from the others together by more than chance, that of the one that differs most."""
    largest_gap_in: str
    largest_gap_p: float
    """p-value of that group against all others together, times the number of groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Of judgements. Weeks begin on Mondays (ISO), in UTC."""

    first: str | None
    """The first day."""
    last: str | None
    without_time: int
    without_model: int
    unit: Unit | None
    """Of `periods`, for the plot."""
    periods: tuple[Group, ...]
    weeks: DriftTest | None
    """None: fewer than two groups are large enough."""
    models: tuple[Group, ...]
    """By votes, the largest first; at most 50."""
    by_model: DriftTest | None


def balance_of(
    labelled: Classes,
    judgements: Classes,
    dataset: Classes,
    train: Classes,
    weights: tuple[float, float],  # summed row weights of the training split: up, down
    deployment_up_share: float | None,
) -> Balance:
    up, down = weights
    down_weight, up_weight = class_weights(up, down) if up > 0 and down > 0 else (None, None)
    share, ratio, gap = dataset.up_share, None, None
    if up_weight is not None and down_weight is not None:
        ratio = up_weight * up / (down_weight * down)
    if share is not None and deployment_up_share is not None:
        gap = share - deployment_up_share
    return Balance(
        labelled=labelled,
        judgements=judgements,
        dataset=dataset,
        train=train,
        train_weight_up=up,
        train_weight_down=down,
        desirable_weight=up_weight,
        undesirable_weight=down_weight,
        weighted_ratio=ratio,
        deployment_up_share=deployment_up_share,
        deployment_gap=gap,
    )


def drift_of(
    days: Sequence[tuple[date | None, int, int]],  # day, up, down
    models: Sequence[tuple[str | None, int, int]],
    *,
    significance: float,  # of a group's distance from the others
) -> Drift:
    dated = sorted((day, up, down) for day, up, down in days if day is not None)
    first, last = (dated[0][0], dated[-1][0]) if dated else (None, None)
    weeks = _merge((day - timedelta(days=day.weekday()), up, down) for day, up, down in dated)
    unit: Unit | None = None
    periods: list[tuple[str, int, int]] = []
    if first is not None and last is not None:
        if (last - first).days < _DAYS_SHOWN:
            unit, periods = "day", [(day.isoformat(), up, down) for day, up, down in dated]
        elif len(weeks) <= _WEEKS_SHOWN:
            unit, periods = "week", weeks
        else:
            unit, periods = "month", _merge((day.replace(day=1), up, down) for day, up, down in dated)
    known = [(model, up, down) for model, up, down in models if model is not None]
    named = sorted(known, key=lambda entry: -(entry[1] + entry[2]))
    return Drift(
        first=first.isoformat() if first else None,
        last=last.isoformat() if last else None,
        without_time=sum(up + down for day, up, down in days if day is None),
        without_model=sum(up + down for model, up, down in models if model is None),
        unit=unit,
        periods=_groups(periods),
        weeks=chi_square(weeks, significance),
        models=_groups(named[:50], [(up, down) for _, up, down in named]),
        by_model=chi_square(named, significance),
    )


def chi_square(groups: Sequence[tuple[str, int, int]], significance: float) -> DriftTest | None:
    """Whether the class depends on the group; None where fewer than two groups have enough votes.

    The largest gap is that of the groups whose own p-value is below `significance`; of all, where there is none.
    """
    if not groups:
        return None
    table = np.array([(up, down) for _, up, down in groups], dtype=np.int64)
    share = table.sum(0).min() / max(1, table.sum())
    large = table.sum(1) * share >= _EXPECTED
    if large.sum() < 2:
        return None
    kept = table[large]
    if not kept.sum(0).all():
        return None
    result = stats.chi2_contingency(kept, correction=False)
    names = [name for (name, _, _), enough in zip(groups, large, strict=True) if enough]
    gaps, alone = _gaps(kept), _alone(kept)
    sure = alone < significance
    worst = int(np.argmax(np.where(sure | ~sure.any(), np.abs(gaps), -1.0)))
    return DriftTest(
        statistic=float(result.statistic),
        degrees=int(result.dof),
        p_value=float(result.pvalue),
        cramers_v=float(stats.contingency.association(kept, method="cramer")),
        groups=len(kept),
        left_out=int(table[~large].sum()),
        largest_gap=float(gaps[worst]),
        largest_gap_in=names[worst],
        largest_gap_p=float(alone[worst]),
    )


def _alone(table: np.ndarray) -> np.ndarray:
    """(G,) p-value of each group against all others together, times the number of groups, at most 1."""
    rest = table.sum(0) - table
    # no correction for continuity, as in the test of the whole table: with two groups the two tests are one
    values = [stats.chi2_contingency(np.stack(pair), correction=False).pvalue for pair in zip(table, rest, strict=True)]
    return np.minimum(np.array(values) * len(table), 1.0)


def _gaps(table: np.ndarray) -> np.ndarray:
    """(G,) each group's share of up minus that of all the others together; 0 where there are no others."""
    others = table.sum(0) - table
    totals, rest = table.sum(1), others.sum(1)
    return np.where(rest > 0, table[:, 0] / np.maximum(totals, 1) - others[:, 0] / np.maximum(rest, 1), 0.0)


def _merge(entries: Iterable[tuple[date, int, int]]) -> list[tuple[str, int, int]]:
    sums: dict[date, list[int]] = {}
    for day, up, down in entries:
        counts = sums.setdefault(day, [0, 0])
        counts[0] += up
        counts[1] += down
    return [(day.isoformat(), up, down) for day, (up, down) in sorted(sums.items())]


def _groups(
    entries: Sequence[tuple[str, int, int]], everything: Sequence[tuple[int, int]] | None = None
) -> tuple[Group, ...]:
    if not entries:
        return ()
    counts = [(up, down) for _, up, down in entries] if everything is None else everything
    gaps = _gaps(np.array(counts, dtype=np.int64))[: len(entries)]
    return tuple(
        Group(name=name, up=up, down=down, up_share=rate(up, up + down), gap=float(gap))
        for (name, up, down), gap in zip(entries, gaps, strict=True)
    )

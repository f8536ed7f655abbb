"""What held-out rows say of a model: figures, how sure they are, how they differ by slice, how well calibrated.

In:  `Evaluated`: rows of metrics, and the log-ratios of KL pairs. Out: `Findings`. Knows neither models nor ranks.

The implicit reward is a classifier's score: sigmoid(beta * (r - z0)), the v of KTO's Eq. 8 with d = 1, is taken as the
chance that a row is desirable. z0 is the estimate over all KL pairs, and intervals take it as given.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kto_dist.evaluation.intervals import Area, Difference, Figure, Interval, Mean, intervals, wilson
from kto_dist.evaluation.slices import by_value
from kto_dist.objective import metrics

BINS = 10
"""Of the reliability plot."""
_ROWS = metrics.QUANTITIES.index("rows")
# what a slice is judged by
IN_SLICES = ("loss", "accuracy/all", "auc", "brier", "rewards/margin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """S held-out rows and K KL pairs under one policy."""

    table: Tensor
    """(S, Q) fp64 on the CPU, as `metrics.row_table` makes it."""
    sign: Tensor
    """(S,) fp64, +1 desirable, -1 undesirable"""
    prompts: np.ndarray
    """(S,) int64, equal for rows of one prompt."""
    kl: Tensor
    """(K,) fp64, log-ratios of prompts with another prompt's completion; none for a loss without z0."""
    kl_rows: np.ndarray
    """(K,) int64, the rows that give the prompt."""
    beta: float
    soft: Tensor | None = None
    """(2, S, Q): the table by class, where labels are probabilities; None: each row is of its sign's class alone."""
    counted: np.ndarray | None = None
    """(S,) bool: the rows that have a loss of their own; None: all."""
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(P, 2) int64 rows: chosen, rejected; none for a loss that is not of pairs."""
    pair_losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """(P,) fp64, weighted."""

    @property
    def kl_sums(self) -> Tensor:  # (2,) sum and count
        return torch.tensor([float(self.kl.sum()), float(self.kl.numel())], dtype=torch.float64)

    @property
    def z0(self) -> float:
        return float(metrics.clamp_kl(self.kl_sums))

    @property
    def desirable(self) -> np.ndarray:  # (S,) bool, or where labels are probabilities fp64: that the row is
        return (self.sign > 0).numpy() if self.soft is None else self.soft[1, :, _ROWS].numpy()

    @property
    def tables(self) -> Tensor:  # (2, S, Q), as `metrics.by_class`
        return metrics.by_class(self.table, self.sign) if self.soft is None else self.soft

    @property
    def chance(self) -> np.ndarray:  # (S,) that the row is desirable, by its reward
        return torch.sigmoid(self.column("reward") - self.beta * self.z0).numpy()

    def column(self, name: str) -> Tensor:  # (S,)
        return self.table[:, metrics.QUANTITIES.index(name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Rows whose chances are alike."""

    chance: float
    """Their mean."""
    desirable: float
    """The share of them that is."""
    low: float
    """Of Wilson's interval of that share."""
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Rewards by class: B bins of equal width."""

    edges: list[float]
    """B + 1"""
    desirable: list[float]
    undesirable: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that is said of one evaluation."""

    figures: dict[str, float]
    """Name -> value, over all rows and per class; `<set>/<name>` of each named set of rows."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    reliability: list[Bin] = field(default_factory=list)
    rewards: Histogram | None = None
    slices: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Column -> value -> figure -> its interval as a dict, or a number where it has none."""

    def to_dict(self) -> dict[str, Any]:
        """As a line of heldout.jsonl has it: figures by name, the rest below them."""
        beside = {
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
            "reliability": [asdict(found) for found in self.reliability],
            "histogram": None if self.rewards is None else asdict(self.rewards),
            "slices": self.slices,
        }
        return {**self.figures, **{name: value for name, value in beside.items() if value}}


Slices = Mapping[str, np.ndarray]
"""Column -> (S,) value of each row, as text."""


def figures_of(rows: Evaluated, sets: np.ndarray | None = None) -> dict[str, float]:
    """The figures alone. `sets`: (S,) the name of the set that each row belongs to, where there are several."""
    found = metrics.step_metrics(rows.tables.sum(1), rows.kl_sums)
    if rows.counted is not None:  # these are over all rows
        found = {name: value for name, value in found.items() if name.partition("/")[0] not in ("loss", "saturated")}
    found |= {name: value for name, value in _values(rows, _figures(rows)).items() if name not in found}
    for name, chosen in _sets(sets):
        found |= {f"{name}/{figure}": value for figure, value in _values(rows, _figures(rows, chosen)).items()}
        found[f"{name}/rows"] = float(chosen.sum())
    return found


def findings(rows: Evaluated, *, sets: np.ndarray | None = None, slices: Slices | None = None) -> Findings:
    """The figures with their intervals, which take a moment."""
    figures = _figures(rows)
    for name, chosen in _sets(sets):
        figures |= {f"{name}/{figure}": of for figure, of in _figures(rows, chosen).items()}
    cuts = [(column, *cut) for column, values in (slices or {}).items() for cut in by_value(values)]
    cut_figures = [
        {name: figure for name, figure in _figures(rows, chosen).items() if name in IN_SLICES} for *_, chosen in cuts
    ]
    numbered = {f"{number} {name}": of for number, own in enumerate(cut_figures) for name, of in own.items()}
    sure = intervals({**figures, **numbered}, _prompts(rows))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for number, (column, value, chosen) in enumerate(cuts):
        own: dict[str, Any] = _values(rows, cut_figures[number])
        own |= {name: asdict(sure[f"{number} {name}"]) for name in own if f"{number} {name}" in sure}
        found.setdefault(column, {})[value] = {"rows": int(chosen.sum()), **own}
    return Findings(
        figures=figures_of(rows, sets),
        intervals={name: sure[name] for name in figures if name in sure},
        reliability=reliability(rows.chance, rows.desirable, rows.prompts),
        rewards=histogram(rows.column("reward").numpy(), rows.desirable),
        slices=found,
    )


def compare(first: Evaluated, second: Evaluated) -> dict[str, Interval]:
    """First minus second, on the same rows and pairs: what is hard for both falls out."""
    assert (first.prompts == second.prompts).all() and (first.kl_rows == second.kl_rows).all()
    ours, theirs = _figures(first), _figures(second)
    return intervals(
        {name: Difference(first=ours[name], second=theirs[name]) for name in ours if name in theirs}, _prompts(first)
    )


def reliability(
    chance: np.ndarray,  # (S,)
    desirable: np.ndarray,  # (S,) whether a row is, or how probable that is
    prompts: np.ndarray | None = None,  # (S,) equal for rows of one prompt; None: each row has its own
    bins: int = BINS,
) -> list[Bin]:
    """Rows by their chance, as many in each bin as in the others; ties stay together."""
    if not chance.size:
        return []
    member = np.arange(chance.size) if prompts is None else np.unique(prompts, return_inverse=True)[1].ravel()
    edges = np.quantile(chance, np.linspace(0, 1, bins + 1))[1:-1]
    place = np.searchsorted(edges, chance)
    found = []
    for number in np.unique(place):
        here = place == number
        share = float(desirable[here].mean())
        # rows of one prompt are alike, and say less than as many of others
        alike = Mean(values=desirable.astype(np.float64), counted=here, share=True).alike(share, member)
        assert alike is not None
        low, high = wilson(share, alike)
        found.append(Bin(chance=float(chance[here].mean()), desirable=share, low=low, high=high, rows=int(here.sum())))
    return found


def histogram(reward: np.ndarray, desirable: np.ndarray, bins: int = 30) -> Histogram | None:
    """None without rows. All rewards lie in it: the widest tell what a clipped plot would hide.

    `desirable`: (S,) whether a row is, or how probable that is.
    """
    if not reward.size:
        return None
    edges = np.histogram_bin_edges(reward, bins)
    up, down = (np.histogram(reward, edges, weights=share)[0] for share in (desirable * 1.0, 1.0 - desirable))
    whole = desirable.dtype == bool
    up, down = (side.astype(int).tolist() if whole else side.tolist() for side in (up, down))
    return Histogram(edges=edges.tolist(), desirable=up, undesirable=down)


def _sets(sets: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    return [] if sets is None else [(str(name), sets == name) for name in np.unique(sets)]


def _prompts(rows: Evaluated) -> np.ndarray:  # (S + K + P,)
    return np.concatenate([rows.prompts, rows.prompts[rows.kl_rows], rows.prompts[rows.pairs[:, 0]]])


def _figures(rows: Evaluated, chosen: np.ndarray | None = None) -> dict[str, Figure]:
    """By name, over `chosen` (S,) rows. Rows, KL pairs and pairs are one sample, so that all see the same draws."""
    count, pairs = len(rows.table), rows.kl.numel() + len(rows.pairs)
    chosen = np.ones(count, bool) if chosen is None else chosen
    nobody = np.zeros(pairs)
    down, up = rows.tables.numpy()
    missed_up, missed_down = (1 - rows.chance) ** 2, rows.chance**2
    found = {
        **_class_figures(rows, "desirable", up, missed_up, chosen),
        **_class_figures(rows, "undesirable", down, missed_down, chosen),
        **_class_figures(
            rows, "all", rows.table.numpy(), up[:, _ROWS] * missed_up + down[:, _ROWS] * missed_down, chosen
        ),
    }
    if {"rewards/desirable", "rewards/undesirable"} <= found.keys():
        found["rewards/margin"] = Difference(first=found["rewards/desirable"], second=found["rewards/undesirable"])
        found["auc"] = Area(
            score=np.append(rows.column("reward").numpy(), nobody),
            desirable=np.append(rows.desirable, nobody > 0),
            counted=np.append(chosen, nobody > 0),
        )
    of_pairs = chosen[rows.kl_rows]
    nothing = np.zeros(len(rows.pairs))
    if of_pairs.any():
        found["kl_raw"] = Mean(
            values=np.concatenate([np.zeros(count), rows.kl.numpy(), nothing]),
            counted=np.concatenate([np.zeros(count, bool), of_pairs, nothing > 0]),
        )
    return found | _pair_figures(rows, chosen)


def _class_figures(
    rows: Evaluated,
    name: str,
    table: np.ndarray,  # (S, Q), of each row what belongs to this class
    miss: np.ndarray,  # (S,) squared distance of its chance from that of the class
    chosen: np.ndarray,  # (S,) bool
) -> dict[str, Figure]:
    nobody = np.zeros(rows.kl.numel() + len(rows.pairs))
    part = table[:, _ROWS]
    counted = chosen & (part > 0)
    if not counted.any():
        return {}
    has_loss = counted
    if rows.counted is not None:  # a loss that leaves rows out takes the desirable ones
        has_loss = counted & rows.counted & (name != "undesirable")
    weight = None if np.isin(part, (0, 1)).all() else np.append(part, nobody)
    column = dict(zip(metrics.QUANTITIES, (table / np.where(part > 0, part, 1)[:, None]).T, strict=True))

    def mean(values: np.ndarray, counted: np.ndarray, *, share: bool = False) -> Mean:
        return Mean(
            values=np.append(values, nobody), counted=np.append(counted, nobody > 0), share=share, weight=weight
        )

    ending = "" if name == "all" else f"/{name}"
    return {
        f"loss{ending}": mean(column["loss"], has_loss),
        f"rewards/{name}": mean(column["reward"], counted),
        f"accuracy/{name}": mean(column["correct"], counted, share=True),
        f"logps/{name}": mean(column["logps"], counted),
        f"ref_logps/{name}": mean(column["ref_logps"], counted),
        f"saturated/{name}": mean(column["saturated"], has_loss, share=True),
        f"brier{ending}": mean(miss, counted),
        f"tokens/{name}": mean(column["tokens"], counted),
    }


def _pair_figures(rows: Evaluated, chosen: np.ndarray) -> dict[str, Figure]:
    """Over the pairs of which both rows are `chosen`."""
    counted = chosen[rows.pairs].all(1)
    if not counted.any():
        return {}
    before = np.zeros(len(rows.table) + rows.kl.numel())

    def mean(values: np.ndarray, *, share: bool = False) -> Mean:
        return Mean(values=np.append(before, values), counted=np.append(before > 0, counted), share=share)

    rewards = rows.column("reward").numpy()[rows.pairs]
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": mean(rows.pair_losses.numpy()),
        "rewards/chosen": mean(rewards[:, 0]),
        "rewards/rejected": mean(rewards[:, 1]),
        "rewards/margins": mean(margins),
        "accuracy/pairs": mean((np.sign(margins) + 1) / 2, share=True),
    }


def _values(rows: Evaluated, figures: Mapping[str, Figure]) -> dict[str, float]:
    once = np.ones((1, len(_prompts(rows))))
    values = {name: float(figure.of(once)[0]) for name, figure in figures.items()}
    return {name: value for name, value in values.items() if np.isfinite(value)}

"""What the runs of a comparison come to: lr and beta chosen on one half of the held-out prompts, figures of the other.

In:  finished runs. Out: `Outcome`, which `report.py` shows. Rewards are log-ratios in nats: betas differ.

1. `halves`    each prompt's rows in one half
2. `choose`    of each method the run with the best figure on the first half
3. `outcome`   its figures on the second, with intervals, and differences to one method in the same resamples
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from kto_dist.base.errors import UserError
from kto_dist.comparison.plan import Planned
from kto_dist.evaluation import kept
from kto_dist.evaluation.figures import Evaluated, compare, findings
from kto_dist.evaluation.intervals import Interval
from kto_dist.record.run_folder import read_lines

SHOWN = ("auc", "accuracy/pairs", "rewards/margin", "rewards/desirable", "rewards/undesirable")
"""The figures that are compared; a set of rows may have no pairs."""
START = "start"
"""The model before any of them, which is the reference: all its log-ratios are 0, and nothing is told apart."""
BANDS = 5
"""Of answers by length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one run."""

    steps: int
    rows_a_step: int
    tokens: int
    """Of the rows that were trained on; KL pairs apart."""
    seconds: dict[str, float]
    """By phase."""
    pairs: int
    """Log-probs that it asked of the reference, each once."""
    from_store: int
    scored: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """One run on the half that chooses."""

    name: str
    method: str
    lr: float
    beta: float | None
    figure: float | None
    """`compare.choose_by`; None where the rows give it none."""
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The chosen run of a method, or the start, on the half that is reported."""

    method: str
    name: str
    lr: float | None
    beta: float | None
    figures: dict[str, float]
    intervals: dict[str, Interval]
    against: dict[str, Interval]
    """This method minus `Outcome.against`: on the same rows, in the same resamples."""
    length: float | None
    """Spearman's correlation of log-ratio and length of the answer: what is learned of length, in kind."""
    bands: list[dict[str, float]]
    """By length of the answer: tokens, log-ratio of good and of bad answers."""
    curve: list[tuple[int, float]]
    """(step, margin in nats) of the steps that took good and bad answers."""
    cost: Cost | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    choose_by: str
    against: str
    """The method that the others are compared with."""
    tried: list[Tried]
    rows: list[Row]
    prompts: tuple[int, int]
    """That choose, that are reported."""
    heldout: int
    """Held-out rows that are reported."""
    pairs: int
    """Pairs of good and bad answers among them."""
    scored: int
    """By the reference, over all runs."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def halves(prompts: np.ndarray) -> np.ndarray:  # (S,) -> (S,) bool, the half that chooses
    """A function of the prompts alone, so that it is the same in every comparison on these rows."""
    names, place = np.unique(prompts, return_inverse=True)
    first = np.zeros(names.size, bool)
    first[np.random.default_rng(0).permutation(names.size)[: names.size // 2]] = True
    return first[place.ravel()]


def choose(runs: list[Planned], values: Mapping[str, float | None]) -> dict[str, Planned]:
    """By method, the run with the highest value; of equal ones, and where there is none, the first."""
    chosen: dict[str, Planned] = {}
    for run in runs:
        value, best = values[run.name], chosen.get(run.method)
        if best is None or (value or 0.0) > (values[best.name] or 0.0):
            chosen[run.method] = run
    return chosen


def outcome(runs: list[Planned], pairs: np.ndarray, choose_by: str) -> Outcome:
    """Of finished runs; `pairs` (P, 2): chosen and rejected held-out rows. Raises `UserError`."""
    rows = {run.name: kept.paired(kept.read(run.folder.heldout_rows), pairs) for run in runs}
    _same_rows(rows)
    some = next(iter(rows.values()))
    choosing = halves(some.prompts)
    sides = [kept.only(some, half) for half in (choosing, ~choosing)]
    for side, what in zip(sides, ("chooses", "is reported"), strict=True):
        if len(np.unique(side.desirable)) < 2:
            raise UserError(
                f"the half of the held-out prompts that {what} ({len(np.unique(side.prompts))} prompts, "
                f"{len(side.sign)} rows) needs good and bad answers: hold out more (data.heldout)"
            )
    values = {name: findings(kept.only(own, choosing)).figures.get(choose_by) for name, own in rows.items()}
    chosen = choose(runs, values)
    reported = {method: kept.only(rows[run.name], ~choosing) for method, run in chosen.items()}
    against = "kto" if "kto" in chosen else next(iter(chosen))
    start = _row(START, None, _at_start(sides[1]), reported[against], None)
    costs = {run.name: _cost(run) for run in runs}
    return Outcome(
        choose_by=choose_by,
        against=against,
        tried=[
            Tried(
                name=run.name,
                method=run.method,
                lr=run.lr,
                beta=run.beta,
                figure=values[run.name],
                chosen=chosen[run.method] is run,
            )
            for run in runs
        ],
        rows=[
            start,
            *(_row(name, run, reported[name], reported[against], costs[run.name]) for name, run in chosen.items()),
        ],
        prompts=(len(np.unique(sides[0].prompts)), len(np.unique(sides[1].prompts))),
        heldout=len(sides[1].sign),
        pairs=len(sides[1].pairs),
        scored=sum(cost.scored for cost in costs.values()),
    )


def _same_rows(rows: Mapping[str, Evaluated]) -> None:
    names = list(rows)
    for name in names[1:]:
        one, other = rows[names[0]], rows[name]
        if not (np.array_equal(one.prompts, other.prompts) and np.array_equal(one.sign, other.sign)):
            raise UserError(
                f"{names[0]} and {name} have other held-out rows: the data changed between them; delete both"
            )


def _at_start(rows: Evaluated) -> Evaluated:
    refs = rows.column("ref_logps").numpy()
    tokens = rows.column("tokens").numpy()
    same = kept.of(logps=refs, ref_logps=refs, tokens=tokens, sign=rows.sign.numpy(), prompts=rows.prompts)
    return kept.paired(same, rows.pairs)


def _row(method: str, run: Planned | None, rows: Evaluated, against: Evaluated, cost: Cost | None) -> Row:
    found = findings(rows)
    ratio, tokens = rows.column("reward").numpy(), rows.column("tokens").numpy()
    correlation = float(spearmanr(ratio, tokens).statistic) if np.ptp(ratio) and np.ptp(tokens) else None
    return Row(
        method=method,
        name=method if run is None else run.name,
        lr=None if run is None else run.lr,
        beta=None if run is None else run.beta,
        figures={name: found.figures[name] for name in SHOWN if name in found.figures},
        intervals={name: found.intervals[name] for name in SHOWN if name in found.intervals},
        against={} if rows is against else {n: i for n, i in compare(rows, against).items() if n in SHOWN},
        length=correlation,
        bands=_bands(rows),
        curve=[] if run is None else _curve(run),
        cost=cost,
    )


def _bands(rows: Evaluated) -> list[dict[str, float]]:
    ratio, tokens = rows.column("reward").numpy(), rows.column("tokens").numpy()
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, BANDS + 1))[1:-1])
    place = np.searchsorted(edges, tokens)
    found = []
    for number in np.unique(place):
        band = {"tokens": float(tokens[place == number].mean())}
        for name, wanted in (("desirable", True), ("undesirable", False)):
            here = (place == number) & (rows.desirable == wanted)
            if here.any():
                band[name] = float(ratio[here].mean())
        found.append(band)
    return found


def _curve(run: Planned) -> list[tuple[int, float]]:
    name, beta = "rewards/margin", run.config.objective.beta
    return [(int(line["step"]), line[name] / beta) for line in read_lines(run.folder.metrics) if name in line]


def _cost(run: Planned) -> Cost:
    summary = json.loads(run.folder.summary.read_text(encoding="utf-8"))
    asked = summary["reference"]
    return Cost(
        steps=summary["steps"],
        rows_a_step=run.config.train.global_batch,
        tokens=summary["tokens"],
        seconds={name: float(value) for name, value in summary["seconds"].items()},
        pairs=asked["pairs"] - asked["repeated"],
        from_store=asked["from_store"],
        scored=asked["scored"],
    )

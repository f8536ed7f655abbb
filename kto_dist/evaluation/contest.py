"""Two models' answers before a judge: every pair in both orders, and what the verdicts come to.

In:  a judge, and pairs of answers to one prompt, ours and theirs. Out: `Contest`, whose `figures` have intervals over
prompts. Answers that are equal are ties, and no judge is asked.

| figure                | what it is                                                                             |
|-----------------------|----------------------------------------------------------------------------------------|
| win_rate              | ours wins 1, a tie a half; the mean of both orders                                     |
| win_rate/equal_length | the same for answers of equal length, by a logistic curve over the difference          |
| ties                  | share of verdicts that name neither                                                    |
| flips                 | share of pairs whose winner changes with the order: so far the judge goes by the place |
| prefers_first         | of verdicts with a winner, the share that names the answer shown first                 |
| prefers_longer        | of verdicts with a winner, the share that names the longer answer                      |
| score/...             | what a judge of single answers gave ours and theirs, and the difference                |
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kto_dist.evaluation.intervals import Difference, Figure, Interval, Mean, intervals
from kto_dist.evaluation.judges import Comparison, Judge, ScoreJudge, Verdict
from kto_dist.evaluation.verdicts import Verdicts

_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5, None: np.nan}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """P pairs, each judged in both orders."""

    judge: str
    """Its name."""
    prompts: np.ndarray
    """(P,) equal for pairs of one prompt."""
    first: np.ndarray
    """(P,) points of our answer where it is shown first: 1, 0.5 for a tie, 0; NaN without a verdict."""
    second: np.ndarray
    """(P,) the same where it is shown second."""
    longer: np.ndarray
    """(P,) characters by which our answer is longer."""
    identical: np.ndarray
    """(P,) bool: the answers are equal."""
    scores: np.ndarray | None
    """(P, 2) of our answer and theirs, by a judge of single answers."""
    kept: int = 0
    """Verdicts, or scores, that the judge had given before."""

    @property
    def points(self) -> np.ndarray:  # (P,)
        """Of our answer: the mean of the verdicts that there are."""
        both = np.stack([self.first, self.second])
        there = np.isfinite(both)
        with np.errstate(invalid="ignore"):
            return np.where(there, both, 0.0).sum(0) / there.sum(0)

    @property
    def without_verdict(self) -> int:
        """Verdicts, two a pair, that the judge did not give."""
        return int(np.isnan(np.append(self.first, self.second)).sum())

    def figures(self, seed: int = 0) -> dict[str, Interval]:
        """Of those that the verdicts give."""
        points, both = self.points, np.concatenate([self.first, self.second])
        judged, every = np.isfinite(points), np.isfinite(both)
        twice = np.isfinite(self.first) & np.isfinite(self.second)
        won = every & (both != 0.5)
        # shown first is ours in the one half of the verdicts, theirs in the other
        place = np.concatenate([self.first, 1 - self.second])
        longer = np.concatenate([self.longer, self.longer])
        size, longest = np.where(longer > 0, both, 1 - both), won & (longer != 0)
        rows = self.first.size

        def of_pairs(values: np.ndarray, counted: np.ndarray, *, share: bool = True) -> Mean:
            filled = np.where(counted, values, 0.0)
            return Mean(values=np.append(filled, np.zeros(rows)), counted=_with(counted, rows), share=share)

        def of_verdicts(values: np.ndarray, counted: np.ndarray) -> Mean:
            return Mean(values=np.where(counted, values, 0.0), counted=counted, share=True)

        found: dict[str, Figure] = {
            "win_rate": of_pairs(points, judged),
            "win_rate/equal_length": AtEqualLength(points=points, apart=self.longer, counted=judged),
            "ties": of_verdicts((both == 0.5).astype(float), every),
            "flips": of_pairs(((self.first - self.second) ** 2 == 1).astype(float), twice),
            "prefers_first": of_verdicts(place, won),
            "prefers_longer": of_verdicts(size, longest),
        }
        if self.scores is not None:
            scored = np.isfinite(self.scores).all(1)
            shares = _shares(self.scores[scored])
            ours, theirs = (of_pairs(self.scores[:, side], scored, share=shares) for side in (0, 1))
            found |= {"score/ours": ours, "score/theirs": theirs}
            found["score/difference"] = Difference(first=ours, second=theirs)
        return intervals(found, np.append(self.prompts, self.prompts), seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "judge": self.judge,
            "pairs": int(self.first.size),
            "identical": int(self.identical.sum()),
            "without_verdict": self.without_verdict,
            "kept": self.kept,
            "figures": {name: asdict(figure) for name, figure in self.figures().items()},
        }


def contest(
    judge: Judge,
    pairs: Sequence[Pair],
    prompts: np.ndarray | None = None,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Contest:
    """Asks the judge about every pair twice. `prompts`: (P,) equal for pairs of one prompt; None: by their text.

    `cache`: the folder of what judges have said before; None: nothing is kept. Raises `UserError` where the judge
    cannot be asked.
    """
    if prompts is None:
        prompts = np.unique([pair.prompt for pair in pairs], return_inverse=True)[1].ravel()
    identical = np.array([pair.ours == pair.theirs for pair in pairs], bool)
    verdicts, scores = Verdicts(judge, cache, say), None
    if isinstance(judge, ScoreJudge):
        each = [(pair.prompt, answer) for pair in pairs for answer in (pair.ours, pair.theirs)]
        scores = np.array(verdicts.scores(judge, each), np.float64).reshape(-1, 2)
        # one answer is judged at a time, so that no order is to be seen
        with np.errstate(invalid="ignore"):
            first = second = (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2
    else:
        asked = [pair for pair, same in zip(pairs, identical, strict=True) if not same]
        there = [Comparison(prompt=pair.prompt, first=pair.ours, second=pair.theirs) for pair in asked]
        back = [Comparison(prompt=pair.prompt, first=pair.theirs, second=pair.ours) for pair in asked]
        said = verdicts.of([*there, *back])
        first, second = np.full(len(pairs), 0.5), np.full(len(pairs), 0.5)
        first[~identical] = _points(said[: len(asked)])
        second[~identical] = 1 - _points(said[len(asked) :])
    return Contest(
        judge=judge.name,
        prompts=prompts,
        first=first,
        second=second,
        longer=np.array([len(pair.ours) - len(pair.theirs) for pair in pairs], np.float64),
        identical=identical,
        scores=scores,
        kept=verdicts.kept,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AtEqualLength:
    """The win rate where both answers are of one length, by a logistic regression on tanh(difference / its spread).

    The length term of length-controlled AlpacaEval (arXiv 2404.04475, Eq. 2), without those of model and prompt.
    """

    points: np.ndarray
    """(P,) 0 to 1."""
    apart: np.ndarray
    """(P,) by how much ours is longer."""
    counted: np.ndarray
    """(P,) bool"""

    def of(self, times: np.ndarray) -> np.ndarray:  # (B, 2 P or P) -> (B,)
        times = times[:, : self.points.size][:, self.counted]
        points, apart = self.points[self.counted], self.apart[self.counted]
        spread = float(np.sqrt((apart**2).mean())) if apart.size else 0.0
        size = np.tanh(apart / spread) if spread else np.zeros(apart.size)
        found = _logistic_at_zero(size, points, times)
        return np.where(times.sum(1) > 0, found, np.nan)

    @property
    def rests_on(self) -> np.ndarray:
        return self.counted

    def prompts(self, member: np.ndarray) -> int:
        return int(np.unique(member[: self.points.size][self.counted]).size)

    def alike(self, value: float, member: np.ndarray) -> float | None:
        """Where ours wins always, or never; else its variance is not a share's."""
        points = self.points[self.counted]
        return float(self.prompts(member)) if np.isin(points, (0.0, 1.0)).all() and np.ptp(points) == 0 else None


_RIDGE = 0.05
"""Keeps the curve finite where one side always wins."""


def _logistic_at_zero(size: np.ndarray, points: np.ndarray, times: np.ndarray) -> np.ndarray:
    """sigmoid(a) of points ~ sigmoid(a + b * size), by Newton's method for each of B samples at once."""
    a, b = np.zeros(len(times)), np.zeros(len(times))
    for _ in range(50):
        chance = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * size)))
        miss, weight = times * (points - chance), times * chance * (1 - chance)
        to_a, to_b = miss.sum(1) - _RIDGE * a, miss @ size - _RIDGE * b
        aa, ab, bb = weight.sum(1) + _RIDGE, weight @ size, weight @ size**2 + _RIDGE
        determinant = aa * bb - ab**2
        step_a, step_b = (bb * to_a - ab * to_b) / determinant, (aa * to_b - ab * to_a) / determinant
        a, b = a + np.clip(step_a, -1, 1), b + np.clip(step_b, -1, 1)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-a)))


def _points(verdicts: Sequence[Verdict | None]) -> np.ndarray:
    return np.array([_POINTS[verdict] for verdict in verdicts], np.float64)


def _with(counted: np.ndarray, rows: int) -> np.ndarray:
    return np.append(counted, np.zeros(rows, bool))


def _shares(scores: np.ndarray) -> bool:
    """Whether every score is a yes or a no, or lies between."""
    return bool(scores.size) and bool((scores >= 0).all() and (scores <= 1).all())

"""How far users agree on one and the same response, and what that says about the labels.

In:  table `voices` of the audit: one row for each (response, user) of the responses that several users judged.
Out: `Agreement`: Krippendorff's alpha, the error rate of a single vote, and confidence intervals of both.

Alpha (nominal, two labels; Krippendorff, Content Analysis, 2004, chapter 11). A response u with n_u votes, k_u of them
up, gives each of its ordered pairs of votes the weight 1 / (n_u - 1). With o the weight of all pairs (up, down), n the
votes and n_up, n_down their counts by label:

    o = sum over u of k_u (n_u - k_u) / (n_u - 1)        alpha = 1 - (n - 1) o / (n_up n_down)

1 is perfect agreement, 0 what chance would give, below 0 systematic disagreement.

Noise. If every response has one right label and each vote misses it independently with probability e, then two votes
on a response differ with probability D = 2 e (1 - e), so e = (1 - sqrt(1 - 2 D)) / 2. D is 2 o / n. Where tastes
honestly differ e counts that as error; where users copy one another or share a mistake it is missed.

Confidence. The responses are what was drawn independently, so the bootstrap redraws responses. Those with the same
(n_u, k_u) are interchangeable: redrawing M of them is one multinomial draw over the few distinct (n_u, k_u), which
costs the same for a thousand responses and for a hundred million. There are more distinct ones where answers have
thousands of votes, so the draws are made in blocks of bounded memory.
"""

from dataclasses import dataclass

import numpy as np

_SEED = 0  # of the bootstrap: the same votes have the same interval
_DRAWN = 1 << 20  # counts of the bootstrap at a time: 8 MiB, and as much again as floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of responses that at least two users judged; a user's last vote on a response is the one that counts."""

    responses: int
    votes: int
    users: int | None
    """None: the log has no users, and each vote counts as another user's."""
    split: int
    """Responses with votes of both kinds."""
    alpha: Estimate | None
    """None: no response was judged twice, or all votes are of one kind, where alpha isn't defined."""
    disagreement: float | None
    """Chance that two votes on a response differ."""
    noise: Estimate | None
    """Chance that a single vote is wrong, under the assumption above; 0.5: the votes say nothing."""
    best_accuracy: float | None
    """Share of single held-out votes that a perfect model would agree with: 1 - noise."""
    wrong_labels: float | None
    """Expected share of the dataset's weight whose label is wrong, from noise and the votes behind each row."""
    alpha_without_critics: float | None
    noise_without_critics: float | None
    """Of the same votes without those of the users named heavy downvoters; None: nobody is."""
    by_votes: tuple["Unanimity", ...]
    """Responses by how many users judged them; the last stands for so many and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unanimity:
    """Responses that so many users judged."""

    votes: int
    all_up: int
    split: int
    all_down: int


def agreement_of(units: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """(alpha, disagreement, noise) of `units`, (M, 3) int64: votes, votes up, and how many responses have that."""
    if not len(units):
        return None, None, None
    alpha, differ = _alpha_and_disagreement(units, units[None, :, 2])
    return _number(alpha[0]), _number(differ[0]), _number(_noise(differ)[0])


def unanimity(units: np.ndarray, most: int = 8) -> tuple[Unanimity, ...]:
    """How often all users agree, by how many they are; `most` stands for that and more."""
    result = []
    for votes in range(2, most + 1):
        rows = units[units[:, 0] == votes] if votes < most else units[units[:, 0] >= votes]
        up, down = rows[:, 1] == rows[:, 0], rows[:, 1] == 0
        counts = (int(rows[which, 2].sum()) for which in (up, ~up & ~down, down))
        result.append(Unanimity(**dict(zip(("all_up", "split", "all_down"), counts, strict=True)), votes=votes))
    return tuple(entry for entry in result if entry.all_up + entry.split + entry.all_down)


def intervals(units: np.ndarray, resamples: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """95 % percentile bootstrap intervals of alpha and of noise, redrawing responses."""
    total = int(units[:, 2].sum()) if len(units) else 0
    if total < 2:
        return None, None
    generator, block = np.random.default_rng(_SEED), max(1, _DRAWN // len(units))
    figures = [
        _alpha_and_disagreement(
            units, generator.multinomial(total, units[:, 2] / total, size=min(block, resamples - r))
        )
        for r in range(0, resamples, block)
    ]
    alpha, differ = np.concatenate(figures, axis=1)
    return _middle(alpha), _middle(_noise(differ))


def share_of_good(tallies: np.ndarray, noise: float) -> float:
    """The share g of good responses that makes the votes likeliest. `tallies`: (M, 3) votes up, down, responses.

    The likelihood is concave in g, and its slope has the sign of (mean chance of being good, given g) - g, so halving
    finds the g that reproduces itself. Where votes say nothing (e is 0.5) any g does, and it is 0.5.
    """
    evidence, responses = _evidence(tallies, noise), tallies[:, 2].astype(float)
    if not (evidence * responses).any():
        return 0.5
    low, high = 1e-6, 1 - 1e-6
    for _ in range(40):
        good = (low + high) / 2
        rises = float((responses * _chance(evidence, good)).sum() / responses.sum()) > good
        low, high = (good, high) if rises else (low, good)
    return (low + high) / 2


def wrong_labels(rows: np.ndarray, noise: float, good: float) -> float | None:
    """Expected share of weight on a wrong label. `rows`, (M, 4): votes up, votes down, label, summed weight.

    A label is 1 for up, 0 for down, or in between: so much of the weight is on up, and the rest on down.

    Bayes' rule: where a share g of responses is good and votes err at rate e, a response with u votes up and d down is
    good with odds g / (1 - g) * ((1 - e) / e) ** (u - d). g (`good`) is that of the responses that the rows were
    chosen from: conflicts and balance choose by votes and labels, so the rows alone would tell a wrong one.
    """
    weight = rows[:, 3].astype(float)
    if not weight.sum():
        return None
    chance = _chance(_evidence(rows, noise), good)
    wrong = rows[:, 2] * (1 - chance) + (1 - rows[:, 2]) * chance
    return round(float((weight * wrong).sum() / weight.sum()), 9)


def _evidence(votes: np.ndarray, noise: float) -> np.ndarray:
    """(M,) log-likelihood ratio of good against bad, of votes up and down in the first two columns."""
    error = min(max(noise, 1e-9), 0.5)
    return (votes[:, 0] - votes[:, 1]).astype(float) * np.log((1 - error) / error)


def _chance(evidence: np.ndarray, good: float) -> np.ndarray:
    """(M,) chance that a response is good."""
    return 1 / (1 + np.exp(-np.clip(np.log(good / (1 - good)) + evidence, -700, 700)))


def _alpha_and_disagreement(units: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both (R,) for `counts` (R, M): how often each of the M kinds of response occurs in each of R draws."""
    votes, up = units[:, 0].astype(float), units[:, 1].astype(float)
    pairs = counts @ (up * (votes - up) / (votes - 1))
    total, ups = counts @ votes, counts @ up
    with np.errstate(divide="ignore", invalid="ignore"):
        # votes of one kind alone leave alpha undefined: 0 / 0
        alpha = 1 - (total - 1) * pairs / (ups * (total - ups))
        return alpha, 2 * pairs / total


def _noise(disagreement: np.ndarray) -> np.ndarray:
    return (1 - np.sqrt(np.clip(1 - 2 * disagreement, 0, None))) / 2


def _middle(draws: np.ndarray) -> tuple[float, float] | None:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

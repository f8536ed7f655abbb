"""Whose taste the feedback is: how unevenly users vote, and who dislikes far more than everyone else.

In:  votes and downvotes by user, as counts of users with the same figures.
Out: Gini coefficients, Lorenz curves, shares of the top users, and the users named as heavy downvoters.

Naming. Users differ honestly, so a user's downvotes are compared with a beta-binomial spread of everyone else's rates
and not with one rate: P(a user has this many downvotes or more | the others' rates). Benjamini and Hochberg's procedure
bounds the share of wrongly named users among the named, however many users there are. The spread must be that of
the others, so it is fitted without the named, in turns, until nobody joins or leaves; the first fit leaves out the
top quarter of rates, since users who dislike everything would make any spread look wide enough to hold them. (More
than a quarter of the users still can hide behind one another.)
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from kto_dist.feedback.agreement import Estimate

# With fewer users that have enough votes, the spread between them cannot be told from one of them being odd.
MIN_USERS = 10
_TURNS = 20
_LORENZ_POINTS = 101


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A Lorenz curve: the share of votes (y) that the least active share of users (x) gave."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """One user's part; the shares of votes are of those that have a user, the shares of the loss are of all of it."""

    user: str
    """A salted hash."""
    votes: int
    downvotes: int
    share_of_votes: float
    share_of_downvotes: float
    down_rate: Estimate
    p_value: float | None
    """Chance of at least so many downvotes among the others' rates, after correction; None: too few votes to judge."""
    named: bool
    """Whether this is a heavy downvoter."""
    overruled: float | None
    """Share of this user's downvotes on responses that most other users who judged them liked; None: no such
    downvote."""
    loss_before: float
    """Share of the training loss if every vote counted fully."""
    loss_after: float
    """Share of it in the dataset, after cleaning, cap and shrinking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Users:
    """Of all votes that have a user; shares of the loss are of all votes'."""

    users: int
    votes: int
    votes_without_user: int
    gini_votes: float
    gini_downvotes: float
    effective_before: float
    """As many users with equal shares of the loss would be as concentrated: 1 / sum of squared shares, where each vote
    without a user is another one's."""
    effective_after: float | None
    top_votes: dict[str, float]
    """Share of the votes that the most active users gave, by how many these are: "1", "10", "1%", ..."""
    top_downvotes: dict[str, float]
    lorenz_votes: Curve
    lorenz_downvotes: Curve
    usual_down_rate: float
    """Mean over users of the beta-binomial fit, without the named."""
    spread_of_rates: float | None
    """Standard deviation of the users' true rates around it; None: too few users to fit."""
    largest_loss_after: float | None
    named: int
    """Heavy downvoters; the next four are shares of all of them together."""
    named_votes: float
    named_downvotes: float
    named_loss_before: float
    named_loss_after: float | None
    top: tuple[User, ...]
    """The named first, then the most influential."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """What `heavy_downvoters` found, by place in its input."""

    p_values: np.ndarray
    """(M,) corrected; NaN below min_votes."""
    flags: np.ndarray
    """(M,) bool."""
    rate: float
    spread: float | None


def heavy_downvoters(
    votes: np.ndarray,  # (M,) votes of a user
    down: np.ndarray,  # (M,) of them downvotes
    users: np.ndarray,  # (M,) how many users have these two figures
    *,
    min_votes: int,
    level: float,  # false-discovery rate
) -> Named:
    """Users whose downvotes the others' spread of rates does not explain."""
    judged = votes >= min_votes
    p_values = np.full(len(votes), np.nan)
    flags = np.zeros(len(votes), bool)
    total = float((votes * users).sum())
    overall = float((down * users).sum()) / total if total else 0.0
    if users[judged].sum() < MIN_USERS:
        return Named(p_values=p_values, flags=flags, rate=overall, spread=None)

    n, d, count = votes[judged], down[judged], users[judged]
    rates = d / n
    by_rate = np.argsort(rates, kind="stable")
    keep = np.empty(len(n), bool)
    # users with the same figures are one entry: it stays whole if its first user does
    keep[by_rate] = np.cumsum(count[by_rate]) - count[by_rate] < 0.75 * count.sum()
    seen: set[bytes] = set()
    for _ in range(_TURNS):
        mean, strength = _fit(n[keep], d[keep], count[keep])
        raw = stats.betabinom.sf(d - 1, n, mean * strength, (1 - mean) * strength)
        # one p-value a user, since the procedure counts users
        adjusted = stats.false_discovery_control(np.clip(np.repeat(raw, count), 0, 1))
        corrected = adjusted[np.cumsum(count) - count]
        found = corrected < level
        if (~found).tobytes() == keep.tobytes() or found.tobytes() in seen:
            break
        seen.add(found.tobytes())
        if count[~found].sum() < MIN_USERS:
            break
        keep = ~found
    p_values[judged], flags[judged] = corrected, found
    spread = float(np.sqrt(mean * (1 - mean) / (strength + 1)))
    return Named(p_values=p_values, flags=flags, rate=float(mean), spread=spread)


def _fit(n: np.ndarray, d: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Mean and strength (a + b) of the beta-binomial, by maximum likelihood."""
    start = float((d * count).sum() / (n * count).sum())
    start = min(max(start, 1e-3), 1 - 1e-3)

    def cost(place: np.ndarray) -> float:
        mean, strength = 1 / (1 + np.exp(-place[0])), np.exp(place[1])
        return -float((count * stats.betabinom.logpmf(d, n, mean * strength, (1 - mean) * strength)).sum())

    # strength up to 1e6 is a binomial for all purposes; below 1 rates would pile up at 0 and 1
    found = optimize.minimize(
        cost,
        np.array([np.log(start / (1 - start)), np.log(20.0)]),
        method="L-BFGS-B",
        bounds=[(-12, 12), (0.0, np.log(1e6))],
    )
    return float(1 / (1 + np.exp(-found.x[0]))), float(np.exp(found.x[1]))


def gini(values: np.ndarray, users: np.ndarray) -> float:
    """Of `values`, each had by `users` users: 0 where all have the same, towards 1 where one has everything."""
    order = np.argsort(values, kind="stable")
    values, users = values[order].astype(float), users[order].astype(float)
    total, everyone = (values * users).sum(), users.sum()
    if not total:
        return 0.0
    # half the mean absolute difference over the mean; a group of equal users has consecutive ranks
    before = np.cumsum(users) - users
    ranks = before + (users + 1) / 2
    return float((2 * (ranks * values * users).sum() / total - (everyone + 1)) / everyone)


def lorenz(values: np.ndarray, users: np.ndarray) -> Curve:
    """At most about a hundred points of the curve, from (0, 0) to (1, 1)."""
    order = np.argsort(values, kind="stable")
    people = np.concatenate([[0.0], np.cumsum(users[order].astype(float))])
    votes = np.concatenate([[0.0], np.cumsum((values * users)[order].astype(float))])
    if not votes[-1]:
        return Curve(x=(0.0, 1.0), y=(0.0, 1.0))
    x, y = people / people[-1], votes / votes[-1]
    points = np.linspace(0, 1, _LORENZ_POINTS)
    return Curve(x=tuple(map(float, points)), y=tuple(round(float(value), 6) for value in np.interp(points, x, y)))


def top_shares(values: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Share that the top 1, 5 and 10 users and the top 1 % and 10 % of users hold."""
    order = np.argsort(-values, kind="stable")
    people = np.concatenate([[0.0], np.cumsum(users[order].astype(float))])
    votes = np.concatenate([[0.0], np.cumsum((values * users)[order].astype(float))])
    if not votes[-1]:
        return {}
    everyone = people[-1]
    wanted = {"1": 1, "5": 5, "10": 10, "1%": 0.01 * everyone, "10%": 0.1 * everyone}
    return {
        name: float(np.interp(size, people, votes) / votes[-1])
        for name, size in wanted.items()
        if 1 <= size <= everyone
    }


def rate(part: int, whole: int) -> Estimate:
    """A share with Wilson's 95 % interval."""
    interval = stats.binomtest(part, whole).proportion_ci(method="wilson")
    return Estimate(value=part / whole, low=float(interval.low), high=float(interval.high))

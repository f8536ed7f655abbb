"""What the steps removed, how long the answers of each class are, and the answers that users disagree about.

In:  the pipeline's tables `steps`, `examples`, `votes`, `texts`, and the audit's `voices`.
Out: `StepCounts`, `Lengths`, `Conflicts`; quoted texts are masked and cut.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import numpy as np

from kto_dist.feedback.mask import excerpt
from kto_dist.feedback.sql import one

_PROMPT, _ANSWER = 400, 600  # characters that a sample quotes
_BINS = 40
# characters from which a pile is no chance of short answers; its answers; piles that are looked into, and their texts
_PILED, _LEAST_PILED, _PILES, _LOOKED_AT = 100, 5, 5, 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """Votes before a step of the cleaning, and how many it took, by label."""

    step: str
    up_before: int
    up_removed: int
    down_before: int
    down_removed: int
    unlabelled_before: int
    unlabelled_removed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLengths:
    """Characters of the completions of one class in the dataset."""

    p10: int
    p50: int
    p90: int
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pile:
    """Answers of the dataset that have one exact length, though their texts differ."""

    characters: int
    answers: int
    share: float
    ending: str
    """The last characters, where most of them share these: an export that cuts may say so with dots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    up: ClassLengths | None
    down: ClassLengths | None
    auc: float | None
    """Chance that a random thumbs-up answer is longer than a random thumbs-down one; ties count half."""
    edges: tuple[float, ...]
    """Of a histogram over logarithmic bins of characters: one more edge than counts."""
    up_counts: tuple[int, ...]
    down_counts: tuple[int, ...]
    pile: Pile | None
    """The largest one, if any is larger than chance makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """One response that users judged both ways."""

    response: str
    """Its `response_key`."""
    prompt: str
    completion: str
    votes_up: int
    votes_down: int
    outcome: Literal["up", "down", "both", "left out"]
    """Its label in the dataset, if it has one; both: each by its share of the votes' weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflicts:
    """Responses with votes of both kinds, and what the dataset made of them."""

    responses: int
    votes: int
    kept: int
    """How many of the responses are in the dataset."""
    samples: tuple[Conflict, ...]


def steps_of(connection: duckdb.DuckDBPyConnection) -> tuple[StepCounts, ...]:
    found: dict[int, dict[str, Any]] = {}
    rows = connection.execute('SELECT number, step, label, "before", removed FROM steps ORDER BY number').fetchall()
    for number, step, label, before, removed in rows:
        kind = "unlabelled" if label is None else "up" if label else "down"
        counts = found.setdefault(number, {"step": step})
        counts[f"{kind}_before"] = counts.get(f"{kind}_before", 0) + before
        counts[f"{kind}_removed"] = counts.get(f"{kind}_removed", 0) + removed
    zeros = dict.fromkeys((name for name in StepCounts.__annotations__ if name != "step"), 0)
    return tuple(StepCounts(**{**zeros, **counts}) for counts in found.values())


def lengths_of(connection: duckdb.DuckDBPyConnection, pile_share: float) -> Lengths:
    found = connection.execute(
        "SELECT characters, count(*) FILTER (label), count(*) FILTER (NOT label) FROM examples GROUP BY 1 ORDER BY 1"
    ).fetchnumpy()
    length, up, down = (np.asarray(column).astype(np.int64) for column in found.values())
    if not len(length):
        return Lengths(up=None, down=None, auc=None, edges=(), up_counts=(), down_counts=(), pile=None)
    edges = np.geomspace(1, max(2, int(length.max()) + 1), _BINS + 1)
    counts = [np.histogram(np.maximum(length, 1), edges, weights=side)[0].astype(int) for side in (up, down)]
    return Lengths(
        up=_quantiles(length, up),
        down=_quantiles(length, down),
        auc=auc(up, down),
        edges=tuple(round(float(edge), 2) for edge in edges),
        up_counts=tuple(map(int, counts[0])),
        down_counts=tuple(map(int, counts[1])),
        pile=_pile(connection, length, up + down, pile_share),
    )


def _pile(connection: duckdb.DuckDBPyConnection, length: np.ndarray, counts: np.ndarray, share: float) -> Pile | None:
    """The length at which most answers pile up: at least `share` of all, and many times as many as at lengths nearby.

    The same text over and over, such as a greeting, piles up as well: that is no cut.
    """
    total = int(counts.sum())
    near = np.searchsorted(length, length * 1.1, side="right"), np.searchsorted(length, length * 0.9)
    sums = np.concatenate([[0], np.cumsum(counts)])
    around = (sums[near[0]] - sums[near[1]] - counts) / np.maximum(1, np.floor(length * 0.2))
    stands_out = (length >= _PILED) & (counts >= _LEAST_PILED) & (counts > share * total) & (counts > 10 * around)
    for place in sorted(np.flatnonzero(stands_out), key=lambda place: -counts[place])[:_PILES]:
        characters, answers = int(length[place]), int(counts[place])
        # hashes of some of the texts: all of them may be more than memory holds
        looked_at, texts, ending, ended = one(
            connection,
            """WITH piled AS (
                SELECT hash(texts.completion) AS text, right(texts.completion, 3) AS ending
                FROM examples JOIN texts USING (vote) WHERE examples.characters = $length LIMIT $most
            )
            SELECT count(*), count(DISTINCT text), mode(ending),
                count(*) FILTER (ending = (SELECT mode(ending) FROM piled))
            FROM piled""",
            {"length": characters, "most": _LOOKED_AT},
        )
        if 2 * texts > looked_at:
            return Pile(
                characters=characters,
                answers=answers,
                share=answers / total,
                ending=ending if 2 * ended > looked_at else "",
            )
    return None


def auc(up: np.ndarray, down: np.ndarray) -> float | None:
    """Chance that one of `up` has the larger value; both are counts by rising value. Mann-Whitney's U over pairs."""
    if not up.sum() or not down.sum():
        return None
    below = np.cumsum(down) - down
    return float((up * (below + down / 2)).sum() / (float(up.sum()) * float(down.sum())))


def _quantiles(length: np.ndarray, counts: np.ndarray) -> ClassLengths | None:
    if not counts.sum():
        return None
    reached = np.cumsum(counts)
    p10, p50, p90, longest = (
        int(length[np.searchsorted(reached, share * reached[-1])]) for share in (0.1, 0.5, 0.9, 1.0)
    )
    return ClassLengths(p10=p10, p50=p50, p90=p90, longest=longest)


def conflicts_of(connection: duckdb.DuckDBPyConnection, samples: int) -> Conflicts:
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE audit_conflicts AS SELECT response_key, count(*) FILTER (label) AS up, "
        "count(*) FILTER (NOT label) AS down FROM voices GROUP BY 1 HAVING up > 0 AND down > 0"
    )
    responses, votes = one(connection, "SELECT count(*), coalesce(sum(up + down), 0)::BIGINT FROM audit_conflicts")
    kept = one(
        connection, "SELECT count(*) FROM audit_conflicts WHERE response_key IN (SELECT response_key FROM examples)"
    )[0]
    return Conflicts(
        responses=responses,
        votes=votes,
        kept=kept,
        samples=_samples(connection, samples),
    )


def _samples(connection: duckdb.DuckDBPyConnection, wanted: int) -> tuple[Conflict, ...]:
    """The hardest ones: many votes, evenly split."""
    chosen = connection.execute(
        "WITH chosen AS (SELECT * FROM audit_conflicts ORDER BY least(up, down) DESC, up + down, response_key LIMIT ?) "
        "SELECT c.response_key, c.up, c.down, min(v.vote) AS vote, any_value(e.probability) AS label "
        "FROM chosen AS c JOIN votes AS v USING (response_key) LEFT JOIN examples AS e USING (response_key) "
        "GROUP BY c.response_key, c.up, c.down ORDER BY least(c.up, c.down) DESC, c.up + c.down, c.response_key",
        [wanted],
    ).fetchall()
    # one pass over the texts for all of them
    texts = {
        vote: (prompt, completion)
        for vote, prompt, completion in connection.execute(
            "SELECT vote, prompt, completion FROM texts WHERE vote IN (SELECT unnest($votes))",
            {"votes": [vote for _, _, _, vote, _ in chosen]},
        ).fetchall()
    }
    outcomes: dict[float | None, Literal["up", "down", "left out"]] = {None: "left out", 1.0: "up", 0.0: "down"}
    return tuple(
        Conflict(
            response=str(key).replace("-", ""),
            prompt=excerpt(readable(texts[vote][0]), _PROMPT),
            completion=excerpt(readable(texts[vote][1]), _ANSWER),
            votes_up=up,
            votes_down=down,
            outcome=outcomes.get(label, "both"),
        )
        for key, up, down, vote, label in chosen
    )


def readable(text: str) -> str:
    """Messages in JSON as `role: content` paragraphs; other text as it is."""
    if text[:1] != "[":
        return text
    try:
        turns = json.loads(text)
    except ValueError:
        return text
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        return text
    if len(turns) == 1 and isinstance(turns[0].get("content"), str):
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn.get('content')}" for turn in turns)

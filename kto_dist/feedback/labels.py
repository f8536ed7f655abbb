"""What the log calls feedback -> thumbs up, thumbs down, or neither.

In:  each distinct feedback of the log, as text, once.
Out: the table `words` (raw_feedback, label); null is a dead zone or a word without meaning. Pairs and rankings bring
     feedback of their own: `chosen`, `rejected`, `2 of 5`; duels `a: WORD` and `b: WORD`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import duckdb
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import DOWN, UP, plain
from kto_dist.feedback.config import LabelsConfig, MiningConfig
from kto_dist.feedback.sql import one
from kto_dist.feedback.state import place_of

_BATCH = 10_000
_LISTED = 8


class Unknown(ValueError):
    """A word of no table."""


@dataclass(slots=True)
class _Seen:
    """What stands out among the words of a log."""

    unknown: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Word -> (votes, the first one's number)."""
    scale: set[str] = field(default_factory=set)
    """Of 0 and -1, those that occur."""
    numbers: set[str] = field(default_factory=set)
    """Some that are unknown."""

    def add(self, word: str, votes: int, first: int) -> None:
        self.unknown[word] = votes, first
        if len(self.numbers) < _LISTED and _is_number(word):
            self.numbers.add(word)
        if len(self.unknown) > 1000:
            self.unknown = dict(sorted(self.unknown.items(), key=_by_votes)[:_LISTED])


def make_words(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes `words` from `parts`. Raises `UserError` that lists words of no table, if they are errors."""
    connection.execute("CREATE TABLE words (raw_feedback VARCHAR, label BOOLEAN)")
    meaning, seen = meaning_of(config), _Seen()
    counted = connection.cursor().execute(
        "SELECT raw_feedback, count(*), min(vote) FROM parts WHERE raw_feedback IS NOT NULL GROUP BY raw_feedback"
    )
    while found := counted.fetchmany(_BATCH):
        labels = []
        for word, votes, first in found:
            seen.scale |= {plain(word)} & {"0", "0.0", "-1", "-1.0"}
            try:
                labels.append(meaning(word))
            except Unknown:
                labels.append(None)
                seen.add(word, votes, first)
        batch = pa.table({"word": pa.array([word for word, *_ in found]), "label": pa.array(labels, pa.bool_())})
        connection.register("batch", batch)
        connection.execute("INSERT INTO words SELECT word, label FROM batch")
        connection.unregister("batch")
    _check(connection, config, seen)


def _check(connection: duckdb.DuckDBPyConnection, config: MiningConfig, seen: _Seen) -> None:
    if {abs(float(word)) for word in seen.scale} == {0, 1} and _zero_is_a_guess(config):
        raise UserError(
            f"columns.feedback ({config.columns.feedback}) has both 0 and -1, and 0 may mean no vote or thumbs down: "
            'give labels.neutral: ["0", "0.0"] for no vote, or labels.down: ["0", "0.0", "-1", "-1.0"] for thumbs down'
        )
    if seen.numbers and _one_is_a_guess(config):
        raise UserError(
            f"columns.feedback ({config.columns.feedback}) has numbers beyond 1, 0 and -1 "
            f"({', '.join(sorted(seen.numbers, key=float))}), so it is a rating, whose 1 would count as a thumbs up: "
            "give labels.up_from and labels.down_to, or labels.up and labels.down without the built-in numbers"
        )
    if not seen.unknown or config.labels.unknown == "ignore":
        return
    words = sorted(seen.unknown.items(), key=_by_votes)[:_LISTED]
    if config.columns.layout == "duels":
        said = dict.fromkeys(word.partition(": ")[2] for word, _ in words)
        raise UserError(
            f"columns.winner ({config.columns.winner}) has words without a meaning: "
            f"{', '.join(map(_short, said))}; add each to labels.a_wins, labels.b_wins, labels.tie, labels.both_good "
            "or labels.both_bad, or leave such duels out with labels.unknown: ignore"
        )
    places = [f"{_short(word)} ({votes:,} votes, first {_place(connection, first)})" for word, (votes, first) in words]
    raise UserError(
        f"columns.feedback ({config.columns.feedback}) has words without a meaning: {', '.join(places)}; add each to "
        "labels.up, labels.down or labels.neutral, give labels.up_from and labels.down_to for ratings, or leave "
        "such votes out with labels.unknown: ignore"
    )


def _place(connection: duckdb.DuckDBPyConnection, vote: int) -> str:
    number, position = place_of(vote)
    return f"{one(connection, 'SELECT file FROM sources WHERE number = ?', [number])[0]}:{position}"


def _zero_is_a_guess(config: MiningConfig) -> bool:
    """Whether 0 is thumbs down by the built-in list alone, which is for scales of 1 and 0, and of 1 and -1."""
    labels = config.labels
    said = {plain(word) for word in labels.neutral}
    built_in = {word for word in DOWN if plain(word) not in said}
    return "0" not in said and labels.up_from is None and set(labels.down) == built_in


def _one_is_a_guess(config: MiningConfig) -> bool:
    """Whether 1 is thumbs up by the built-in list alone, in a log of single answers."""
    labels = config.labels
    said = {plain(word) for word in labels.neutral}
    own = config.columns.layout in ("answers", "turns")
    built_in = {word for word in UP if plain(word) not in said}
    return own and labels.up_from is None and set(labels.up) == built_in


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _by_votes(item: tuple[str, tuple[int, int]]) -> tuple[int, str]:
    return -item[1][0], item[0]


def _short(word: str) -> str:
    return repr(word if len(word) <= 40 else f"{word[:37]}...")


def meaning_of(config: MiningConfig) -> Callable[[str], bool | None]:
    """A function of a feedback's text: true, false or null. It raises `Unknown`."""
    labels, layout = config.labels, config.columns.layout
    if layout == "pairs":
        return {"chosen": True, "rejected": False}.__getitem__
    if layout == "duels":
        return _duel(labels)
    if layout == "rankings":
        return lambda word: _ranked(*map(int, word.split(" of ")), halves=labels.ranked == "halves")
    table: dict[str, bool | None] = {}
    for words, label in ((labels.up, True), (labels.down, False), (labels.neutral, None)):
        table |= {plain(word): label for word in words}
    up_from, down_to = labels.up_from, labels.down_to
    if up_from is None or down_to is None:
        return lambda word: _look_up(table, word)

    def rated(word: str) -> bool | None:
        try:
            rating = float(word)
        except ValueError:
            return _look_up(table, word)
        if math.isnan(rating):
            raise Unknown(word)
        return True if rating >= up_from else False if rating <= down_to else None

    return rated


def _duel(labels: LabelsConfig) -> Callable[[str], bool | None]:
    """Of "a: WORD" and "b: WORD": what the winner's word says of that answer."""
    table: dict[str, tuple[bool | None, bool | None]] = {}
    for words, meaning in (
        (labels.a_wins, (True, False)),
        (labels.b_wins, (False, True)),
        (labels.tie, (None, None)),
        (labels.both_good, (True, True)),
        (labels.both_bad, (False, False)),
    ):
        table |= {plain(word): meaning for word in words}

    def look_up(said: str) -> bool | None:
        side, _, word = said.partition(": ")
        try:
            return table[plain(word)][side == "b"]
        except KeyError:
            raise Unknown(said) from None

    return look_up


def _look_up(table: dict[str, bool | None], word: str) -> bool | None:
    try:
        return table[plain(word)]
    except KeyError:
        raise Unknown(word) from None


def _ranked(rank: int, ranks: int, *, halves: bool) -> bool | None:
    if ranks == 1:
        return None  # nothing was better or worse than anything
    if halves:
        middle = (ranks + 1) / 2
        return None if rank == middle else rank < middle
    return True if rank == 1 else False if rank == ranks else None

"""What the name of a column of feedback, and the columns beside it, say against reading its 1 as thumbs up.

In:  the column's own name, and a row as the log has it.
Out: a `Trouble`: why 1, true and yes may not mean a good answer, or 0, false and no not a bad one; None: nothing does.

Words such as "bad" or "dislike" say by themselves what they mean: only numbers, true and yes depend on the name.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from kto_dist.base.json_pointer import opened
from kto_dist.base.vocabulary import plain

_BARE = frozenset(("true", "false", "t", "f", "yes", "no"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_POLES = {
    "up": "down", "ups": "downs", "thumbup": "thumbdown", "thumbsup": "thumbsdown",
    "upvote": "downvote", "upvotes": "downvotes", "upvoted": "downvoted",
    "like": "dislike", "likes": "dislikes", "liked": "disliked",
    "good": "bad", "positive": "negative", "helpful": "unhelpful", "correct": "incorrect",
    "accepted": "rejected", "approved": "disapproved", "satisfied": "dissatisfied",
}  # fmt: skip
_BAD = frozenset((
    *_POLES.values(),
    "error", "errors", "flag", "flagged", "hallucinated", "hallucination", "harmful", "jailbreak", "jailbreaking",
    "offensive", "rejected", "spam", "toxic", "toxicity", "unsafe", "useless", "violation", "wrong",
))  # fmt: skip
_TURNED = frozenset(("free", "no", "non", "not", "without", *_POLES))
"""Words beside which a word of `_BAD` does not say that 1 is bad: not_toxic, up_or_down."""
_RANKS = frozenset(("rank", "ranking", "ranks"))
_NUMBERS = frozenset(("choice", "id", "idx", "index", "number", "preferred", "strength", "winner"))
_FIRST = frozenset(("a", "first"))


class Trouble(NamedTuple):
    kind: Literal["sense", "rank", "opposite", "class", "status", "index"]
    why: str


def _is_bare(value: Any) -> bool:
    """Whether a value is a number, or says nothing but yes or no."""
    if isinstance(value, bool | int | float):
        return True
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return plain(value) in _BARE
    return True


def opposite_of(name: str) -> str | None:
    """thumbs_up -> thumbs_down, numLikes -> numDislikes; None for a name that is no side of two."""
    for found in _WORD.finditer(name):
        other = _POLES.get(found[0].casefold())
        if other is not None:
            other = other.upper() if found[0].isupper() else other.title() if found[0].istitle() else other
            return name[: found.start()] + other + name[found.end() :]
    return None


def beside(name: str) -> set[str]:
    """Columns that say more of a column of feedback, where a log has them."""
    other = opposite_of(name)
    return {f"{name}-metadata", f"{name}.status"} | ({other} if other else set())


def trouble(name: str, value: Any, row: Mapping[str, Any]) -> Trouble | None:
    """Of the feedback on one answer. `value`: the column's; `row`: what the column stands in."""
    states = row.get(f"{name}.status")
    if isinstance(states, list) and any(state != "submitted" for state in states):
        return Trouble("status", f"not all of its responses were submitted ({name}.status)")
    if not _is_bare(value):
        return None
    about = opened(row.get(f"{name}-metadata"))
    if isinstance(about, dict) and about.get("class-name"):
        return Trouble("class", f"it is the number of a class, and class-name in {name}-metadata has the word")
    words = {word.casefold() for word in _WORD.findall(name)}
    if words & _BAD and not words & _TURNED:
        return Trouble("sense", f"by its name {value} says how bad an answer was, and 1 and true count as a thumbs up")
    if words & _RANKS:
        return Trouble("rank", "of ranks the lowest is the best, and 1 counts as a thumbs up")
    other = opposite_of(name)
    if other is not None and row.get(other) is not None:
        return Trouble("opposite", f"{other} stands beside it, so 0 and false may mean no vote as well as thumbs down")
    return None


def trouble_of_two(name: str, value: Any) -> Trouble | None:
    """Of a label that says which of two answers is the better one: 1 the first, 0 the second."""
    words = {word.casefold() for word in _WORD.findall(name)}
    if isinstance(value, bool) or not _is_bare(value) or not words & _NUMBERS or words & _FIRST:
        return None
    return Trouble(
        "index", "by its name it numbers the answers, and here 1 says that output_A is better, 0 that output_B is"
    )

"""Votes of several kinds, of which a mapping takes all as if they were one: a score of safety is no thumb.

In:  a config, and the first rows of a file.
Out: nothing; a `UserError` that says how to choose.
"""

from collections.abc import Iterator
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import plain
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.picks import Picker
from kto_dist.feedback.pointers import Pointer, text_of

# Keys of a vote in a list, and columns of a row that is a vote, that say what it judges.
_OF_ELEMENTS = (
    "assessment_name",
    "score_name",
    "annotation_name",
    "from_name",
    "question_name",
    "metric",
    "name",
    "key",
)
_OF_ROWS = ("assessment_name", "score_name", "annotation_name", "question_name", "metric_name")
# Langfuse: of a category, `value` is a number of its own making, and this is the word.
_WORDS = ("stringValue", "string_value")
_LISTED = 8


def check_kinds(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` where the votes of the first rows are of several kinds, or their words stand beside them."""
    columns = config.columns.pointers()
    said = columns.get("feedback", ())
    if not said or config.columns.layout not in ("answers", "turns"):
        return
    picker = Picker(config)
    turns = {pointer.rest for pointer in columns.get("messages", ()) if not pointer.levels}
    if picker.chain and picker.chain[0][0] in turns:
        return  # each turn carries its own vote: what else it has a name for is its own affair
    mapped = {pointer.rest[-1] for pointers in columns.values() for pointer in pointers if pointer.rest}
    others = mapped | {*config.input.ignore}
    kinds: dict[str, dict[str, None]] = {}
    # of the lists that a vote lies in, columns.user may name a further one, which holds no votes
    depth = max(len(pointer.levels) for pointer in said)
    for holder, within in _holders(picker, rows, depth):
        word = next((name for name in _WORDS if name not in others and _is_word(holder.get(name))), None)
        if word is not None and "value" in mapped:
            raise UserError(
                f"{path}: columns.feedback ({said[0].shown}) is a number, and {word} beside it has the word "
                f"({text_of(holder[word])}): map that one, as in columns.feedback: {_beside(said[0], word)} (or "
                "name it in input.ignore)"
            )
        for name in _OF_ELEMENTS if within else _OF_ROWS:
            kind = holder.get(name)
            if name not in others and name not in config.where.conditions() and isinstance(kind, str) and kind:
                kinds.setdefault(name, {})[kind] = None
    several = next(((name, [*values]) for name, values in kinds.items() if len(values) > 1), None)
    if several is not None:
        name, values = several
        listed = ", ".join(values[:_LISTED])
        choice = f"columns.feedback: {_chosen(said[0], name, values[0])}" if depth else f"where: {{{name}: ...}}"
        raise UserError(
            f"{path}: columns.feedback ({said[0].shown}) takes votes of several kinds, by their {name} ({listed}): "
            f"choose the one that judges the answer, as in {choice} (or name {name} in input.ignore if all of them do)"
        )


def _holders(picker: Picker, rows: list[dict[str, Any]], depth: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """(what holds a vote that counts, whether that is an element of a list)"""
    for row in rows:
        if not picker.row_counts(row):
            continue
        for frame in picker.frames(row):
            vote = picker.text(row, frame, "feedback")
            within = 0 < depth <= len(frame)
            holder = frame[depth - 1][1] if within else row
            if isinstance(holder, dict) and (not frame or picker.vote_counts(row, frame)):
                if (
                    frame
                    and (vote is None or not vote.strip())
                    and not any(_is_word(holder.get(name)) for name in _WORDS)
                ):
                    continue
                yield holder, within


def _is_word(value: Any) -> bool:
    if not isinstance(value, str) or plain(value) in ("", "true", "false"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _beside(pointer: Pointer, word: str) -> str:
    return f"{pointer.shown.rsplit('/', 1)[0]}/{word}" if "/" in pointer.shown else word


def _chosen(pointer: Pointer, name: str, value: str) -> str:
    """The pointer with one more condition on its last list."""
    head, bracket, rest = pointer.shown.rpartition("]")
    start = head.rpartition("[")[2]
    own = f"{name}={value}"
    return f"{head[: len(head) - len(start)]}{own}]{rest}" if not start else f"{head}{bracket}[{own}]{rest}"

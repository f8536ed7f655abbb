"""What stands in a record beside its rows and says that they would be read wrongly.

In:  a record as the file has it and under the known names, and its layout.
Out: nothing; a `UserError` for a mapping of the whole file that cannot be right, a `BadRecord` for one record.
"""

from collections.abc import Mapping
from typing import Any

from kto_dist.base import json_pointer, label_names
from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import thumb_of
from kto_dist.data.columns import IDS, INDICES, PAIRS, SIDES, TURNS, WINNERS, Mapped, is_there
from kto_dist.data.layouts import Layout
from kto_dist.data.records import BadRecord, short

_REMEDY = (
    "write one column that is true for a good answer and false for a bad one, or mine the log "
    "(`kto-dist mine`, whose labels.up and labels.down say what words mean)"
)
_REMEDY_OF_TWO = "mine the log (`kto-dist mine`, columns.winner, with labels.a_wins and labels.b_wins)"
_VERDICTS = ("accept", "reject", "ignore")
"""What Prodigy writes into `answer`."""


def check_beside(layout: Layout, record: Mapping[str, Any], given: Mapping[str, Any], mapped: Mapped) -> None:
    """`given`: the record as the file has it."""
    own = mapped.names.get("label")
    if layout.label == "label" and own:
        _check_name(layout, record["label"], given, own)
    if layout.label is None and layout.answers == PAIRS:
        name = next((name for name in WINNERS if is_there(record.get(name))), None)
        if name is not None and record[name] != "chosen":
            raise BadRecord(
                "two winners",
                f"{name} ({short(record[name])}) stands beside chosen and rejected, and the two may say different "
                f"things: leave it out if chosen is the better one (data.columns: {{{name}: null}}), or mine the pairs "
                "(`kto-dist mine`, columns.winner)",
            )
    if layout.label is not None and "answer" not in layout.answers and record.get("answer") in _VERDICTS:
        raise BadRecord(
            "two labels",
            f"answer ({record['answer']}) is what an annotator said of {layout.label} "
            f"({short(record.get(layout.label))}): map the one that judges (data.columns: {{label: answer}}, or "
            "{answer: null})",
        )
    if layout.prompt in TURNS and not layout.answers:
        _check_last(layout.prompt, record)


def _check_name(layout: Layout, value: Any, given: Mapping[str, Any], own: str) -> None:
    path = json_pointer.keys_of(own) if own.startswith("/") and own not in given else (own,)
    for place, key in enumerate(path):
        if not key.lstrip("-").isdigit():
            continue
        listed = json_pointer.opened(json_pointer.find(given, path[:place]))
        if isinstance(listed, list) and sum(isinstance(element, dict) for element in listed) > 1:
            raise UserError(
                f"data.columns.label ({own}) takes one of {len(listed)} votes by its place, and lists have no fixed "
                "order: mine the log (`kto-dist mine`, where columns.feedback chooses by what a vote says)"
            )
    name = next((key for key in reversed(path) if not key.lstrip("-").isdigit()), own)
    around = json_pointer.find(given, path[: path.index(name)]) if name in path else given
    if layout.answers == SIDES:
        found, remedy = label_names.trouble_of_two(name, value), _REMEDY_OF_TWO
    else:
        found, remedy = label_names.trouble(name, value, around if isinstance(around, dict) else {}), _REMEDY
    if found is not None and found.kind == "opposite":
        other = label_names.opposite_of(name) or ""
        _check_one_side(name, value, other, around[other])
    elif found is not None:
        raise UserError(f"data.columns.label ({own}): {found.why}: {remedy}")


def _check_one_side(name: str, value: Any, other: str, beside: Any) -> None:
    """Of a column for thumbs up and one for thumbs down each row has to say the one or the other."""
    if thumb_of(str(value)) is not None and thumb_of(str(value)) is thumb_of(str(beside)):
        raise BadRecord(
            "no vote",
            f"{name} ({short(value)}) and {other} ({short(beside)}) say the same of both sides: leave such rows out",
        )


def _check_last(turns: str, record: Mapping[str, Any]) -> None:
    """A column that names another turn than the last one: that one was rated."""
    listed = json_pointer.opened(record.get(turns))
    if not isinstance(listed, list):
        return
    for name in (name for name in INDICES if name in record):
        value = record[name]
        if isinstance(value, int) and not isinstance(value, bool) and value not in (len(listed) - 1, len(listed), -1):
            raise BadRecord("another turn", _another(name, value, turns))
    # a list: an id may be anything
    earlier = [turn.get("id") for turn in listed[:-1] if isinstance(turn, dict)]
    for name in (name for name in IDS if isinstance(record.get(name), str) and record[name] in earlier):
        raise BadRecord("another turn", _another(name, record[name], turns))


def _another(name: str, value: Any, turns: str) -> str:
    return (
        f"{name} ({short(value)}) names another turn of {turns} than the last one, which is the one that is trained "
        f"on: cut the conversation after it, leave the column out if it says something else (data.columns: {{{name}: "
        "null}), or mine the log (`kto-dist mine`, columns.rated or columns.rated_index)"
    )

"""A mapping that can be read, and whose rows say that it would be read wrongly.

In:  a file, a config, and the file's first rows.
Out: nothing; a `UserError` that says what speaks against the mapping, and what to do.
"""

from collections.abc import Iterable
from typing import Any

from kto_dist.base import label_names
from kto_dist.base.errors import UserError
from kto_dist.base.json_pointer import MISSING, find
from kto_dist.base.vocabulary import DOWN, UP
from kto_dist.feedback.chat import Bad, Reader
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.picks import Picker
from kto_dist.feedback.pointers import Pointer

_SAY = 'say what its values mean, as in labels: {up: ["0", "false"], down: ["1", "true"]}'
_REMEDIES = {
    "sense": _SAY,
    "rank": f"map columns.responses and columns.ranks, or {_SAY}",
    "opposite": "write one column in place of the two, with up, down or nothing (or give labels.up and labels.down)",
    "class": "map that one, as in columns.feedback: /NAME-metadata/class-name",
    "status": "export records with their responses (`records.to_json`, input.preset: argilla), which say it of each",
}
_INDICES = ("index", "message_index", "message_idx", "turn_index", "turn_idx", "rated_index")
_VERDICTS = ("accept", "reject", "ignore")
"""What Prodigy writes into `answer`."""


def beside(heads: Iterable[str]) -> set[str]:
    """Columns of a table that are looked at for it."""
    return {*_INDICES, "answer"} | {name for head in heads for name in label_names.beside(head)}


def check_doubts(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` where names of columns, or what stands beside them, speak against the mapping."""
    if config.columns.layout in ("answers", "turns"):
        _check_name(path, config, rows)
        _check_verdict(path, config, rows)
    if config.columns.layout == "duels":
        _check_winner(path, config, rows)
    _check_index(path, config, rows)


def _check_name(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    labels = config.labels
    if labels.up_from is not None or {*labels.up} != {*UP} or {*labels.down} != {*DOWN}:
        return  # the config says itself what the values mean
    picker = Picker(config)
    for pointer in config.columns.pointers().get("feedback", ()):
        if pointer.head in config.input.ignore:
            continue
        name, above = _named(pointer)
        for row in rows:
            around = find(row, above) if not pointer.levels or not pointer.rest else {}
            for frame in picker.frames(row):
                value = picker.text(row, frame, "feedback")
                found = label_names.trouble(name, value, around if isinstance(around, dict) else {})
                if found is not None:
                    remedy = _REMEDIES[found.kind].replace("NAME", name)
                    raise UserError(f"{path}: columns.feedback ({pointer.shown}): {found.why}: {remedy}")


def _named(pointer: Pointer) -> tuple[str, tuple[str, ...]]:
    """(the key that holds the vote, or the list of votes; the keys above it)"""
    keys = pointer.rest or pointer.levels[-1][0]
    while len(keys) > 1 and keys[-1].lstrip("-").isdigit():
        keys = keys[:-1]
    return keys[-1], keys[:-1]


def _check_verdict(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    heads = {pointer.head for pointers in config.columns.pointers().values() for pointer in pointers}
    if "answer" in heads | {*config.input.ignore} or "answer" in config.where.conditions():
        return
    if rows and all(row.get("answer") in _VERDICTS for row in rows):
        raise UserError(
            f"{path}: answer ({rows[0]['answer']}) is what an annotator said of columns.feedback "
            f"({config.columns.feedback}): map columns.feedback: answer, or take the accepted ones alone "
            "(where: {answer: accept}; or name it in input.ignore)"
        )


def _check_winner(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """winner_model_a beside winner_tie: what is not won by the one need not be won by the other."""
    said = config.columns.pointers()["winner"]
    name = said[0].head
    others = {key for row in rows for key in row if key != name and key.startswith("winner")}
    others -= {*config.input.ignore, *(pointer.head for pointer in said)}
    if len(said) == 1 and name.startswith("winner_") and others:
        raise UserError(
            f"{path}: columns.winner ({name}) says of one outcome whether it came, and {', '.join(sorted(others))} of "
            "others: write one column in place of them, with model_a, model_b or tie (or name them in input.ignore)"
        )


def _check_index(path: str, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """A number beside the turns that is always that of an answer, and not always of the last one."""
    columns = config.columns
    if columns.layout != "answers" or columns.messages is None or columns.response is not None:
        return
    if columns.rated is not None or columns.rated_index is not None:
        return
    picker, reader = Picker(config), Reader.of(config)
    if picker.chain:
        return  # each turn carries its own vote
    for name in (name for name in _INDICES if name not in picker.heads | {*config.input.ignore}):
        places = []
        for row in rows:
            held, number = picker.value(row, (), "messages"), row.get(name)
            try:
                nodes = [] if held is MISSING else reader.nodes(held)
                place = int(number) if isinstance(number, int | str) and not isinstance(number, bool) else -1
            except (Bad, ValueError):
                break
            if not 0 <= place < len(nodes) or not any(turn.role == "assistant" for turn in nodes[place].turns):
                break
            places.append(place == len(nodes) - 1)
        else:
            if places and not all(places):
                raise UserError(
                    f"{path}: {name} is the number of an answer in columns.messages ({columns.messages}), and not "
                    f"always of the last one: map columns.rated_index: {name} if it says which one was rated (or name "
                    "it in input.ignore)"
                )

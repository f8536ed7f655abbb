"""What a log holds and a mapping does not use, though it looks as if it belonged: said once, with a count.

In:  rows as objects, or lines of JSON.
Out: name -> rows that have it. `input.ignore` names what is meant to be left out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kto_dist.base.json_pointer import opened
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.documents import loads

# Names of what a prompt, an answer or a vote may be, in rows of which other columns are mapped.
_PARTS = {
    "question", "query", "prompt", "input", "instruction", "context", "system", "system_prompt", "history", "messages",
    "conversation", "conversations", "chosen", "rejected", "tools", "functions", "tool_calls", "function_call",
    "images", "image", "audio", "video", "files", "attachments", "documents",
    "reasoning", "reasoning_content", "thinking",
    "feedback", "rating", "ratings", "thumb", "thumbs", "label", "vote", "votes", "score", "scores", "reaction",
    "reactions", "annotations", "assessments", "winner", "preference",
}  # fmt: skip
# Of a log with a row a turn: which turn another one answers, and its own id.
PARENTS = ("parentMessageId", "parent_message_id", "parentId", "parent_id")
IDS = ("messageId", "message_id", "id", "_id", "uuid")


class Notices:
    """Counts one file's."""

    def __init__(self, config: MiningConfig) -> None:
        pointers = config.columns.pointers().values()
        used = {pointer.head for alternatives in pointers for pointer in alternatives}
        used |= {name.lstrip("/").split("/")[0].split("[")[0] for name in config.where.conditions()}
        parents = PARENTS if config.columns.layout == "turns" else ()
        self.ignored = {*config.input.ignore}
        self.all_watched = {*_PARTS, *parents} - used - self.ignored
        ends = [f'"{name}'.encode()[-8:] for name in self.all_watched]
        self._codes = {
            length: np.array([int.from_bytes(end, "little") for end in ends if len(end) == length], np.uint64)
            for length in {*map(len, ends)}
        }
        self.counts: Counter[str] = Counter()

    def watched(self, names: Iterable[str]) -> list[str]:
        """Those of a table's columns that look as if they belonged."""
        return [name for name in names if name in self.all_watched]

    def row(self, row: Mapping[str, Any]) -> None:
        for name in row.keys() & self.all_watched:
            if not empty(row[name]):
                self.counts[name] += 1

    def more(self, found: Collection[str]) -> None:
        """What the reader of turns could not use in a row."""
        self.counts.update(name for name in found if name.split()[0] not in self.ignored)

    def lines(self, offsets: np.ndarray, whole: bytes) -> None:
        """Lines of JSON that nobody else parses: only those are looked into that may have such a name."""
        for place in {0, *np.searchsorted(offsets, self._ends(whole), side="right") - 1}:
            try:
                row = loads(whole[offsets[place] : offsets[place + 1]].decode("utf-8"))
            except ValueError:
                continue
            if isinstance(row, dict):
                self.row(row)

    def _ends(self, whole: bytes) -> np.ndarray:
        """Where keys end whose last eight bytes, the quote before them included, are those of a watched name."""
        signs = np.frombuffer(whole, np.uint8)
        colons = np.flatnonzero(signs == ord(":"))
        colons = colons[colons >= 9]  # whoever calls looks into the first line anyway
        colons = colons[signs[colons - 1] == ord('"')]
        if not len(colons):
            return colons
        words = np.ndarray((len(whole) - 7,), "<u8", whole, strides=(1,))[colons - 9]
        found = np.zeros(len(colons), bool)
        for length, codes in self._codes.items():
            found |= np.isin(words >> np.uint64(64 - 8 * length), codes)
        return colons[found]


def empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def below_json(value: Any) -> str | None:
    """Where a text of JSON that is a conversation, or an API's answer, keeps what is said; None for any other text."""
    if not isinstance(value, str):
        return None
    held = opened(value)
    if isinstance(held, list):
        return "" if held and all(_is_turn(turn) for turn in held) else None
    if not isinstance(held, dict):
        return None
    if isinstance(held.get("messages"), list) and all(_is_turn(turn) for turn in held["messages"]):
        return "/messages"
    choices = held.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict) and "message" in choices[0]:
        return "/choices/0/message/content"
    return "/content" if _is_turn(held) else None


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "message.role", "from"} & value.keys()) and len(value) > 1


def named_by(row: dict[str, Any], ids: Collection[str], beside: Collection[str]) -> str | None:
    """Pointer to a text of the row that is one of these ids, in objects under other keys than those of `beside`."""
    if not ids:
        return None
    found = (path for path, value in _texts(row, "") if value in ids)
    return next((path for path in found if path.split("/")[1] not in beside), None)


def _texts(value: dict[str, Any], path: str, depth: int = 3) -> Iterator[tuple[str, str]]:
    """(pointer, text) of the texts in objects, to a depth."""
    for key, inner in value.items():
        below = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        inner = opened(inner) if depth > 1 else inner
        if isinstance(inner, str):
            yield below, inner
        elif isinstance(inner, dict) and depth > 1:
            yield from _texts(inner, below, depth - 1)

"""Which values of a row belong to one vote: lists opened, elements chosen, `where` asked.

In:  a row as an object, and the columns and conditions of a config.
Out: the row's `Frame`s, one a vote, and what each column says in one of them.
"""

from collections.abc import Sequence
from typing import Any

from kto_dist.base.json_pointer import MISSING
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.pointers import Each, Pointer, elements, first, parse, text_of

Frame = tuple[tuple[Any, Any], ...]
"""(place, element) of each list that the vote lies in, from the row inwards."""


class Picker:
    """Picks values under one config; `seen` names the conditions of `where` that some row could meet or miss."""

    def __init__(self, config: MiningConfig) -> None:
        self.columns = config.columns.pointers()
        self.chain, self._voting = _chain(self.columns)
        self._where = [
            (name, parse(name), tuple(_as_compared(value) for value in values))
            for name, values in config.where.conditions().items()
        ]
        self.heads = {pointer.head for pointers in self.columns.values() for pointer in pointers}
        self.heads |= {pointer.head for _, pointer, _ in self._where}
        self.seen: set[str] = set()

    def frames(self, record: dict[str, Any]) -> list[Frame]:
        """One a vote; none where the list has no element that is chosen; one, empty, where votes lie in no list."""
        frames: list[Frame] = [()]
        for depth, level in enumerate(self.chain):
            deeper: list[Frame] = []
            for frame in frames:
                found = elements(frame[-1][1] if frame else record, level) if len(frame) == depth else None
                if not found and depth >= self._voting:
                    deeper.append(frame)  # a vote of nobody known
                else:
                    deeper += [(*frame, pair) for pair in found or ()]
            frames = deeper
        return frames

    def row_counts(self, record: dict[str, Any]) -> bool:
        return all(
            self._holds(name, first(record, pointer), wanted)
            for name, pointer, wanted in self._where
            if not self._of_vote(record, pointer)
        )

    def vote_counts(self, record: dict[str, Any], frame: Frame) -> bool:
        return all(
            self._holds(name, self._below(record, frame, pointer), wanted)
            for name, pointer, wanted in self._where
            if self._of_vote(record, pointer)
        )

    def _of_vote(self, record: dict[str, Any], pointer: Pointer) -> bool:
        if pointer.is_name:
            return bool(self.chain) and pointer.head not in record
        return _shared(pointer, self.chain) > 0

    def _below(self, record: dict[str, Any], frame: Frame, pointer: Pointer) -> Any:
        if not pointer.is_name:
            return self._reach(record, frame, pointer)
        within = (element for _, element in reversed(frame) if isinstance(element, dict))
        return next((element[pointer.head] for element in within if pointer.head in element), MISSING)

    def _holds(self, name: str, value: Any, wanted: tuple[Any, ...]) -> bool:
        if value is not MISSING:
            self.seen.add(f"where {name}")
        return _as_compared(None if value is MISSING else value) in wanted

    def _reach(self, record: dict[str, Any], frame: Frame | None, pointer: Pointer) -> Any:
        shared = min(_shared(pointer, self.chain), len(frame or ()))
        base = frame[shared - 1][1] if frame and shared else record
        return first(base, pointer, shared)

    def value(self, record: dict[str, Any], frame: Frame | None, name: str) -> Any:
        """Of several names the first with something in it; else what the first that is there has."""
        pointers = self.columns.get(name, ())
        found = MISSING
        for pointer in pointers:
            value = self._reach(record, frame, pointer)
            if value is not MISSING and len(pointers) == 1:
                return value
            if value is not MISSING and value is not None and (not isinstance(value, str) or value.strip()):
                return value
            found = value if found is MISSING else found
        return found

    def text(self, record: dict[str, Any], frame: Frame | None, name: str) -> str | None:
        return text_of(self.value(record, frame, name))


def _chain(columns: dict[str, tuple[Pointer, ...]]) -> tuple[tuple[tuple[tuple[str, ...], Each], ...], int]:
    """The lists that a vote lies in, from the row inwards, and how many of them hold votes: of the others, users."""
    voting = columns.get("feedback", columns.get("winner", ()))
    chain = next((pointer.levels for pointer in voting if pointer.levels), ())
    for pointer in columns.get("user", ()):
        if len(pointer.levels) > len(chain) and _shared(pointer, chain) == len(chain):
            return (*chain, *pointer.levels[len(chain) :]), len(chain)
    return chain, len(chain)


def _shared(pointer: Pointer, chain: Sequence[tuple[tuple[str, ...], Each]]) -> int:
    """Of how many lists the pointer takes the vote's own element."""
    shared = 0
    for (path, each), (its_path, its_each) in zip(pointer.levels, chain, strict=False):
        if path != its_path or each.wanted not in ((), its_each.wanted):
            break
        shared += 1
    return shared


def _as_compared(value: Any) -> Any:
    """Equal for 1, 1.0 and "1", and for true and "true"."""
    text = text_of(value)
    if isinstance(value, bool) or text is None:
        return text
    try:
        return float(text)
    except ValueError:
        return text

"""Where a value lies in a row: a name, or a pointer that may choose among the elements of a list.

    feedback                             the key, whatever is in it
    /request/messages                    a JSON pointer (RFC 6901): ~1 is a slash, ~0 a tilde; a number counts from 0
    /choices/-1/text                     and a negative one from the end
    /scores[name=user-feedback]/value    of a list of objects, those with this value; several brackets must all hold
    /spans[source/type=HUMAN]/id         a condition may look deeper
    /messages[]/rating                   every element; of an object, every value

A text on the way that holds JSON is read as what it holds: exports put whole documents into a cell.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kto_dist.base.json_pointer import MISSING, find, opened, unescaped

_BRACKETS = re.compile(r"""\[([^\[\]"']*(?:"[^"]*"[^\[\]"']*|'[^']*'[^\[\]"']*)*)\]""")


@dataclass(frozen=True, slots=True)
class Each:
    """The elements of a list whose values are as said."""

    wanted: tuple[tuple[tuple[str, ...], str], ...]
    """(path within the element, value as text); empty: every element."""

    def holds(self, element: Any) -> bool:
        return all(text_of(find(element, path)) == value for path, value in self.wanted)


Step = str | Each
Path = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Pointer:
    """A parsed name or pointer, cut at its lists."""

    shown: str
    """As the user wrote it."""
    levels: tuple[tuple[tuple[str, ...], Each], ...]
    """(keys from the last element on to a list, which of its elements)."""
    rest: tuple[str, ...]
    """Keys from the last element, or from the row, to the value."""

    @property
    def head(self) -> str:
        """The row's own key."""
        return (self.levels[0][0] if self.levels else self.rest)[0]

    @property
    def is_name(self) -> bool:
        return not self.levels and len(self.rest) == 1


def parse(text: str) -> Pointer:
    """Raises `ValueError` for brackets that do not close or say nothing."""
    if not text.startswith("/"):
        return Pointer(text, (), (text,))
    levels: list[tuple[tuple[str, ...], Each]] = []
    keys: list[str] = []
    for part in _parts(text[1:]):
        key, *brackets = _cut_brackets(text, part)
        keys.append(unescaped(key))
        if brackets:
            wanted = [condition for bracket in brackets for condition in _conditions(text, bracket)]
            levels.append((tuple(keys), Each(tuple(wanted))))
            keys = []
    return Pointer(text, tuple(levels), tuple(keys))


def _parts(text: str) -> Iterator[str]:
    """Cut at slashes outside of brackets."""
    start = depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "[") - (sign == "]" and depth > 0)
        if sign == "/" and not depth:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _cut_brackets(text: str, part: str) -> list[str]:
    """[key, what stands in each bracket behind it]; a key may hold brackets that choose nothing, as in a[1]."""
    found = list(_BRACKETS.finditer(part))
    tail = [match for match in found if match[1] in ("", "*") or "=" in match[1]]
    if not tail:
        if part.count("[") > part.count("]") and "=" in part:
            raise ValueError(f"{text}: a bracket is not closed")
        return [part]
    start = tail[0].start()
    if part[start:] != "".join(match[0] for match in tail):
        raise ValueError(f"{text}: brackets end a step, as in /scores[name=user-feedback]/value")
    return [part[:start], *(match[1] for match in tail)]


def _conditions(text: str, bracket: str) -> Iterator[tuple[tuple[str, ...], str]]:
    if bracket in ("", "*"):
        return
    path, _, value = bracket.partition("=")
    keys = tuple(key for key in path.strip().strip("/").split("/") if key)
    if not keys:
        raise ValueError(f"{text}: a condition names a key, as in [name=user-feedback]")
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    yield keys, value


def elements(value: Any, level: tuple[tuple[str, ...], Each]) -> list[tuple[Any, Any]] | None:
    """(key or place, element) of the list below `value` that are wanted; None: there is no list."""
    path, each = level
    found = opened(find(value, path))
    if isinstance(found, list):
        pairs: list[tuple[Any, Any]] = list(enumerate(found))
    elif isinstance(found, dict):
        pairs = list(found.items())
    else:
        return None
    return [(key, element) for key, element in pairs if each.holds(element)]


def first(value: Any, pointer: Pointer, level: int = 0) -> Any:
    """The first value that the pointer reaches from its list number `level` on, or MISSING."""
    if level == len(pointer.levels):
        return find(value, pointer.rest)
    for _, element in elements(value, pointer.levels[level]) or ():
        reached = first(element, pointer, level + 1)
        if reached is not MISSING:
            return reached
    return MISSING


def text_of(value: Any) -> str | None:
    """A value as a log's text: null and what is missing have none; objects and lists are JSON."""
    if isinstance(value, str):
        return value
    if value is None or value is MISSING:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)

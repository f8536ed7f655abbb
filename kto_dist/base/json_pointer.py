"""Where a value lies within another: a JSON pointer (RFC 6901), somewhat widened.

    /request/messages       ~1 is a slash, ~0 a tilde; a number counts list elements from 0
    /choices/-1/text        and a negative one from the end

A text on the way that holds JSON is read as what it holds: exports put whole documents into a cell.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

# What is not there, in contrast to null.
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing", "__bool__": lambda self: False})()

_INDEX = re.compile(r"-?\d+")


def unescaped(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


def keys_of(pointer: str) -> tuple[str, ...]:
    """Of a pointer, which starts with a slash."""
    return tuple(map(unescaped, pointer[1:].split("/")))


def opened(value: Any) -> Any:
    """What a text of JSON holds, where it holds a list or an object; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def find(value: Any, path: Sequence[str]) -> Any:
    """The value below `value`, or MISSING."""
    for key in path:
        if isinstance(value, str):
            value = opened(value)
        if isinstance(value, dict):
            if key not in value:
                return MISSING
            value = value[key]
        elif isinstance(value, list) and _INDEX.fullmatch(key):
            place = int(key) if len(key) < 10 else len(value)
            if not -len(value) <= place < len(value):
                return MISSING
            value = value[place]
        else:
            return MISSING
    return value

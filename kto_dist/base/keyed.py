"""What was made once, in a file by key: a line of JSON each, added and never changed.

In:  a path. Out: what this process or an earlier one has added. A line that a crash cut short counts as not there, and
whoever wants its value makes it again. Several processes may add to one file: each sees what was there when it came.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Keyed:
    """Key -> fields, of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                entry = json.loads(line)
                self._found[entry.pop("key")] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def get(self, key: str) -> dict[str, Any] | None:
        return self._found.get(key)

    def add(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises `OSError`."""
        if not values:
            return
        self._found |= {key: dict(fields) for key, fields in values.items()}
        lines = [json.dumps({"key": key, **fields}) + "\n" for key, fields in values.items()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            # what a crash has left without an end must not swallow the first of these
            start = b"\n" if _is_cut(self._path) else b""
            file.write(start + "".join(lines).encode())


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"

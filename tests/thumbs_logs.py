"""Logs of thumbs as files, and the rows that they hold."""

import json
from pathlib import Path
from typing import Literal

from kto_dist.data.formats import BadRows, Row, read_rows
from kto_dist.data.sources import find_sources

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
WORSE = {"role": "assistant", "content": "what"}
GOOD = {"prompt": "hi", "completion": "hello", "label": True}


def write(path: Path, *records: object) -> str:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(
    *paths: object,
    on_bad_row: Literal["error", "skip"] = "error",
    bad: BadRows | None = None,
    columns: dict[str, str | None] | None = None,
    soft: bool = False,
) -> list[Row]:
    sources = find_sources([str(path) for path in paths])
    bad = BadRows() if bad is None else bad
    return list(read_rows(sources, on_bad_row=on_bad_row, bad=bad, columns=columns, soft=soft))


def content(rows: list[Row]) -> list[tuple]:
    return [(row.prompt, row.completion, row.desirable, row.weight) for row in rows]


TEXT_ROW = ("hi", "hello", True, 1.0)
CHAT_ROW = ((USER,), (ANSWER,), True, 1.0)

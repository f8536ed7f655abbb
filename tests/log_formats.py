"""A log in every format that mining reads, and conversations to put into it."""

import csv
import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from mining import got, write_log

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
NEXT, LATER = {"role": "user", "content": "more"}, {"role": "assistant", "content": "later"}
TALK = (("user", "hi"), ("assistant", "hello"), ("user", "more"))
CHAT = {"messages": "c", "feedback": "f"}


def with_json(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lists and objects as text, for formats whose cells hold none."""
    return [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]


def as_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", **options: Any) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(with_json(rows))
    return path


def as_sqlite(path: Path, rows: list[dict[str, Any]], table: str = "log") -> Path:
    """The table, made anew; others in the file stay."""
    names, table = list(rows[0]), table.replace('"', '""')
    with sqlite3.connect(path) as database:
        database.execute(f'drop table if exists "{table}"')
        database.execute(f'create table "{table}" ({", ".join(names)})')
        cells = [tuple(row.values()) for row in with_json(rows)]
        database.executemany(f'insert into "{table}" values ({", ".join("?" * len(names))})', cells)
    database.close()
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_text_in_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    return as_parquet(path, with_json(rows))


def as_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A document in which the rows lie under /all/them."""
    path.write_text(json.dumps({"about": {"rows": [1]}, "all": {"them": rows}, "end": []}, indent=2))
    return path


FORMATS = {
    "jsonl": write_log,
    "csv": as_csv,
    "db": as_sqlite,
    "parquet": as_parquet,
    "text.parquet": as_text_in_parquet,
    "json": as_json,
}


def in_every_format(
    folder: Path, rows: list[dict[str, Any]], columns: dict[str, Any], expected: list[tuple[Any, ...]], **sections: Any
) -> None:
    for ending, write in FORMATS.items():
        path = write(folder / f"log.{ending}", rows)
        more = {"input__rows": "/all/them"} if ending == "json" else {}
        assert got(folder, path, columns, **sections, **more) == sorted(expected, key=repr), ending

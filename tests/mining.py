"""Small logs, mined: what the tests of `kto_dist.feedback` start from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from kto_dist.base.config import build
from kto_dist.base.errors import UserError
from kto_dist.feedback import MiningConfig, pipeline

COLUMNS = {"prompt": "q", "response": "a", "feedback": "f"}
MORE = COLUMNS | {"user": "u", "time": "t", "model": "m"}


def vote(q: str = "why?", a: str = "because", f: Any = "up", **more: Any) -> dict[str, Any]:
    """A row under COLUMNS, and with u, t and m under MORE."""
    return {"q": q, "a": a, "f": f, **more}


def write_log(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    """Lines of JSON; text and bytes are written as they are."""
    with path.open("wb") as file:
        for row in rows:
            line = row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False)
            file.write((line if isinstance(line, bytes) else line.encode(encoding)) + "\n".encode(encoding))
    return path


def config_of(folder: Path, files: Any, columns: dict[str, str] | None = None, **sections: Any) -> MiningConfig:
    """A config whose outputs lie in `folder`; `section__key=value` sets more. Nothing is held out."""
    tree: dict[str, dict[str, Any]] = {
        "input": {"files": [str(file) for file in files] if isinstance(files, list) else str(files)},
        "columns": dict(columns or COLUMNS),
        "split": {"heldout": 0.0},
        "output": {"folder": str(folder / "mined")},
        "resources": {"work": str(folder / "work"), "memory_mebibytes": 512, "threads": 2},
    }
    for name, value in sections.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return build(tree, kind=MiningConfig)


@contextmanager
def mined(
    folder: Path, rows: Any, columns: dict[str, str] | None = None, **sections: Any
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The pipeline's tables for rows, or for the files that are given as paths."""
    files = rows if isinstance(rows, str | Path) else write_log(folder / "log.jsonl", rows)
    with pipeline(config_of(folder, files, columns, **sections)) as connection:
        yield connection


def rows_of(connection: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
    """(prompt, completion, label) of the dataset's rows, sorted; a prompt of one user turn as its text."""
    found = connection.execute("SELECT prompt, completion, label FROM examples JOIN texts USING (vote)").fetchall()
    return sorted(((text_of(prompt), completion, label) for prompt, completion, label in found), key=repr)


def text_of(prompt: str) -> Any:
    turns = [(turn["role"], turn["content"]) for turn in json.loads(prompt)]
    return turns[0][1] if [role for role, _ in turns] == ["user"] else tuple(turns)


def removed(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Step -> votes that it took, of steps that took some."""
    found = connection.execute("SELECT step, sum(removed) FROM steps GROUP BY step HAVING sum(removed) > 0").fetchall()
    return {step: int(votes) for step, votes in found}


def got(folder: Path, rows: Any, columns: dict[str, Any] | None = None, **sections: Any) -> list[tuple[Any, ...]]:
    """What `rows_of` tells of a log."""
    with mined(folder, rows, columns, **sections) as connection:
        return rows_of(connection)


def mistake(folder: Path, rows: Any, columns: dict[str, Any] | None = None, **sections: Any) -> str:
    """The message with which a log is refused."""
    with pytest.raises(UserError) as caught, mined(folder, rows, columns, **sections):
        pass
    return str(caught.value)


def noticed_in(folder: Path, rows: Any, columns: dict[str, Any] | None = None, **sections: Any) -> dict[str, int]:
    """What a log holds besides -> rows."""
    with mined(folder, rows, columns, **sections) as connection:
        return dict(connection.execute("SELECT name, sum(rows)::INTEGER FROM noticed GROUP BY 1").fetchall())

"""Small things for writing SQL: names and texts quoted, the one row of a query."""

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb


def quoted(name: str) -> str:
    """A name."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text."""
    return "'" + text.replace("'", "''") + "'"


def path_literal(path: str) -> str:
    """A file, for functions that would take stars and brackets for a pattern."""
    return literal("".join(f"[{sign}]" if sign in "*?[" else sign for sign in path))


def one(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """The only row of a query that always has one."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row

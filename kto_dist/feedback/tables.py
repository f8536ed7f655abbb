"""Tables of text, CSV and SQLite -> rows, one after the other.

In:  a `LogFile` and the names of the columns that are wanted.
Out: the names that there are, and rows: (position, problem, the value at fault, the wanted cells).

SQLite is read here and not by DuckDB, which would have to download an extension for it.
"""

import csv
import itertools
import sqlite3
import urllib.parse
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import InputConfig
from kto_dist.feedback.readers import lines
from kto_dist.feedback.sources import LogFile
from kto_dist.feedback.sql import quoted

TableRow = tuple[int, str | None, str | None, tuple[str | None, ...]]
_ROWS = 4096


class _CsvLines:
    """Lines for Python's csv, which asks for as many as a row's open quotes need; they can be given back.

    A line over the limit is a blank one here, so that a quote in what is left of it opens nothing.
    """

    def __init__(self, blocks: Iterator[tuple[int, Any, bytes]], limit: int) -> None:
        self._lines, self._limit = self._checked(blocks), limit
        self._given_back: list[tuple[str, str | None]] = []
        self._number = 0
        # (text, problem) of the lines since `start`
        self.taken: list[tuple[str, str | None]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._given_back.pop() if self._given_back else next(self._lines)
        self.taken.append(line)
        return line[0]

    def _checked(self, blocks: Iterator[tuple[int, Any, bytes]]) -> Generator[tuple[str, str | None], None, None]:
        for _, offsets, whole in blocks:
            for start, end in itertools.pairwise(offsets.tolist()):
                if end - start > self._limit + 1:
                    yield "\n", "too long"
                    continue
                try:
                    yield whole[start:end].decode("utf-8"), None
                except UnicodeDecodeError:
                    yield whole[start:end].decode("utf-8", "replace"), "encoding"

    def close(self) -> None:
        self._lines.close()

    def start(self) -> int:
        """A new row begins: the number of its line."""
        self._number += len(self.taken)
        self.taken.clear()
        return self._number + 1

    def give_back(self) -> None:
        """All lines of the row but its first are read again."""
        self._given_back.extend(reversed(self.taken[1:]))
        del self.taken[1:]

    def problem(self) -> str | None:
        return next((problem for _, problem in self.taken if problem), None)


class CsvRows:
    """A CSV file: the names in its first row (none of a file without any), and batches of the wanted columns.

    A row whose quotes do not close costs its first line alone: what it swallowed is read again.
    """

    def __init__(self, file: LogFile, config: InputConfig) -> None:
        self._file, self._limit = file, config.max_row_mebibytes << 20
        tabs = file.path.lower().removesuffix(".gz").endswith(".tsv") and config.delimiter == ","
        self._lines = _CsvLines(lines(file, config), self._limit)
        self._reader = csv.reader(self._lines, delimiter="\t" if tabs else config.delimiter, strict=True)
        # a module-wide limit of Python's csv; rows are bounded by it and by the number of columns
        csv.field_size_limit(max(csv.field_size_limit(), self._limit))
        try:
            self.names = next((row for row in self._reader if row), [])
        except csv.Error as error:
            raise UserError(f"{file.path}:1: the first row is no CSV: {error}; it has to name the columns") from None
        if problem := self._lines.problem():
            rule, remedy = {
                "encoding": (f"not valid in {config.encoding}", "give input.encoding (cp1252, ...)"),
                "too long": ("longer than input.max_row_mebibytes", "raise it"),
            }[problem]
            raise UserError(f"{file.path}:1: the column names are {rule}: {remedy}, or convert the file")

    def close(self) -> None:
        self._lines.close()

    def rows(self, wanted: Sequence[str]) -> Iterator[TableRow]:
        if not self.names:
            return
        places = [self.names.index(name) for name in wanted]
        nothing = (None,) * len(places)
        while True:
            start = self._lines.start()
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except csv.Error:
                self._lines.give_back()
                yield start, "no CSV", self._lines.taken[0][0], nothing
                continue
            problem = self._lines.problem()
            if not row and not problem:
                continue
            if problem:
                yield start, problem, None, nothing
            elif len(row) != len(self.names):
                # the last field shows where a row was cut, or a delimiter stands in a text
                yield start, f"{len(row)} fields in place of {len(self.names)}", row[-1], nothing
            elif sum(map(len, row)) > self._limit:
                yield start, "too long", None, nothing
            else:
                yield start, None, None, tuple(row[place] for place in places)


class SqliteRows:
    """A table or view of an SQLite file, opened read-only."""

    def __init__(self, file: LogFile, config: InputConfig) -> None:
        self._file = file
        self._database = sqlite3.connect(
            f"file:{urllib.parse.quote(file.path)}?mode=ro", uri=True, check_same_thread=False
        )  # DuckDB pulls the batches from threads of its own, one at a time
        self._database.text_factory = _sqlite_text
        self._query = config.query
        try:
            if config.query is not None:
                self._cursor = self._ask(config.query)
                self.names = [name for name, *_ in self._cursor.description or ()]
                return
            tables = [
                name
                for (name,) in self._database.execute(
                    "select name from sqlite_master where type in ('table', 'view') and name not like 'sqlite_%'"
                )
            ]
            table = _choose_table(file, config.table, tables)
            self.names = [name for (_, name, *_) in self._database.execute(f"pragma table_info({quoted(table)})")]
            self._cursor = self._database.execute(f"select {', '.join(map(quoted, self.names))} from {quoted(table)}")
        except sqlite3.Error as error:
            raise self._damage(error) from None

    def close(self) -> None:
        self._database.close()

    def _ask(self, query: str) -> sqlite3.Cursor:
        """One query that reads and does nothing else."""
        allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
        self._database.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY
        )
        try:
            cursor = self._database.execute(query)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise UserError(
                f"{self._file.path}: input.query must be one SELECT over the file's tables: {error}; correct it"
            ) from None
        if cursor.description is None:
            raise UserError(f"{self._file.path}: input.query ({query}) gives no rows: it must be one SELECT")
        return cursor

    def rows(self, wanted: Sequence[str]) -> Iterator[TableRow]:
        places = [self.names.index(name) for name in wanted]
        nothing = (None,) * len(places)
        try:
            for position, row in enumerate(self._cursor, 1):
                values = tuple(row[place] for place in places)
                bad = next((value for value in values if isinstance(value, bytes)), None)
                if bad is None:
                    yield position, None, None, tuple(v if v is None else str(v) for v in values)
                else:
                    yield position, "encoding", repr(bad[:60]), nothing
        except sqlite3.Error as error:
            raise self._damage(error) from None
        finally:
            self._database.close()

    def _damage(self, error: Exception) -> UserError:
        return UserError(f"{self._file.path} is not readable as SQLite: {error}; check the file, and input.format")


def _sqlite_text(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _choose_table(file: LogFile, wanted: str | None, tables: list[str]) -> str:
    if wanted is None and len(tables) == 1:
        return tables[0]
    if wanted not in tables:
        asked = "input.table is not given" if wanted is None else f"there is no table {wanted} (input.table)"
        raise UserError(f"{file.path}: {asked}: give one of {', '.join(tables) or 'its tables; it has none'}")
    return wanted


def table_batches(rows: Iterator[TableRow], columns: int) -> Iterator[pa.RecordBatch]:
    """Rows for DuckDB: position, problem, excerpt, and a column of text for each that is wanted."""
    while some := list(itertools.islice(rows, _ROWS)):
        position, problem, excerpt, values = zip(*some, strict=True)
        cells = zip(*values, strict=True) if columns else ()
        yield pa.record_batch(
            [
                pa.array(position, pa.uint64()),
                pa.array(problem, pa.string()),
                pa.array(excerpt, pa.string()),
                *(pa.array(cell, pa.large_string()) for cell in cells),
            ],
            schema=cells_schema(columns),
        )


def cells_schema(columns: int) -> pa.Schema:
    return pa.schema(
        [
            ("position", pa.uint64()),
            ("problem", pa.string()),
            ("excerpt", pa.string()),
            *((f"c{place}", pa.large_string()) for place in range(columns)),
        ]
    )

"""A file of the log -> Arrow batches that DuckDB turns into rows, in bounded memory.

In:  a `LogFile` and the names of the columns that are wanted.
Out: its columns' names, and batches with a position (line or row, from 1), a problem where there is no row, and

    jsonl         record, the line's text
    csv, sqlite   each wanted column as text

Parquet is not here: DuckDB reads it itself. SQLite is, because DuckDB would have to download an extension for it.
Lines are split here and not by DuckDB, because its readers either stop at a broken line or drop it uncounted, and
because a line's number has to stand in a message.
"""

import codecs
import csv
import gzip
import itertools
import json
import sqlite3
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import InputConfig
from kto_dist.feedback.sources import LogFile
from kto_dist.feedback.sql import quoted

LINES = pa.schema([("position", pa.uint64()), ("problem", pa.string()), ("record", pa.large_string())])
_BLOCK = 4 << 20
_ROWS = 4096
_PEEK = 100


# Bytes of another encoding that mean nothing there become half of a surrogate pair, which no UTF-8 has: so they are
# found where broken UTF-8 is found.
def _broken(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("kto_dist.broken", _broken)


def text_blocks(file: LogFile, encoding: str) -> Iterator[bytes]:
    """The file as blocks of what should be UTF-8, without a byte order mark. Raises `UserError`."""
    try:
        with gzip.open(file.path, "rb") if file.gzipped else open(file.path, "rb") as raw:
            head = raw.read(_BLOCK)
            name, skip = _encoding(file, head, encoding)
            blocks = itertools.chain([head[skip:]], iter(lambda: raw.read(_BLOCK), b""))
            if name == "utf-8":
                yield from blocks
                return
            decoder = codecs.getincrementaldecoder(name)(errors="kto_dist.broken")
            for block in blocks:
                yield decoder.decode(block).encode("utf-8", "surrogatepass")
            yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file.path} is damaged or not what its name says: {error}; write it again") from None


def _encoding(file: LogFile, head: bytes, encoding: str) -> tuple[str, int]:
    """Python's name of the encoding, and the length of the byte order mark."""
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    mark = next((mark for mark in marks if head.startswith(mark)), b"")
    if encoding == "auto":
        if mark:
            return marks[mark], len(mark)
        # the first character of a log is a brace, a bracket or a column's name: ASCII, whose other byte is 0
        if len(head) > 1 and (head[0] == 0) != (head[1] == 0):
            return ("utf-16-be" if head[0] == 0 else "utf-16-le"), 0
        return "utf-8", 0
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(
            f"input.encoding ({encoding}) is no encoding that is known: give auto, utf-8, utf-16, cp1252, latin-1, ..."
        ) from None
    if mark and name in ("utf-8", "utf-16", marks[mark]):
        return marks[mark], len(mark)
    return name, 0


def lines(file: LogFile, config: InputConfig) -> Iterator[tuple[int, np.ndarray, bytes]]:
    """(number of the first line, offsets, whole lines) a block; offsets[i] is where line i starts.

    A line over the limit is given as it is, cut to the limit: so it is over the limit for whoever checks.
    """
    limit = config.max_row_mebibytes << 20
    number, rest, dropping = 1, b"", False
    for block in itertools.chain(text_blocks(file, config.encoding), [None]):
        if block is None:
            block = b"\n" if rest else b""
        if dropping:
            end = block.find(b"\n")
            if end < 0:
                continue
            block, dropping = block[end:], False
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if len(rest) > limit:
            rest, dropping = rest[: limit + 1], True
        if end:
            whole = block[:end]
            ends = np.flatnonzero(np.frombuffer(whole, np.uint8) == 10).astype(np.int64) + 1
            yield number, np.concatenate([np.zeros(1, np.int64), ends]), whole
            number += len(ends)


def json_batches(file: LogFile, config: InputConfig) -> Iterator[pa.RecordBatch]:
    limit = config.max_row_mebibytes << 20
    for number, offsets, whole in lines(file, config):
        if number == 1 and whole.lstrip()[:1] == b"[":
            raise UserError(
                f"{file.path} holds one JSON array, and a log has one object a line: convert it (jq -c '.[]' "
                "FILE > FILE.jsonl)"
            )
        count = len(offsets) - 1
        position = pa.array(np.arange(number, number + count, dtype=np.uint64))
        try:
            whole.decode("utf-8")
            bad = np.diff(offsets) > limit + 1
        except UnicodeDecodeError:
            bad = np.ones(count, bool)
        if not bad.any():
            record = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(whole))
            yield pa.record_batch([position, pa.nulls(count, pa.string()), record], schema=LINES)
            continue
        problems, records = [], []
        for start, end in itertools.pairwise(offsets.tolist()):
            text, problem = _checked(whole[start:end], limit)
            problems.append(problem)
            records.append(text)
        yield pa.record_batch(
            [position, pa.array(problems, pa.string()), pa.array(records, pa.large_string())], schema=LINES
        )


def _checked(line: bytes, limit: int) -> tuple[str, str | None]:
    """A line's text (of a bad one its beginning), and its problem."""
    if len(line) > limit + 1:
        return line[:200].decode("utf-8", "replace"), "too long"
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError:
        return line[:200].decode("utf-8", "replace"), "encoding"


def json_names(file: LogFile, config: InputConfig) -> list[str]:
    """Keys of the first records that can be read."""
    names: dict[str, None] = {}
    left = _PEEK
    for _, offsets, whole in lines(file, config):
        for start, end in itertools.islice(itertools.pairwise(offsets.tolist()), left):
            left -= 1
            try:
                record = json.loads(whole[start:end])
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                names |= dict.fromkeys(record)
        if left <= 0:
            break
    return list(names)


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

    def _checked(self, blocks: Iterator[tuple[int, Any, bytes]]) -> Iterator[tuple[str, str | None]]:
        for _, offsets, whole in blocks:
            for start, end in itertools.pairwise(offsets.tolist()):
                if end - start > self._limit + 1:
                    yield "\n", "too long"
                    continue
                try:
                    yield whole[start:end].decode("utf-8"), None
                except UnicodeDecodeError:
                    yield whole[start:end].decode("utf-8", "replace"), "encoding"

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

    def batches(self, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if not self.names:
            return
        places = [self.names.index(name) for name in wanted]
        while rows := list(itertools.islice(self._rows(places), _ROWS)):
            yield _batch(rows, len(places))

    def _rows(self, places: list[int]) -> Iterator[tuple[Any, ...]]:
        nothing = (None,) * len(places)
        while True:
            start = self._lines.start()
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except csv.Error:
                self._lines.give_back()
                yield start, "no CSV", self._cut(self._lines.taken[0][0]), *nothing
                continue
            problem = self._lines.problem()
            if not row and not problem:
                continue
            quoted = self._cut(",".join(row))
            if problem:
                yield start, problem, quoted, *nothing
            elif len(row) != len(self.names):
                yield start, f"{len(row)} fields in place of {len(self.names)}", quoted, *nothing
            elif sum(map(len, row)) > self._limit:
                yield start, "too long", quoted, *nothing
            else:
                yield start, None, None, *(row[place] for place in places)

    @staticmethod
    def _cut(text: str) -> str:
        return text[:200]


class SqliteRows:
    """A table or view of an SQLite file, opened read-only."""

    def __init__(self, file: LogFile, config: InputConfig) -> None:
        self._file = file
        self._database = sqlite3.connect(
            f"file:{urllib.parse.quote(file.path)}?mode=ro", uri=True, check_same_thread=False
        )  # DuckDB pulls the batches from threads of its own, one at a time
        self._database.text_factory = _sqlite_text
        try:
            tables = [
                name
                for (name,) in self._database.execute(
                    "select name from sqlite_master where type in ('table', 'view') and name not like 'sqlite_%'"
                )
            ]
            self._table = _choose_table(file, config.table, tables)
            self.names = [name for (_, name, *_) in self._database.execute(f"pragma table_info({quoted(self._table)})")]
        except sqlite3.Error as error:
            raise self._damage(error) from None

    def batches(self, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        try:
            cells = ", ".join(map(quoted, wanted)) or "1"
            cursor = self._database.execute(f"select {cells} from {quoted(self._table)}")
            done = 0
            while found := cursor.fetchmany(_ROWS):
                rows = []
                for position, row in enumerate(found, done + 1):
                    values = row[: len(wanted)]
                    bad = next((value for value in values if isinstance(value, bytes)), None)
                    if bad is None:
                        rows.append((position, None, None, *(v if v is None else str(v) for v in values)))
                    else:
                        rows.append((position, "encoding", repr(bad[:60]), *(None for _ in values)))
                done += len(rows)
                yield _batch(rows, len(wanted))
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


def _batch(rows: list[tuple[Any, ...]], columns: int) -> pa.RecordBatch:
    position, problem, excerpt, *cells = zip(*rows, strict=True)
    return pa.record_batch(
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

"""A file of the log, whatever its format -> its rows as objects, one after the other.

In:  a `LogFile`.
Out: the names of its columns, where it has a header; and `Record`s with their places, counted from 1.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from kto_dist.base.class_labels import features_beside, namers_of
from kto_dist.base.errors import UserError
from kto_dist.feedback.config import InputConfig
from kto_dist.feedback.documents import Broken, loads
from kto_dist.feedback.documents import rows as document_rows
from kto_dist.feedback.parquet import ParquetRows, named
from kto_dist.feedback.pointers import parse
from kto_dist.feedback.readers import checked, lines, text_pieces
from kto_dist.feedback.sources import LogFile
from kto_dist.feedback.tables import CsvRows, SqliteRows

_PEEKED = 32 << 20  # characters of the first rows


@dataclass(frozen=True, slots=True)
class Record:
    position: int
    """Line, or row."""
    row: dict[str, Any] | None
    problem: str | None = None
    """A code of problems.py, where there is no row."""
    detail: str | None = None
    """What is wrong with it, or the text in which it is."""


def records(file: LogFile, config: InputConfig, wanted: Collection[str] | None = None) -> Iterator[Record]:
    """All rows; of Parquet only the columns that are `wanted`. Raises `UserError` for a file that cannot be read."""
    if file.format == "parquet":  # which knows its class labels itself
        for position, values in ParquetRows(file).rows(wanted):
            yield Record(position, values)
        return
    namers = namers_of(features_beside(file.path))
    for record in _records(file, config):
        if namers and record.row is not None:
            named(record.row, namers)
        yield record


def _records(file: LogFile, config: InputConfig) -> Iterator[Record]:
    if file.format == "jsonl":
        yield from _lines(file, config)
    elif file.format == "json":
        yield from _document(file, config)
    else:
        table = (CsvRows if file.format == "csv" else SqliteRows)(file, config)
        for position, problem, detail, cells in table.rows(table.names):
            row = None if problem else dict(zip(table.names, cells, strict=True))
            yield Record(position, row, problem, detail)


def peek(
    file: LogFile, config: InputConfig, wanted: Collection[str] | None = None, most: int = 100
) -> list[dict[str, Any]]:
    """The first rows that can be read."""
    rows: list[dict[str, Any]] = []
    size = 0
    for record in records(file, config, wanted):
        if record.row is not None:
            rows.append(record.row)
            size += len(str(record.row))
        if len(rows) == most or size > _PEEKED:
            break
    return rows


def header(file: LogFile, config: InputConfig) -> list[str] | None:
    """Names of a table's columns; None where every row has its own."""
    if file.format == "parquet":
        return ParquetRows(file).names
    if file.format in ("csv", "sqlite"):
        table = (CsvRows if file.format == "csv" else SqliteRows)(file, config)
        table.close()
        return table.names
    return None


def _lines(file: LogFile, config: InputConfig) -> Iterator[Record]:
    limit = config.max_row_mebibytes << 20
    for number, offsets, whole in lines(file, config):
        for position, (start, end) in enumerate(itertools.pairwise(offsets.tolist()), number):
            if whole[start:end].isspace():
                continue
            text, problem = checked(whole[start:end], limit)
            if problem is None:
                try:
                    row = loads(text)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield Record(position, row)
                    continue
                problem = "broken JSON"
            yield Record(position, None, problem, text)


def _document(file: LogFile, config: InputConfig) -> Iterator[Record]:
    path = () if config.rows is None else parse(config.rows).rest
    position = 0
    try:
        for row in document_rows(text_pieces(file, config), path, config.max_row_mebibytes << 20):
            position += 1
            if isinstance(row, dict):
                yield Record(position, row)
            else:
                yield Record(position, None, "no object", repr(row))
    except Broken as error:
        where = "" if config.rows is None else f" (input.rows: {config.rows})"
        raise UserError(f"{file.path}: {error}{where}; repair the document, or correct input.rows") from None

"""How one file of the log becomes votes: flat rows by DuckDB alone, all others as objects.

In:  a `LogFile` and a config.
Out: `Source`: SQL of the votes, the stream that it reads, and what was noticed on the way. A mapping that cannot be
     meant is refused before the file is read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kto_dist.base.class_labels import features_beside
from kto_dist.base.errors import UserError
from kto_dist.feedback.chat import Bad
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.doubts import check_doubts
from kto_dist.feedback.judge import Judge
from kto_dist.feedback.kinds import check_kinds
from kto_dist.feedback.mapping import json_cells, plain, plain_votes, text_cells
from kto_dist.feedback.notices import PARENTS, Notices
from kto_dist.feedback.parquet import ParquetRows
from kto_dist.feedback.problems import check_choices, check_names, check_no_json
from kto_dist.feedback.readers import LINES, json_batches
from kto_dist.feedback.records import header, peek, records
from kto_dist.feedback.sources import LogFile
from kto_dist.feedback.tables import CsvRows, SqliteRows, cells_schema, table_batches
from kto_dist.feedback.vote import FIELDS, Vote

# of a batch: whichever is reached first
_ROWS, _CHARACTERS = 2048, 8 << 20
_NUMBERS = {"position": pa.uint64(), "sub": pa.int32()}
_VOTES = pa.schema([(name, _NUMBERS.get(name, pa.large_string())) for name in ("position", *FIELDS)])


@dataclass(kw_only=True, slots=True)
class Source:
    """One file, ready to be read."""

    file: LogFile
    names: list[str]
    """Its columns, or the keys of its first rows."""
    votes: str
    """SQL of the votes."""
    flat: bool
    """Whether the rows are flat, and DuckDB reads them alone."""
    batches: pa.RecordBatchReader | None
    """What the SQL reads as `source`; None: it reads the file itself."""
    notices: Notices
    seen: Callable[[], list[str]]
    """Which conditions and kinds of turns some row had; known once all is read."""
    mistakes: list[UserError] = field(default_factory=list)
    """DuckDB turns an exception of a reader into text of its own; this is the reader's."""

    @classmethod
    def of(cls, file: LogFile, config: MiningConfig) -> "Source":
        """Raises `UserError` for a mapping that leads nowhere."""
        notices, mistakes = Notices(config), list[UserError]()
        judge = Judge(config, notices)
        columns, first = header(file, config.input), peek(file, config.input, judge.wanted)
        names = keys_of(first) if columns is None else columns
        if not first:
            _check_lines(file, config)
        check_names(file, config, names, first, has_header=columns is not None)
        check_no_json(file, config, first)
        check_choices(file, config, first)
        check_kinds(file.path, config, first)
        check_doubts(file.path, config, first)
        made = _plain(file, config, first, notices, mistakes)
        if made is not None:
            return cls(file=file, names=names, votes=made[0], flat=True, batches=made[1], notices=notices, seen=list,
                       mistakes=mistakes)  # fmt: skip
        batches = pa.RecordBatchReader.from_batches(_VOTES, _guarded(_judged(file, config, judge), mistakes))
        return cls(
            file=file,
            names=names,
            votes="SELECT * FROM source",
            flat=False,
            batches=batches,
            notices=notices,
            seen=lambda: sorted(judge.seen),
            mistakes=mistakes,
        )


def keys_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _check_lines(file: LogFile, config: MiningConfig) -> None:
    record = next(iter(records(file, config.input)), None)
    if file.format == "jsonl" and record is not None and (record.detail or "").lstrip()[:1] == "[":
        raise UserError(f"{file.path} holds a JSON array, and not one object a line: say input.format: json")


def _plain(
    file: LogFile, config: MiningConfig, first: list[dict[str, Any]], notices: Notices, mistakes: list[UserError]
) -> tuple[str, pa.RecordBatchReader | None] | None:
    """(SQL, what it reads) of a file whose rows are flat; None for any other."""
    columns = plain(config)
    if columns is not None and file.format in ("csv", "parquet", "sqlite"):
        there = header(file, config.input)
        # a preset names columns that not every export has; a file without a header has no rows
        columns = {name: column for name, column in columns.items() if column in there} if there else columns
    if columns is None or file.format == "json" or _has_more(config, first):
        return None
    if file.format != "parquet" and not features_beside(file.path).keys().isdisjoint(columns.values()):
        return None  # numbers of class labels get their names where rows are objects
    if file.format == "jsonl":
        batches = _guarded(json_batches(file, config.input, notices), mistakes)
        reader = pa.RecordBatchReader.from_batches(LINES, batches)
        return plain_votes(config, columns, json_cells(columns)), reader
    if file.format == "parquet":
        table = ParquetRows(file)
        if any(table.is_nested(column) for column in columns.values()):
            return None
        for column in columns.values():
            table.check_text(column)
        notices.counts.update(table.counts(notices.watched(table.names)))
        return plain_votes(config, columns, table.cells(columns)), None
    rows = (CsvRows if file.format == "csv" else SqliteRows)(file, config.input)
    if notices.watched(rows.names):
        return None  # counted where rows are objects
    batches = _guarded(table_batches(rows.rows(list(columns.values())), len(columns)), mistakes)
    return (
        plain_votes(config, columns, text_cells(columns)),
        pa.RecordBatchReader.from_batches(cells_schema(len(columns)), batches),
    )


def _has_more(config: MiningConfig, first: list[dict[str, Any]]) -> bool:
    """Rows of turns that call tools, or name other turns, are more than flat."""
    if config.columns.layout != "turns":
        return False
    more = {"tool_calls", "function_call", "tool_call_id", *PARENTS} - {*config.input.ignore}
    return any(not more.isdisjoint(row) for row in first)


def _guarded(batches: Iterator[pa.RecordBatch], mistakes: list[UserError]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except UserError as mistake:
        mistakes.append(mistake)
        raise


def _judged(file: LogFile, config: MiningConfig, judge: Judge) -> Iterator[pa.RecordBatch]:
    positions: list[int] = []
    votes: list[Vote] = []
    size = 0
    for record in records(file, config.input, judge.wanted):
        if record.row is None:
            found = [judge.unread(record.problem or "", record.detail)]
        else:
            try:
                found = judge.votes(record.row)
            except Bad as bad:
                found = [Vote(problem=bad.code, detail=bad.value)]
        positions += [record.position] * len(found)
        votes += found
        size += sum(vote.size() for vote in found)
        if len(votes) >= _ROWS or size > _CHARACTERS:
            yield _batch(positions, votes)
            positions, votes, size = [], [], 0
    if votes:
        yield _batch(positions, votes)


def _batch(positions: list[int], votes: list[Vote]) -> pa.RecordBatch:
    columns = [pa.array(positions, pa.uint64())]
    columns += [
        pa.array([getattr(vote, name) for vote in votes], _NUMBERS.get(name, pa.large_string())) for name in FIELDS
    ]
    return pa.record_batch(columns, schema=_VOTES)

"""One source -> raw records, each with its place.

In:  a `Source` or a `Stretch` of it, and the columns that the reader wants. Out: a stream of (place, record); the place
     is "file:line" or "file:row 12", counted from 1 at the file's start. What is no record comes as a `BadRecord`, so
     that the reader decides whether it stops the run.

Numbers of a class label (`datasets`' type) are read as the label's name, wherever they stand in a record
(base/class_labels.py).
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from kto_dist.base.class_labels import Namer, features_beside, features_in, namers_of
from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import MINED
from kto_dist.data.sources import Source
from kto_dist.data.stretches import BOM, Stretch

Record = dict[str, Any]

_BATCH = 1024
# A file's start. Another list of lists is a line of JSON lines that is no row.
_ARRAY = re.compile(rb"\s*\[\s*(\{|\]|$)")
_FIELD_BYTES = 2**31 - 1
_DELIMITERS = ",;\t|"


class BadRecord(Exception):
    """A record that cannot become rows: `reason` is the kind to count, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def short(value: Any) -> str:
    """A value as a message quotes it."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that nests too deep"
    return text if len(text) <= 80 else f"{text[:77]}..."


def loads(text: str | bytes) -> Any:
    """Of JSON. Raises `ValueError` for whatever cannot be read, also for what would be too deep or too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_records(
    source: Source, columns: Collection[str], stretch: Stretch
) -> Iterator[tuple[str, Record | BadRecord]]:
    """Records of a stretch with their places, in order. Of Parquet and datasets, only `columns` are read.

    Raises `UserError` for a damaged file.
    """
    try:
        if source.kind in ("json", "csv"):
            namers = namers_of(features_beside(source.name))
            found = _json_records(source.name, stretch) if source.kind == "json" else _csv_records(source.name)
            for where, record in found:
                yield where, record if isinstance(record, BadRecord) else _named(record, namers)
            return
        table = _Table(source, columns)
        for number, record in enumerate(table.records(stretch), 1 + table.rows_before(stretch)):
            yield source.place(number), record
    except (pa.ArrowException, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{source.name} is damaged or not what its name says: {error}; write it again") from None


def unread(source: Source, columns: Collection[str]) -> dict[str, int]:
    """Columns of a Parquet file or a dataset that `read_records` does not read -> rows that have a value there.

    Nulls are known of plain columns alone: lists and objects count with all rows.
    """
    return _Table(source, columns).unread() if source.kind in ("parquet", "dataset") else {}


def _named(record: Record, namers: Mapping[str, Namer]) -> Record | BadRecord:
    """The record with the names of its class labels in place of their numbers."""
    for name, namer in namers.items():
        if name in record:
            try:
                record[name] = namer(record[name])
            except IndexError:
                return BadRecord(
                    "unknown label", f"{name} ({short(record[name])}) is a number beyond its labels' names"
                )
    return record


class _Table:
    """A Parquet file or a dataset."""

    def __init__(self, source: Source, columns: Collection[str]) -> None:
        self._dataset = source.dataset
        if source.kind == "parquet":
            self._parquet = pyarrow.parquet.ParquetFile(source.name)
            self.names = list(self._parquet.schema_arrow.names)
            features = features_in(self._parquet.schema_arrow.metadata) or features_beside(source.name)
        else:
            self.names = list(source.dataset.column_names)
            features = source.dataset.features.to_dict()
        # Other columns (embeddings, images) may be large. With no known one, all are read, for the error to list.
        self.known = [name for name in self.names if name in columns] or self.names
        self._namers = namers_of({name: features[name] for name in self.known if name in features})

    def rows_before(self, stretch: Stretch) -> int:
        if self._dataset is not None:
            return stretch.start
        return sum(self._parquet.metadata.row_group(group).num_rows for group in range(stretch.start))

    def records(self, stretch: Stretch) -> Iterator[Record | BadRecord]:
        if self._dataset is None:
            every = range(self._parquet.metadata.num_row_groups)
            groups = None if stretch.is_whole else [*every[stretch.start : stretch.stop]]
            batches = self._parquet.iter_batches(_BATCH, row_groups=groups, columns=self.known)
        else:
            every = range(len(self._dataset))
            rows = self._dataset if stretch.is_whole else self._dataset.select(every[stretch.start : stretch.stop])
            batches = rows.select_columns(self.known).with_format("arrow").iter(_BATCH)
        for record in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
            yield _named(record, self._namers)

    def unread(self) -> dict[str, int]:
        mined = MINED if set(self.names) >= MINED else frozenset()
        others = [name for name in self.names if name not in self.known and name not in mined]
        if self._dataset is not None:
            return dict.fromkeys(others, len(self._dataset))
        about, counts = self._parquet.metadata, dict.fromkeys(others, 0)
        for number in range(about.num_row_groups):
            group = about.row_group(number)
            nulls = dict.fromkeys(others, 0)
            for place in range(group.num_columns):
                column = group.column(place)
                if column.path_in_schema in nulls and column.statistics and column.statistics.has_null_count:
                    nulls[column.path_in_schema] = column.statistics.null_count
            for name in others:
                counts[name] += group.num_rows - nulls[name]
        return {name: count for name, count in counts.items() if count}


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(file: IO[bytes], stretch: Stretch) -> Iterator[tuple[int, bytes]]:
    """Lines of a stretch, with their numbers in the file."""
    place, number = 0, 0
    while place < stretch.start and (block := file.read(min(2**20, stretch.start - place))):
        place, number = place + len(block), number + block.count(b"\n")
    while (stretch.stop is None or place < stretch.stop) and (line := file.readline()):
        place, number = place + len(line), number + 1
        yield number, line.removeprefix(BOM) if number == 1 else line


def _json_records(path: str, stretch: Stretch) -> Iterator[tuple[str, Record | BadRecord]]:
    with _opened(path) as file:
        first = stretch.start == 0  # an array is not cut
        for number, line in _lines(file, stretch):
            if not line.strip():
                continue
            if first and _ARRAY.match(line):
                yield from _json_array(path, number, line + file.read())
                return
            first = False
            try:
                record = loads(line)
            except ValueError as error:
                quoted = short(line[:200].decode(errors="replace"))
                record = BadRecord("broken JSON", f"the line {quoted} is not JSON: {error}")
            if not isinstance(record, dict | BadRecord):
                record = BadRecord("broken JSON", f"{short(record)} must be a JSON object: one object a line")
            yield f"{path}:{number}", record


def _json_array(path: str, line: int, content: bytes) -> Iterator[tuple[str, Record | BadRecord]]:
    # The whole array is in memory, since JSON gives no place to go on after a broken element.
    decoder, start_of_value = json.JSONDecoder(), re.compile(r"[^\s,]|\Z")
    try:
        text = content.decode("utf-8")
        position = text.index("[") + 1
        line += text.count("\n", 0, position)
        while True:
            found = start_of_value.search(text, position)
            start = found.start() if found else len(text)
            line += text.count("\n", position, start)
            if text[start : start + 1] == "]":
                return
            record, position = decoder.raw_decode(text, start)
            if not isinstance(record, dict):
                record = BadRecord("broken JSON", f"{short(record)} must be a JSON object")
            yield f"{path}:{line}", record
            line += text.count("\n", start, position)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(
            f"{path}:{line}: the JSON array is broken here: {problem}; write one object a line instead"
        ) from None


def _csv_records(path: str) -> Iterator[tuple[str, Record | BadRecord]]:
    csv.field_size_limit(_FIELD_BYTES)
    with _opened(path) as file:
        # a byte that is no UTF-8 becomes half of a surrogate pair, which no text may hold: its row is a bad one
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        head = next((line for line in lines if line.strip()), "")
        if not head:
            return
        delimiter = next((sign for sign in sorted(_DELIMITERS, key=lambda sign: -head.count(sign))), ",")
        reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
        header = next(reader)
        if len({*header}) < len(header):
            raise UserError(f"{path}: a column's name stands twice in {short(header)}: give each its own")
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise UserError(f"{place}: a quotation mark is not closed from here to the file's end") from None
                yield place, BadRecord("broken CSV", f"the line is not CSV: {error}")
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                problem = f"{len(fields)} fields ({short(fields)}), and the header has {len(header)}"
                yield place, BadRecord("broken CSV", problem)
                continue
            yield place, dict(zip(header, fields, strict=True))

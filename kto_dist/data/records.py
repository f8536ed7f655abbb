"""One source -> raw records, each with its place.

1. `read_blocks`    a `Source` or a `Stretch` of it, and the columns that the reader wants -> blocks of neighbours
2. `Block.records`  (place, record) of each; the place is "file:line" or "file:row 12", counted from 1 at the file's
                    start. What is no record comes as a `BadRecord`, so that the reader decides whether it stops the run

A file is read by one process, which for JSON lines, Parquet and datasets leaves the work to whoever gets the blocks:
they are lines that nobody has parsed, and columns of Arrow. The blocks of CSV and of a JSON array, which say where a
record ends only to who has read all before it, are of records.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from kto_dist.base.class_labels import Features, Namer, features_beside, features_in, namers_of
from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import MINED
from kto_dist.data.sources import Source
from kto_dist.data.stretches import BOM, Stretch

Item = TypeVar("Item")
Record = dict[str, Any]

_BLOCK_BYTES = 2**20
"""Of lines that are read at once."""
# A file's start. Another list of lists is a line of JSON lines that is no row.
_ARRAY = re.compile(rb"\s*\[\s*(\{|\]|$)")
_FIELD_BYTES = 2**31 - 1
_DELIMITERS = ",;\t|"


class BadRecord(Exception):
    """A record that cannot become rows: `reason` is the kind to count, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


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


Placed = tuple[str, Record | BadRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Neighbouring records of a file."""

    content: bytes | list[Placed]
    """Lines of JSON, whole ones; columns as a stream of Arrow's; or the records themselves."""
    first: int = 1
    """The number of the first line or row, from 1."""
    labels: Features = field(default_factory=dict)
    """Columns that hold class labels."""

    def records(self, source: Source) -> Iterator[Placed]:
        """With their places, in order. Raises `UserError` for a damaged file."""
        namers = namers_of(self.labels)
        with _whole(source.name):
            if isinstance(self.content, list):
                found = iter(self.content)
            else:
                found = (_of_lines if source.kind == "json" else _of_columns)(source, self.first, self.content)
            for where, record in found:
                yield where, record if isinstance(record, BadRecord) else _named(record, namers)


def read_blocks(source: Source, columns: Collection[str], stretch: Stretch, rows: int) -> Iterator[Block]:
    """Blocks of a stretch, in order, of at most so many rows. Of Parquet and datasets, only `columns` are read.

    Raises `UserError` for a damaged file.
    """
    with _whole(source.name):
        if source.kind == "json":
            yield from _json_blocks(source.name, stretch, rows)
        elif source.kind == "csv":
            labels = _labels_of(features_beside(source.name))
            yield from _in_blocks(_csv_records(source.name), labels, rows)
        else:
            yield from _Table(source, columns).blocks(stretch, rows)


_BROKEN = (pa.ArrowException, EOFError, zlib.error, OSError)


@contextmanager
def _whole(name: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{name} is damaged or not what its name says: {error}; write it again") from None


def _gathered(items: Iterable[Item], rows: int, size: Callable[[Item], int] = lambda item: 0) -> Iterator[list[Item]]:
    """At most so many at a time, or fewer that are large; before an error all those that came first."""
    held: list[Item] = []
    total = 0
    try:
        for item in items:
            held.append(item)
            total += size(item)
            if len(held) == rows or total >= _BLOCK_BYTES:
                yield held
                held, total = [], 0
    except (UserError, *_BROKEN):
        if held:
            yield held
        raise
    if held:
        yield held


def _labels_of(features: Features) -> Features:
    namers = namers_of(features)
    return {name: feature for name, feature in features.items() if name in namers}


def unread(source: Source, columns: Collection[str]) -> dict[str, int]:
    """Columns of a Parquet file or a dataset that `read_blocks` does not read -> rows that have a value there.

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
        self._labels = _labels_of({name: features[name] for name in self.known if name in features})

    def blocks(self, stretch: Stretch, rows: int) -> Iterator[Block]:
        first = 1 + self._rows_before(stretch)
        for batch in self._batches(stretch, rows):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write(batch)
            yield Block(content=sink.getvalue().to_pybytes(), first=first, labels=self._labels)
            first += batch.num_rows

    def _rows_before(self, stretch: Stretch) -> int:
        if self._dataset is not None:
            return stretch.start
        return sum(self._parquet.metadata.row_group(group).num_rows for group in range(stretch.start))

    def _batches(self, stretch: Stretch, rows: int) -> Iterator[pa.RecordBatch | pa.Table]:
        if self._dataset is None:
            every = range(self._parquet.metadata.num_row_groups)
            groups = None if stretch.is_whole else [*every[stretch.start : stretch.stop]]
            yield from self._parquet.iter_batches(rows, row_groups=groups, columns=self.known)
            return
        every = range(len(self._dataset))
        chosen = self._dataset if stretch.is_whole else self._dataset.select(every[stretch.start : stretch.stop])
        yield from chosen.select_columns(self.known).with_format("arrow").iter(rows)

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


def _start(file: IO[bytes], stretch: Stretch) -> int:
    """Goes to the start of the stretch; the number of its first line, from 1."""
    place, number = 0, 1
    while place < stretch.start and (block := file.read(min(2**20, stretch.start - place))):
        place, number = place + len(block), number + block.count(b"\n")
    return number


def _lines(file: IO[bytes], stretch: Stretch) -> Iterator[bytes]:
    place = stretch.start
    while (stretch.stop is None or place < stretch.stop) and (line := file.readline()):
        place += len(line)
        yield line


def _json_blocks(path: str, stretch: Stretch, rows: int) -> Iterator[Block]:
    labels = _labels_of(features_beside(path))
    with _opened(path) as file:
        number = _start(file, stretch)
        begun = stretch.start > 0  # an array is not cut
        for lines in _gathered(_lines(file, stretch), rows, len):
            if number == 1:
                lines[0] = lines[0].removeprefix(BOM)
            start = 0 if begun else next((place for place, line in enumerate(lines) if line.strip()), None)
            if start is not None:
                if not begun and _ARRAY.match(lines[start]):
                    array = _json_array(path, number + start, b"".join([*lines[start:], file.read()]))
                    yield from _in_blocks(array, labels, rows)
                    return
                begun = True
                yield Block(content=b"".join(lines), first=number, labels=labels)
            number += len(lines)


def _of_lines(source: Source, first: int, content: bytes) -> Iterator[Placed]:
    for number, line in enumerate(io.BytesIO(content), first):
        if not line.strip():
            continue
        try:
            record = loads(line)
        except ValueError as error:
            quoted = short(line[:200].decode(errors="replace"))
            record = BadRecord("broken JSON", f"the line {quoted} is not JSON: {error}")
        if not isinstance(record, dict | BadRecord):
            record = BadRecord("broken JSON", f"{short(record)} must be a JSON object: one object a line")
        yield source.place(number), record


def _of_columns(source: Source, first: int, content: bytes) -> Iterator[Placed]:
    batches = (batch.to_pylist() for batch in pa.ipc.open_stream(content))
    for number, record in enumerate(itertools.chain.from_iterable(batches), first):
        yield source.place(number), record


def _json_array(path: str, line: int, content: bytes) -> Iterator[Placed]:
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


def _in_blocks(records: Iterable[Placed], labels: Features, rows: int) -> Iterator[Block]:
    for block in _gathered(records, rows):
        yield Block(content=block, labels=labels)


def _csv_records(path: str) -> Iterator[Placed]:
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

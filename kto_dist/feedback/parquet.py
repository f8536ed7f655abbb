"""A Parquet file -> SQL cells that DuckDB reads itself, or rows as objects where a column is nested.

In:  a `LogFile`.
Out: its columns' names and types, SQL of the wanted ones, and rows.

A column of the type that `datasets` calls ClassLabel holds numbers, whose names stand in the file's metadata, or beside
it (base/class_labels.py): they are read as their names, since 0 may well be the thumbs up.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kto_dist.base.class_labels import Namer, features_beside, features_in, namers_of
from kto_dist.base.errors import UserError
from kto_dist.feedback.sources import LogFile
from kto_dist.feedback.sql import literal, path_literal, quoted

_BATCH = 1024


def parquet_rows(*paths: Path, options: str = "") -> str:
    """Parquet files in SQL; a folder above them that is called key=value is a folder, and no column."""
    listed = ", ".join(path_literal(str(path)) for path in paths)
    return f"read_parquet([{listed}], hive_partitioning = false{options})"


def named(row: dict[str, Any], namers: Mapping[str, Namer]) -> dict[str, Any]:
    """The row with the names of its class labels; a number of no name stays one: a word without a meaning."""
    for name, namer in namers.items():
        if name in row:
            with contextlib.suppress(IndexError):
                row[name] = namer(row[name])
    return row


class ParquetRows:
    """One file."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        try:
            self._parquet = pq.ParquetFile(file.path)
        except (pa.ArrowException, OSError) as error:
            raise self._damage(error) from None
        self._schema = self._parquet.schema_arrow
        self.names: list[str] = self._schema.names
        self._features = features_in(self._schema.metadata) or features_beside(file.path)
        self.labels = {
            name: feature["names"]
            for name, feature in self._features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in self.names
        }

    def _damage(self, error: Exception) -> UserError:
        return UserError(
            f"{self._file.path} is damaged or not what its name says: {error}; check the file, and input.format"
        )

    def is_nested(self, name: str) -> bool:
        return pa.types.is_nested(self._schema.field(name).type)

    def check_text(self, name: str) -> None:
        """Raises `UserError` for a column of bytes."""
        type = self._schema.field(name).type
        if pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_fixed_size_binary(type):
            raise UserError(f"{self._file.path}: column {name} holds bytes, not text: write it as a string")

    def cells(self, columns: dict[str, str]) -> str:
        """SQL of text columns, under our names for them."""
        cells = []
        for name, column in columns.items():
            value = quoted(column)
            text = f"{value}::VARCHAR"
            if column in self.labels:
                listed = ", ".join(map(literal, self.labels[column]))
                # a number of no name stays a number, which then is a word without a meaning; -1 is datasets' null
                named = f"[{listed}][{value} + 1]"
                text = f"CASE WHEN {value} BETWEEN 0 AND {len(self.labels[column]) - 1} THEN {named} "
                text += f"WHEN {value} <> -1 THEN {value}::VARCHAR END"
            cells.append(f"{text} AS v_{name}")
            cells.append(f"CASE WHEN {value} IS NULL THEN 'NULL' ELSE 'VARCHAR' END AS t_{name}")
        return f"""SELECT (file_row_number + 1)::UBIGINT AS position, NULL::VARCHAR AS problem, NULL::VARCHAR AS record,
            {", ".join(cells)} FROM {parquet_rows(Path(self._file.path), options=", file_row_number = true")}"""

    def counts(self, names: Collection[str]) -> dict[str, int]:
        """How many rows have something in these columns; one of lists counts where it is no empty list."""
        found = {}
        for name in names:
            total = 0
            for batch in self._parquet.iter_batches(_BATCH, columns=[name]):
                column = batch.column(batch.schema.get_field_index(name))
                if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                    total += sum(bool(value) for value in column.to_pylist())
                else:
                    total += len(column) - column.null_count
            if total:
                found[name] = total
        return found

    def rows(self, wanted: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) with the wanted columns."""
        names = None if wanted is None else [name for name in self.names if name in wanted]
        number, namers = 0, namers_of(self._features)
        try:
            for batch in self._parquet.iter_batches(_BATCH, columns=names):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield number, named(row, namers)
        except (pa.ArrowException, OSError) as error:
            raise self._damage(error) from None

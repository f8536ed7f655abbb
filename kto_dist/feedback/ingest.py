"""Files of the log -> parts: each file read once, mapped, checked and kept as Parquet under its content's digest.

In:  `MiningConfig` and a connection.
Out: the tables and views that the later steps start from:

    sources    number, file, format, rows, bad       the files in the order in which they were first read
    bad_rows   file, reason, rows, example           what `input.on_bad_row: skip` left out
    parts      a view of all parts' good rows, with `vote`: source, position and place in the row in one number

With `input.state`, parts stay there and later runs read new files only (state.py). Files of equal bytes that one run is
given are as many deliveries; a file of the bytes of one that an earlier run was given, and that this run is not, is
that one. A file that has grown at its end takes the place of what it was, also where a rotation has renamed it; so does
a Parquet or SQLite file that changed at all, since these are rewritten as a whole.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig, folder_of
from kto_dist.feedback.database import NO_ROOM
from kto_dist.feedback.mapping import json_cells, mapped, part_sql, text_cells
from kto_dist.feedback.problems import check_json_names, check_names, explain, instead
from kto_dist.feedback.readers import LINES, CsvRows, SqliteRows, cells_schema, json_batches, json_names
from kto_dist.feedback.sources import Digest, LogFile, digest, find_files
from kto_dist.feedback.sql import literal, one, path_literal, quoted
from kto_dist.feedback.state import (
    Part,
    grown,
    locked,
    match,
    no_room,
    part_path,
    read_manifest,
    settings_of,
    write_manifest,
)

# The manifest is written as often, and at the end: with each of many small files it would be the most that is written.
_SECONDS = 10
# bits of a vote's number: source, position, place in the row
PLACE_BITS, POSITION_BITS = 10, 34


def ingest(connection: duckdb.DuckDBPyConnection, config: MiningConfig, salt: str, folder: Path) -> None:
    """Makes `sources`, `bad_rows` and `parts`. Raises `UserError` for files that cannot be read or lead nowhere."""
    files = find_files(config.input)
    state = folder_of(config.input.state) if config.input.state else folder / "parts"
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"input.state ({state}) cannot be written: {error}; give another folder, or null") from None
    with locked(state):
        parts = _read_all(connection, config, salt, state, files)
        _check_columns(config, files, parts)
        if not any(part.rows for part in parts):
            problem = next((text for part in parts for text in part.examples.values()), "the files are empty")
            raise UserError(f"input.files: not one row could be read; {problem}")
        _make_views(connection, config, state, parts)


def _read_all(
    connection: duckdb.DuckDBPyConnection, config: MiningConfig, salt: str, state: Path, files: list[LogFile]
) -> list[Part]:
    """The parts of the state and of the files that are new to it."""
    settings = settings_of(config, salt)
    parts = read_manifest(state, settings)
    found = [(file, digest(file)) for file in files]
    held, new = match(parts, found)
    # of what earlier runs read: files of one run are as many deliveries, though one begins like another
    free = [part for part in parts if id(part) not in held]
    read, written = {part.digest: part for part in parts}, time.monotonic()
    try:
        for file, content in new:
            same = read.get(content.hex)
            if same is None:
                part = _read(connection, config, file, content, state)
            else:  # another delivery of the same bytes
                part = replace(same, path=os.path.realpath(file.path))
            read[content.hex] = part
            before = grown(free, file)
            if before is None:
                parts.append(part)
            else:
                free = [other for other in free if other is not before]
                parts = [part if other is before else other for other in parts]
            if time.monotonic() - written > _SECONDS:
                write_manifest(state, settings, parts)
                written = time.monotonic()
    finally:
        write_manifest(state, settings, parts)
    return parts


def _read(
    connection: duckdb.DuckDBPyConnection, config: MiningConfig, file: LogFile, found: Digest, state: Path
) -> Part:
    """Writes the part of one file. Raises `UserError` for a bad row, unless they are to be skipped."""
    columns = mapped(config.columns)
    temporary = state / f".{uuid.uuid4().hex}.parquet"
    mistakes: list[UserError] = []
    try:
        try:
            cells, source, names = _cells(connection, config, file, columns, mistakes)
            if source is not None:
                connection.register("source", source)
            connection.execute(
                f"COPY ({part_sql(config, cells)}) TO {literal(str(temporary))} "
                "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 16777216)"
            )
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            if any(os.strerror(number) in str(error) for number in NO_ROOM):
                raise no_room(state, error) from None
            damaged = f"{file.path} is damaged or not what its name says: {error}; check the file, and input.format"
            raise (mistakes or [UserError(damaged)])[0] from None
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.unregister("source")
        part = _describe(connection, config, file, found, temporary, names, columns)
        if part.bad and config.input.on_bad_row == "error":
            first = explain(config, file, names, *_first_problem(connection, temporary))
            raise UserError(
                f"{first} ({sum(part.bad.values()):,} rows of the file are bad; input.on_bad_row: skip counts them and "
                "goes on)"
            )
        try:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, part_path(state, found.hex))
        except OSError as error:
            raise no_room(state, error) from None
        return part
    finally:
        temporary.unlink(missing_ok=True)


def _guarded(batches: Iterator[pa.RecordBatch], mistakes: list[UserError]) -> Iterator[pa.RecordBatch]:
    """DuckDB turns an exception of a reader into text of its own: `mistakes` gets the reader's."""
    try:
        yield from batches
    except UserError as mistake:
        mistakes.append(mistake)
        raise


def _cells(
    connection: duckdb.DuckDBPyConnection,
    config: MiningConfig,
    file: LogFile,
    columns: dict[str, str],
    mistakes: list[UserError],
) -> tuple[str, pa.RecordBatchReader | None, list[str]]:
    """SQL of the cells, the stream that it reads as `source`, and the names of the file's columns."""
    if file.format == "jsonl":
        names = json_names(file, config.input)
        check_json_names(file, columns, names)
        reader = pa.RecordBatchReader.from_batches(LINES, _guarded(json_batches(file, config.input), mistakes))
        return json_cells(columns), reader, names
    if file.format == "parquet":
        return _parquet_cells(connection, file, columns)
    rows = (CsvRows if file.format == "csv" else SqliteRows)(file, config.input)
    if rows.names or file.format != "csv":  # a day without votes may leave a CSV without a header
        check_names(file, columns, rows.names)
    batches = _guarded(rows.batches(list(columns.values())), mistakes)
    return text_cells(columns), pa.RecordBatchReader.from_batches(cells_schema(len(columns)), batches), rows.names


def _parquet_cells(
    connection: duckdb.DuckDBPyConnection, file: LogFile, columns: dict[str, str]
) -> tuple[str, None, list[str]]:
    described = connection.execute(f"DESCRIBE SELECT * FROM {_rows(Path(file.path))}").fetchall()
    types = {name: type for name, type, *_ in described}
    heads = {name: column.split("/")[1] if column.startswith("/") else column for name, column in columns.items()}
    check_names(file, {name: heads[name] for name in columns}, list(types))
    cells = []
    for name, column in columns.items():
        head, type = quoted(heads[name]), types[heads[name]]
        if head[1:-1] == column and type == "BLOB":
            raise UserError(f"{file.path}: column {column} holds bytes, not text: write it as a string")
        nested = type.startswith(("STRUCT", "MAP")) or type.endswith("]")
        if column.startswith("/") or nested or type == "JSON":
            inner = (
                literal("/" + column.split("/", 2)[2]) if column.count("/") > 1 and column.startswith("/") else "'$'"
            )
            whole = f"to_json({head})" if type != "JSON" else head
            cells.append(f"CASE WHEN {head} IS NOT NULL THEN {whole}->>{inner} END AS v_{name}")
            cells.append(f"CASE WHEN {head} IS NULL THEN 'NULL' ELSE json_type({whole}, {inner}) END AS t_{name}")
        else:
            cells.append(f"{head}::VARCHAR AS v_{name}")
            cells.append(f"CASE WHEN {head} IS NULL THEN 'NULL' ELSE 'VARCHAR' END AS t_{name}")
    sql = f"""SELECT (file_row_number + 1)::UBIGINT AS position, NULL::VARCHAR AS problem, '' AS excerpt,
        {", ".join(cells)} FROM {_rows(Path(file.path), options=", file_row_number = true")}"""
    return sql, None, list(types)


def _check_columns(config: MiningConfig, files: list[LogFile], parts: list[Part]) -> None:
    """A column that is mapped and empty in all of the log is a wrong mapping."""
    seen = {name for part in parts for name in part.seen}
    for name, column in mapped(config.columns).items():
        if (
            any(part.rows for part in parts)
            and name not in seen
            and name in ("feedback", "user", "time", "model", "finish")
        ):
            names = json_names(files[0], config.input) if files[0].format == "jsonl" else []
            why = "it is there and empty" if column in names else instead(column, names)
            raise UserError(
                f"columns.{name} ({column}) has no value in any row of the log: {why}; correct the name, or leave the "
                "setting out"
            )


def _describe(
    connection: duckdb.DuckDBPyConnection,
    config: MiningConfig,
    file: LogFile,
    found: Digest,
    path: Path,
    names: list[str],
    columns: dict[str, str],
) -> Part:
    optional = {"feedback": "raw_feedback", "user": "user_key", "time": "time", "model": "model", "finish": "finish"}
    optional = {name: column for name, column in optional.items() if name in columns}
    counts = ", ".join(f"count({column})" for column in optional.values()) or "0"
    table = _rows(path)
    rows, *present = one(connection, f"SELECT count(*) FILTER (problem IS NULL), {counts} FROM {table}")
    bad = connection.execute(
        f"SELECT problem, count(*), min(position), arg_min(excerpt, position) FROM {table} "
        "WHERE problem IS NOT NULL GROUP BY problem ORDER BY min(position)"
    ).fetchall()
    return Part(
        digest=found.hex,
        path=os.path.realpath(file.path),
        format=file.format,
        bytes=found.bytes,
        rows=rows,
        bad={problem: count for problem, count, *_ in bad},
        examples={
            problem: explain(config, file, names, problem, position, excerpt) for problem, _, position, excerpt in bad
        },
        seen=[name for name, count in zip(optional, present, strict=False) if count],
    )


def _rows(*paths: Path, options: str = "") -> str:
    """Parquet files in SQL; a folder above them that is called key=value is a folder, and no column."""
    listed = ", ".join(path_literal(str(path)) for path in paths)
    return f"read_parquet([{listed}], hive_partitioning = false{options})"


def _first_problem(connection: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, int, str]:
    return one(
        connection,
        f"SELECT problem, position, excerpt FROM {_rows(path)} WHERE problem IS NOT NULL ORDER BY position LIMIT 1",
    )


def _make_views(connection: duckdb.DuckDBPyConnection, config: MiningConfig, state: Path, parts: list[Part]) -> None:
    connection.execute(
        "CREATE TABLE sources (number UBIGINT, file VARCHAR, format VARCHAR, rows UBIGINT, bad UBIGINT, part VARCHAR)"
    )
    connection.execute("CREATE TABLE bad_rows (file VARCHAR, reason VARCHAR, rows UBIGINT, example VARCHAR)")
    for number, part in enumerate(parts):
        path = str(part_path(state, part.digest))
        row = [number, part.path, part.format, part.rows, sum(part.bad.values()), path]
        connection.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?)", row)
        for reason, count in part.bad.items():
            connection.execute(
                "INSERT INTO bad_rows VALUES (?, ?, ?, ?)", [part.path, reason, count, part.examples[reason]]
            )
    paths = dict.fromkeys(part_path(state, part.digest) for part in parts)  # several deliveries may share one
    rows = _rows(*paths, options=", filename = true")
    vote = f"(number << {POSITION_BITS + PLACE_BITS}) | (position << {PLACE_BITS}) | sub::UBIGINT"
    connection.execute(
        f"""CREATE VIEW parts AS SELECT {vote} AS vote, number AS source, rows.* EXCLUDE (filename, problem, excerpt)
        FROM {rows} AS rows JOIN sources ON rows.filename = sources.part
        WHERE problem IS NULL"""
    )

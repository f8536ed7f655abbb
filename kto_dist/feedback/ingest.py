"""Files of the log -> parts: each file read once, mapped, checked and kept as Parquet under its content's digest.

In:  `MiningConfig` and a connection.
Out: the tables and views that the later steps start from:

    sources    number, file, format, rows, bad       the files in the order in which they were first read
    bad_rows   file, reason, rows, example           what `input.on_bad_row: skip` left out
    noticed    name, rows                            what the rows hold besides, and looks as if it belonged
    seen       name                                  which columns had a value; tool_calls: some turn called tools
    bad_turns  of logs with a row a turn: those that could not be read, as far as they say where they belong
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
from dataclasses import replace
from pathlib import Path

import duckdb

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig, folder_of
from kto_dist.feedback.database import NO_ROOM
from kto_dist.feedback.mapping import part_sql
from kto_dist.feedback.parquet import parquet_rows
from kto_dist.feedback.problems import explain, forgiven, instead
from kto_dist.feedback.records import header, peek
from kto_dist.feedback.source import Source, keys_of
from kto_dist.feedback.sources import Digest, LogFile, digest, find_files
from kto_dist.feedback.sql import literal, one
from kto_dist.feedback.state import (
    VOTE,
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
# columns that may be empty in some rows and not in all -> where a part has them
_OPTIONAL = {"feedback": "raw_feedback", "user": "user_key", "time": "time", "model": "model", "finish": "finish",
             "winner": "raw_feedback"}  # fmt: skip


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
            raise UserError(_nothing(config, parts))
        _make_views(connection, config, state, parts)


def _nothing(config: MiningConfig, parts: list[Part]) -> str:
    problem = next((text for part in parts for text in part.examples.values()), None)
    left = sum(count for part in parts for name, count in part.notices.items() if "`where`" in name)
    if problem is None and left:
        said = ", ".join(f"{name}: {value}" for name, value in config.where.model_dump(mode="json").items())
        return (
            f"where ({said}) leaves out all {left:,} rows or votes: correct it; a name is first one of the row itself"
        )
    return f"input.files: not one row could be read; {problem or 'the files are empty'}"


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
    temporary = state / f".{uuid.uuid4().hex}.parquet"
    source = Source.of(file, config)
    try:
        try:
            if source.batches is not None:
                connection.register("source", source.batches)
            connection.execute(
                f"COPY ({part_sql(config, source.votes, flat=source.flat)}) TO {literal(str(temporary))} "
                "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 16777216)"
            )
        except (duckdb.OutOfMemoryException, duckdb.ParserException, duckdb.BinderException):
            raise
        except duckdb.Error as error:
            if any(os.strerror(number) in str(error) for number in NO_ROOM):
                raise no_room(state, error) from None
            damaged = f"{file.path} is damaged or not what its name says: {error}; check the file, and input.format"
            raise (source.mistakes or [UserError(damaged)])[0] from None
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.unregister("source")
        part = _describe(connection, config, source, found, temporary)
        if part.bad and config.input.on_bad_row == "error":
            first = explain(config, file, source.names, *_first_problem(connection, temporary))
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


def _check_columns(config: MiningConfig, files: list[LogFile], parts: list[Part]) -> None:
    """A column, or a condition, that nothing in all of the log has is a wrong mapping."""
    if not any(part.rows or part.bad or part.notices for part in parts):
        return
    seen = {name for part in parts for name in part.seen}
    names = header(files[0], config.input) or keys_of(peek(files[0], config.input))
    for name, columns in config.columns.given().items():
        if name not in seen and name in {*_OPTIONAL} - forgiven(config) and any(part.rows for part in parts):
            shown = " or ".join(columns)
            why = "it is there and empty" if {*columns} & {*names} else instead(columns[0], names)
            raise UserError(
                f"columns.{name} ({shown}) has no value in any row of the log: {why}; correct the name, or leave the "
                "setting out"
            )
    for name in config.where.conditions():
        if f"where {name}" not in seen:
            raise UserError(f"where: no row of the log has {name}: {instead(name, names)}; correct the name")


def _describe(
    connection: duckdb.DuckDBPyConnection, config: MiningConfig, source: Source, found: Digest, path: Path
) -> Part:
    columns = config.columns.given()
    optional = {name: column for name, column in _OPTIONAL.items() if name in columns}
    counts = ", ".join(f"count({column})" for column in optional.values()) or "0"
    table = parquet_rows(path)
    rows, *present = one(connection, f"SELECT count(*) FILTER (problem IS NULL), {counts} FROM {table}")
    bad = connection.execute(
        "SELECT coalesce(problem, lost) AS wrong, count(*), min(position), arg_min(detail, position) "
        f"FROM {table} WHERE wrong IS NOT NULL GROUP BY wrong ORDER BY min(position)"
    ).fetchall()
    file = source.file
    return Part(
        digest=found.hex,
        path=os.path.realpath(file.path),
        format=file.format,
        bytes=found.bytes,
        rows=rows,
        bad={problem: count for problem, count, *_ in bad},
        examples={
            problem: explain(config, file, source.names, problem, position, detail)
            for problem, _, position, detail in bad
        },
        seen=[name for name, count in zip(optional, present, strict=False) if count] + source.seen(),
        notices=dict(source.notices.counts),
    )


def _first_problem(connection: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, int, str | None]:
    problem, position, detail = one(
        connection,
        f"SELECT coalesce(problem, lost) AS wrong, position, detail FROM {parquet_rows(path)} "
        "WHERE wrong IS NOT NULL ORDER BY position, sub LIMIT 1",
    )
    return problem, position, detail


def _make_views(connection: duckdb.DuckDBPyConnection, config: MiningConfig, state: Path, parts: list[Part]) -> None:
    connection.execute(
        "CREATE TABLE sources (number UBIGINT, file VARCHAR, format VARCHAR, rows UBIGINT, bad UBIGINT, part VARCHAR)"
    )
    connection.execute("CREATE TABLE bad_rows (file VARCHAR, reason VARCHAR, rows UBIGINT, example VARCHAR)")
    connection.execute("CREATE TABLE noticed (name VARCHAR, rows UBIGINT)")
    connection.execute("CREATE TABLE seen (name VARCHAR)")
    for number, part in enumerate(parts):
        path = str(part_path(state, part.digest))
        row = [number, part.path, part.format, part.rows, sum(part.bad.values()), path]
        connection.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?)", row)
        for reason, count in part.bad.items():
            connection.execute(
                "INSERT INTO bad_rows VALUES (?, ?, ?, ?)", [part.path, reason, count, part.examples[reason]]
            )
        connection.execute("INSERT INTO seen SELECT unnest(?::VARCHAR[])", [part.seen])
        for name, count in part.notices.items():
            connection.execute("INSERT INTO noticed VALUES (?, ?)", [name, count])
    paths = dict.fromkeys(part_path(state, part.digest) for part in parts)  # several deliveries may share one
    rows = parquet_rows(*paths, options=", filename = true")
    numbered = f"SELECT {VOTE} AS vote, number AS source, rows.* EXCLUDE (filename, detail)"
    joined = f"{numbered} FROM {rows} AS rows JOIN sources ON rows.filename = sources.part"
    connection.execute(f"CREATE VIEW parts AS SELECT * EXCLUDE (problem, lost) FROM ({joined}) WHERE problem IS NULL")
    if config.columns.layout == "turns":
        connection.execute(f"CREATE VIEW bad_turns AS SELECT * FROM ({joined}) WHERE problem IS NOT NULL")

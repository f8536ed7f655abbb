"""Files of the log -> parts: each file read once, mapped, checked and kept as Parquet under its content's digest.

In:  `MiningConfig` and a connection.
Out: the tables and views that the later steps start from:

    sources    number, file, format, rows, bad       the files in the order in which they were first read
    bad_rows   file, reason, rows, example           what `input.on_bad_row: skip` left out
    parts      a view of all parts' good rows, with `vote`: source, position and place in the row in one number

With `input.state`, parts stay there and later runs read new files only: a file is known by its content, wherever it
lies now and whether it is gzipped, and may be gone. Files of equal bytes that one run is given are as many deliveries;
a file of the bytes of one that an earlier run was given, and that this run is not, is that one.

A file that has grown at its end takes the place of what it was, also where a rotation has renamed it; so does a Parquet
or SQLite file that changed at all, since these are rewritten as a whole. manifest.json is written last, so a part
without an entry is no part.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.feedback.config import MiningConfig, folder_of
from kto_dist.feedback.database import NO_ROOM
from kto_dist.feedback.mapping import PROBLEMS, json_cells, mapped, part_sql, pointer, text_cells
from kto_dist.feedback.mask import mask
from kto_dist.feedback.readers import (
    LINES,
    CsvRows,
    SqliteRows,
    cells_schema,
    json_batches,
    json_names,
    literal,
    path_literal,
    quoted,
)
from kto_dist.feedback.sources import Digest, LogFile, digest, find_files

# Raise it when the same file becomes other rows, or when what a part holds changes.
_FORMAT = 3
_REWRITTEN = ("parquet", "sqlite")
# The manifest is written as often, and at the end: with each of many small files it would be the most that is written.
_SECONDS = 10
# bits of a vote's number: source, position, place in the row
PLACE_BITS, POSITION_BITS = 10, 34


@dataclass(kw_only=True, slots=True, eq=False)
class Part:
    """One file that was read."""

    digest: str
    path: str
    # where it lay when it was read, or under which name it was seen since then, whatever the working directory was
    format: str
    bytes: int
    # unpacked
    rows: int
    # good ones; a pair has two
    bad: dict[str, int] = field(default_factory=dict)
    # reason -> rows
    examples: dict[str, str] = field(default_factory=dict)
    # reason -> message about the first such row
    seen: list[str] = field(default_factory=list)
    # which of the mapped columns had a value


def ingest(connection: duckdb.DuckDBPyConnection, config: MiningConfig, salt: str, folder: Path) -> None:
    """Makes `sources`, `bad_rows` and `parts`. Raises `UserError` for files that cannot be read or lead nowhere."""
    files = find_files(config.input)
    state = folder_of(config.input.state) if config.input.state else folder / "parts"
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"input.state ({state}) cannot be written: {error}; give another folder, or null") from None
    with _locked(state):
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
    settings = _settings(config, salt)
    parts = _read_manifest(state, settings)
    found = [(file, digest(file)) for file in files]
    held, new = _match(parts, found)
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
            grown = _grown(free, file)
            if grown is None:
                parts.append(part)
            else:
                free = [other for other in free if other is not grown]
                parts = [part if other is grown else other for other in parts]
            if time.monotonic() - written > _SECONDS:
                _write_manifest(state, settings, parts)
                written = time.monotonic()
    finally:
        _write_manifest(state, settings, parts)
    return parts


def _match(parts: list[Part], found: list[tuple[LogFile, Digest]]) -> tuple[set[int], list[tuple[LogFile, Digest]]]:
    """Ids of the parts that a file still holds, and the files that no part holds, in order.

    Each part is the content of one file: a second file of the same bytes is another delivery. But a file and the same
    file gzipped, which lie side by side while a rotation goes on, are one.
    """
    held, new, seen = set(), [], set()
    free = defaultdict(list)
    for part in reversed(parts):
        free[part.digest].append(part)
    here = {_place(file.path): content.hex for file, content in found}
    for file, content in found:
        delivery = (_place(file.path), content.hex)
        if delivery in seen:
            continue
        seen.add(delivery)
        if not free[content.hex]:
            new.append((file, content))
            continue
        part = free[content.hex].pop()
        held.add(id(part))
        there = here.get(_stem(part.path))
        if there not in (None, part.digest) or not os.path.exists(part.path):
            part.path = os.path.realpath(file.path)  # it was renamed
    return held, new


def _grown(parts: list[Part], file: LogFile) -> Part | None:
    """What the file was before it grew, whether it was renamed since or not; or None."""
    path = os.path.realpath(file.path)
    here = [part for part in parts if _stem(part.path) == _stem(path)]
    if file.format in _REWRITTEN:
        return next((part for part in here if part.format == file.format), None)
    candidates = [*here, *(part for part in parts if part not in here and _may_be_rotated(part.path, path))]
    if not candidates:
        return None
    prefixes = digest(file, {part.bytes for part in candidates}).prefixes
    return next(
        (
            part
            for part in sorted(candidates, key=lambda part: (part not in here, -part.bytes))
            if (part.bytes, part.digest) in prefixes and (part in here or not _still_there(part))
        ),
        None,
    )


def _may_be_rotated(old: str, new: str) -> bool:
    """app.jsonl -> app.jsonl.1, app-20260131.jsonl.gz, archive/app.jsonl: a rotation adds to the name."""
    stem = os.path.basename(old).split(".")[0]
    return re.match(re.escape(stem) + r"[._-]", os.path.basename(new)) is not None


def _still_there(part: Part) -> bool:
    if not os.path.exists(part.path):
        return False
    file = LogFile(path=part.path, format=part.format, gzipped=part.path.lower().endswith(".gz"))
    return digest(file).hex == part.digest


def _place(path: str) -> str:
    """Where a file lies, which stays the same when a rotation gzips it."""
    return _stem(os.path.realpath(path))


def _stem(path: str) -> str:
    return path.removesuffix(".gz")


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    with (state / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"input.state ({state}) is in use by another run: wait for it, or give another folder"
            ) from None
        yield


def _settings(config: MiningConfig, salt: str) -> dict[str, Any]:
    """What decides a part's rows beside the file."""
    read = config.input.model_dump(
        mode="json", include={"format", "encoding", "delimiter", "table", "max_row_mebibytes"}
    )
    return {
        **{f"input.{name}": value for name, value in read.items()},
        **{f"columns.{name}": value for name, value in mapped(config.columns).items()},
        "clean.normalise": config.clean.normalise,
        "clean.ignore_case": config.clean.ignore_case,
        "output.form": config.output.form,
        "users.hash_ids": config.users.hash_ids,
        # slow on purpose: a guessable salt must not be guessed from here
        "users.salt": hashlib.pbkdf2_hmac("sha256", salt.encode(), b"kto_dist.feedback", 200_000).hex(),
        "the state's format": _FORMAT,
    }


def _read_manifest(state: Path, settings: dict[str, Any]) -> list[Part]:
    path = state / "manifest.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, parts = content["settings"], [Part(**entry) for entry in content["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {state}, and give all files of the log again") from None
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if differing:
        raise UserError(
            f"input.state ({state}) was read under another {', '.join(differing)}: restore the setting, or delete the "
            "folder (or give another) and all files of the log again"
        )
    for part in parts:
        if not _part_path(state, part.digest).exists():
            raise UserError(f"{state} lacks the part of {part.path}: delete the folder, and give all files again")
    return parts


def _write_manifest(state: Path, settings: dict[str, Any], parts: list[Part]) -> None:
    content = {"settings": settings, "parts": [asdict(part) for part in parts]}
    try:
        write_whole(state / "manifest.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
        kept = {_part_path(state, part.digest) for part in parts}
        for path in {*state.glob("*.parquet"), *state.glob(".*.parquet")} - kept:
            path.unlink()
    except OSError as error:
        raise _no_room(state, error) from None


def _no_room(state: Path, error: Exception) -> UserError:
    return UserError(
        f"what was read of the log cannot be written to {state}: {error}; make room, or give another folder"
    )


def _part_path(state: Path, digest: str) -> Path:
    return state / f"{digest}.parquet"


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
                raise _no_room(state, error) from None
            damaged = f"{file.path} is damaged or not what its name says: {error}; check the file, and input.format"
            raise (mistakes or [UserError(damaged)])[0] from None
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.unregister("source")
        part = _describe(connection, config, file, found, temporary, names, columns)
        if part.bad and config.input.on_bad_row == "error":
            first = _explain(config, file, names, *_first_problem(connection, temporary))
            raise UserError(
                f"{first} ({sum(part.bad.values()):,} rows of the file are bad; input.on_bad_row: skip counts them and "
                "goes on)"
            )
        try:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, _part_path(state, found.hex))
        except OSError as error:
            raise _no_room(state, error) from None
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
        _check_json_names(file, columns, names)
        reader = pa.RecordBatchReader.from_batches(LINES, _guarded(json_batches(file, config.input), mistakes))
        return json_cells(columns), reader, names
    if file.format == "parquet":
        return _parquet_cells(connection, file, columns)
    rows = (CsvRows if file.format == "csv" else SqliteRows)(file, config.input)
    if rows.names or file.format != "csv":  # a day without votes may leave a CSV without a header
        _check_names(file, columns, rows.names)
    batches = _guarded(rows.batches(list(columns.values())), mistakes)
    return text_cells(columns), pa.RecordBatchReader.from_batches(cells_schema(len(columns)), batches), rows.names


def _parquet_cells(
    connection: duckdb.DuckDBPyConnection, file: LogFile, columns: dict[str, str]
) -> tuple[str, None, list[str]]:
    described = connection.execute(f"DESCRIBE SELECT * FROM {_rows(Path(file.path))}").fetchall()
    types = {name: type for name, type, *_ in described}
    heads = {name: column.split("/")[1] if column.startswith("/") else column for name, column in columns.items()}
    _check_names(file, {name: heads[name] for name in columns}, list(types))
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


def _check_names(file: LogFile, columns: dict[str, str], names: list[str]) -> None:
    """A file with a header has each mapped column once."""
    for name, column in columns.items():
        if names.count(column) > 1:
            raise UserError(f"{file.path}: columns.{name} ({column}) stands {names.count(column)} times in its header")
        if column not in names:
            raise UserError(f"{file.path} has no column {column} (columns.{name}): {_instead(column, names)}")


# Without them, no row of JSON could become a vote: their absence from the first rows is a wrong mapping. Any other
# column may begin further down, whatever the rows have besides.
_NEEDED = ("prompt", "messages", "response", "chosen", "rejected", "responses", "session", "role", "text")


def _check_json_names(file: LogFile, columns: dict[str, str], names: list[str]) -> None:
    for name, column in columns.items():
        key = pointer(column).split("/")[1].replace("~1", "/").replace("~0", "~")
        if names and key not in names and name in _NEEDED:
            raise UserError(
                f"{file.path}: none of its first rows has a key {key} (columns.{name}): {_instead(key, names)}"
            )


def _instead(column: str, names: list[str]) -> str:
    near = difflib.get_close_matches(column.casefold(), {name.casefold(): name for name in names}, n=1, cutoff=0.5)
    exact = next((name for name in names if near and name.casefold() == near[0]), None)
    hint = f"did you mean {exact}? " if exact else ""
    return f"{hint}it has {', '.join(names) or 'none'}"


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
            why = "it is there and empty" if column in names else _instead(column, names)
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
    rows, *present = connection.execute(f"SELECT count(*) FILTER (problem IS NULL), {counts} FROM {table}").fetchone()
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
            problem: _explain(config, file, names, problem, position, excerpt) for problem, _, position, excerpt in bad
        },
        seen=[name for name, count in zip(optional, present, strict=False) if count],
    )


def _rows(*paths: Path, options: str = "") -> str:
    """Parquet files in SQL; a folder above them that is called key=value is a folder, and no column."""
    listed = ", ".join(path_literal(str(path)) for path in paths)
    return f"read_parquet([{listed}], hive_partitioning = false{options})"


def _first_problem(connection: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, int, str]:
    return connection.execute(
        f"SELECT problem, position, excerpt FROM {_rows(path)} WHERE problem IS NOT NULL ORDER BY position LIMIT 1"
    ).fetchone()


def _explain(
    config: MiningConfig, file: LogFile, names: list[str], problem: str, position: int, excerpt: str | None
) -> str:
    place = f"{file.path}:{position}" if file.format in ("jsonl", "csv") else f"{file.path}:row {position}"
    columns = mapped(config.columns)
    if problem in PROBLEMS:
        rule, remedy = PROBLEMS[problem]
    elif problem.startswith("no ") and problem[3:] in columns:
        column = columns[problem[3:]]
        rule = f"the row has no {column} (columns.{problem[3:]})"
        remedy = _instead(column, names)
    elif problem.endswith(" is no text"):
        name = problem.removesuffix(" is no text")
        rule = f"{columns[name]} (columns.{name}) must be text"
        remedy = "a list of turns belongs to columns.messages, and a pointer (/a/b) leads to text inside an object"
    else:
        rule, remedy = f"the row is broken: {problem}", "repair it, or check input.delimiter"
    if excerpt is None:
        return f"{place}: {rule}; {remedy}"
    # masked whole, so that the cut goes through no address
    shown = mask(excerpt.strip())
    shown = repr(shown if len(shown) <= 80 else f"{shown[:77]}...")
    return f"{place}: {rule}: {shown}; {remedy}"


def _make_views(connection: duckdb.DuckDBPyConnection, config: MiningConfig, state: Path, parts: list[Part]) -> None:
    connection.execute(
        "CREATE TABLE sources (number UBIGINT, file VARCHAR, format VARCHAR, rows UBIGINT, bad UBIGINT, part VARCHAR)"
    )
    connection.execute("CREATE TABLE bad_rows (file VARCHAR, reason VARCHAR, rows UBIGINT, example VARCHAR)")
    for number, part in enumerate(parts):
        path = str(_part_path(state, part.digest))
        row = [number, part.path, part.format, part.rows, sum(part.bad.values()), path]
        connection.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?)", row)
        for reason, rows in part.bad.items():
            connection.execute(
                "INSERT INTO bad_rows VALUES (?, ?, ?, ?)", [part.path, reason, rows, part.examples[reason]]
            )
    paths = dict.fromkeys(_part_path(state, part.digest) for part in parts)  # several deliveries may share one
    rows = _rows(*paths, options=", filename = true")
    vote = f"(number << {POSITION_BITS + PLACE_BITS}) | (position << {PLACE_BITS}) | sub::UBIGINT"
    connection.execute(
        f"""CREATE VIEW parts AS SELECT {vote} AS vote, number AS source, rows.* EXCLUDE (filename, problem, excerpt)
        FROM {rows} AS rows JOIN sources ON rows.filename = sources.part
        WHERE problem IS NULL"""
    )

"""Where the log lies -> its files in order, each with its format and a digest of its content.

In:  `InputConfig`.
Out: `LogFile`s. What is in them is for readers.py.
"""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kto_dist.base.class_labels import features_beside
from kto_dist.base.errors import UserError
from kto_dist.feedback.config import InputConfig

Format = Literal["jsonl", "json", "csv", "parquet", "sqlite"]

_ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
    ".db": "sqlite",
}
_TEXT: tuple[Format, ...] = ("jsonl", "json", "csv")
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """One file of the log."""

    path: str
    format: Format
    gzipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Digest:
    """What a file holds, whatever it is called."""

    hex: str
    bytes: int
    prefixes: frozenset[tuple[int, str]]
    """(length, digest) of the asked-for beginnings that are shorter than the file."""


def find_files(config: InputConfig) -> list[LogFile]:
    """The files of paths, globs and folders, in the order given; those of a glob or folder by name, each once.

    Raises `UserError` for a path that leads nowhere and for a file of unknown format.
    """
    paths = [path for pattern in config.files for path in _expand(pattern, config.format)]
    once = {os.path.realpath(path): path for path in reversed(paths)}
    return [_recognise(path, config.format) for path in reversed(list(once.values()))]


def _expand(pattern: str, format: str) -> list[str]:
    if os.path.isdir(pattern):
        files = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file() and _format_of(path.name)[0])
        if not files:
            raise UserError(f"input.files: folder {pattern} holds no file that ends with one of {', '.join(_ENDINGS)}")
        return files
    if os.path.exists(pattern):
        return [pattern]
    if glob.has_magic(pattern):
        files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not files:
            raise UserError(f"input.files: no file matches {pattern}: check it; relative ones start at {Path.cwd()}")
        return files
    raise UserError(f"input.files: {pattern} does not exist: check the path; relative ones start at {Path.cwd()}")


def _format_of(name: str) -> tuple[Format | None, bool]:
    gzipped = name.lower().endswith(".gz")
    stem = name[:-3] if gzipped else name
    return _ENDINGS.get(Path(stem).suffix.lower()), gzipped


def _recognise(path: str, wanted: Literal["auto"] | Format) -> LogFile:
    found, gzipped = _format_of(path)
    format = found if wanted == "auto" else wanted
    if format is None:
        raise UserError(
            f"input.files: the format of {path} does not show in its name: end it with one of {', '.join(_ENDINGS)}, "
            f"or say input.format ({', '.join(get_args(Format))})"
        )
    if gzipped and format not in _TEXT:
        raise UserError(f"input.files: {path}: only JSONL, JSON and CSV are read gzipped; unpack it (gunzip)")
    if format == "json" and wanted == "auto" and _has_lines(path, gzipped):
        format = "jsonl"
    return LogFile(path=path, format=format, gzipped=gzipped)


def _has_lines(path: str, gzipped: bool) -> bool:
    """Whether a .json file has an object a line, as many programs write it."""
    try:
        with gzip.open(path, "rb") if gzipped else open(path, "rb") as opened:
            start = opened.read(_BLOCK)
    except (OSError, EOFError, zlib.error):
        return False  # whoever reads it says what is wrong
    line, _, after = start.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    try:
        return isinstance(json.loads(line), dict) and bool(after.strip())
    except (ValueError, RecursionError):
        return False


def digest(file: LogFile, lengths: Collection[int] = ()) -> Digest:
    """Digest of what a file holds, and of its beginnings of the given lengths, in one pass.

    Of a gzipped file, of what was gzipped; of SQLite, also of the rows that still lie in its write-ahead log.
    """
    content, done, prefixes = hashlib.blake2b(digest_size=16), 0, set()
    if features := features_beside(file.path):  # what the numbers in the file mean stands beside it
        content.update(json.dumps(features).encode())
    ahead = sorted({length for length in lengths if length > 0})
    try:
        with gzip.open(file.path, "rb") if file.gzipped else open(file.path, "rb") as opened:
            while True:
                stop = ahead[0] - done if ahead else _BLOCK
                block = opened.read(min(stop, _BLOCK))
                content.update(block)
                done += len(block)
                if ahead and done == ahead[0]:
                    prefixes.add((ahead.pop(0), content.hexdigest()))
                    continue
                if not block:
                    break
        if file.format == "sqlite":
            with contextlib.suppress(FileNotFoundError), open(os.path.realpath(file.path) + "-wal", "rb") as opened:
                while block := opened.read(_BLOCK):
                    content.update(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file.path} is damaged or not what its name says: {error}; write it again") from None
    except OSError as error:
        raise UserError(
            f"input.files: {file.path} cannot be read: {error}; check that it is there and readable"
        ) from None
    return Digest(
        hex=content.hexdigest(),
        bytes=done,
        prefixes=frozenset((length, hexed) for length, hexed in prefixes if length < done),
    )

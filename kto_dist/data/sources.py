"""Where thumbs logs lie -> raw records, each with its place.

In:  paths of files and folders, globs, and hub names.
Out: `Source`s, and a stream of (place, record); the place is "file:line" or "file:row 12", counted from 1. A line
     that is no record comes as a `BadRecord`, so that the reader decides whether it stops the run.
"""

import glob
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from kto_dist.base.errors import UserError
from kto_dist.base.remembered import sha256_once

_JSON_NAMES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")
_BATCH = 1024


class BadRecord(Exception):
    """A record that cannot become rows: `reason` is the kind to count, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, or one split of a dataset."""

    name: str
    kind: Literal["json", "parquet", "dataset"]
    dataset: Any = None

    def digest(self) -> str:
        """Hash of the content, so that a renamed copy has the same one and an appended row another."""
        paths, part = [self.name], ""
        if self.dataset is not None:
            # A slice of a split has the files of the whole split.
            paths, part = [entry["filename"] for entry in self.dataset.cache_files], self.dataset._fingerprint
        try:
            return " ".join([self.kind, *(sha256_once(Path(path)) for path in paths), part])
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error}; check its permissions") from None


def find_sources(paths: Sequence[str]) -> list[Source]:
    """What paths, globs and hub names lead to. Raises `UserError` for one that leads nowhere."""
    return [source for path in paths for source in _find(path)]


def _find(path: str) -> list[Source]:
    here = Path(path)
    if here.is_file():
        return [_file(here)]
    if here.is_dir():
        if (here / "dataset_info.json").exists() or (here / "dataset_dict.json").exists():
            return [_saved_dataset(path, None)]
        files = sorted(file for file in here.rglob("*") if file.name.endswith((".parquet", ".jsonl", ".jsonl.gz")))
        if not files:
            raise UserError(f"folder {path} holds no .parquet, .jsonl or .jsonl.gz file and is no saved dataset")
        return [_file(file) for file in files]
    if glob.has_magic(path) and not _HUB_NAME.fullmatch(path):
        files = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
        if not files:
            raise UserError(f"no file matches {path}: check the pattern and the working directory ({Path.cwd()})")
        return [_file(file) for file in files]
    folder, colon, split = path.rpartition(":")
    if colon and (Path(folder) / "dataset_dict.json").exists():
        return [_saved_dataset(folder, split)]
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "/")) and not path.endswith((*_JSON_NAMES, ".parquet")):
        return [_hub_dataset(path)]
    raise UserError(f"{path} does not exist: check the path; relative ones start at {Path.cwd()}")


def _file(path: Path) -> Source:
    if path.name.endswith(".parquet"):
        return Source(name=str(path), kind="parquet")
    if path.name.endswith(_JSON_NAMES):
        return Source(name=str(path), kind="json")
    raise UserError(f"{path}: the type of the file must be one of {', '.join((*_JSON_NAMES, '.parquet'))}; convert it")


def _saved_dataset(path: str, split: str | None) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} is not readable as a saved dataset: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
        if chosen not in loaded:
            raise UserError(f"{path} has no split {chosen!r}: write {path}:SPLIT with one of {', '.join(loaded)}")
        return Source(name=f"{path}:{chosen}", kind="dataset", dataset=loaded[chosen])
    return Source(name=path, kind="dataset", dataset=loaded)


def _hub_dataset(path: str) -> Source:
    import datasets

    name, _, split = path.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{path} is neither a file nor a folder here (relative paths start at {Path.cwd()}), nor could "
            f"it be loaded as the hub dataset {name!r}, split {split or 'train'!r}: {error}; correct the "
            "path, or the hub name, or download the dataset beforehand"
        ) from None
    return Source(name=path, kind="dataset", dataset=loaded)


def read_records(source: Source, columns: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
    """Records of a source with their places, in order. Of parquet and datasets, only `columns` are read.

    Raises `UserError` for a damaged file.
    """
    try:
        if source.kind == "json":
            yield from _json_records(source.name)
            return
        if source.kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(source.name)
            # Other columns (embeddings, images) may be large. With no known one, all are read, for the error
            # to list.
            known = [name for name in parquet.schema_arrow.names if name in columns] or None
            batches = parquet.iter_batches(_BATCH, columns=known)
        else:
            names = source.dataset.column_names
            dataset = source.dataset.select_columns([name for name in names if name in columns] or names)
            batches = dataset.with_format("arrow").iter(_BATCH)
        records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, record in enumerate(records, 1):
            yield f"{source.name}:row {number}", record
    except (pa.ArrowException, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{source.name} is damaged or not what its name says: {error}; write it again") from None


def _json_records(path: str) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        first = True
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if first and line.lstrip()[:1] == b"[":
                yield from _json_array(path, number, line + file.read())
                return
            first = False
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                record = BadRecord(
                    "broken JSON", f"the line {short(line.decode(errors='replace'))} is not JSON: {error}"
                )
            if not isinstance(record, dict | BadRecord):
                record = BadRecord("broken JSON", f"{short(record)} must be a JSON object: one object a line")
            yield f"{path}:{number}", record


def _json_array(path: str, line: int, content: bytes) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
    # The whole array is in memory, since JSON gives no place to go on after a broken element.
    decoder, separator = json.JSONDecoder(), re.compile(r"[^\s,]|\Z")
    try:
        text = content.decode("utf-8")
        position = text.index("[") + 1
        line += text.count("\n", 0, position)
        while True:
            found = separator.search(text, position)
            start = found.start() if found else len(text)
            line += text.count("\n", position, start)
            if text[start : start + 1] == "]":
                return
            record, position = decoder.raw_decode(text, start)
            if not isinstance(record, dict):
                record = BadRecord("broken JSON", f"{short(record)} must be a JSON object")
            yield f"{path}:{line}", record
            line += text.count("\n", start, position)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(
            f"{path}:{line}: the JSON array is broken here: {problem}; write one object a line instead"
        ) from None


def short(value: Any) -> str:
    """A value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

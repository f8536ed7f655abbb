"""Where thumbs logs lie.

In:  paths of files and folders, globs, and hub names. Out: `Source`s, which `records.py` reads.
"""

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from kto_dist.base import hub
from kto_dist.base.class_labels import features_beside
from kto_dist.base.errors import UserError
from kto_dist.base.remembered import sha256_once

_JSON_NAMES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_CSV_NAMES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_FILE_NAMES = (*_JSON_NAMES, *_CSV_NAMES, ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, or one split of a dataset."""

    name: str
    kind: Literal["json", "csv", "parquet", "dataset"]
    dataset: Any = None

    def place(self, number: int) -> str:
        """Of a record, counted from 1: its line, or its row where there are no lines."""
        return f"{self.name}:{number}" if self.kind in ("json", "csv") else f"{self.name}:row {number}"

    def size(self) -> int:
        """Bytes on disk."""
        paths = [self.name] if self.dataset is None else [entry["filename"] for entry in self.dataset.cache_files]
        return sum(Path(path).stat().st_size for path in paths)

    def digest(self) -> str:
        """Hash of the content, so that a renamed copy has the same one and an appended row another."""
        paths, part = [self.name], ""
        if self.dataset is not None:
            # A slice of a split has the files of the whole split.
            paths, part = [entry["filename"] for entry in self.dataset.cache_files], self.dataset._fingerprint
        try:
            if self.dataset is None and (features := features_beside(self.name)):
                part = json.dumps(features)  # what the numbers in the file mean stands beside it
            return " ".join([self.kind, *(sha256_once(Path(path)) for path in paths), part])
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error}; check its permissions") from None


def find_sources(paths: Sequence[str]) -> list[Source]:
    """What paths, globs and hub names lead to. Raises `UserError` for one that leads nowhere."""
    return [source for path in paths for source in _find(path)]


def places_of(given: Sequence[tuple[str, tuple[str, ...]]], places: Sequence[tuple[int, int]]) -> list[str]:
    """File and line of rows. `given`: (name, paths) of a split's sources; `places`: as `Examples.place` has them."""
    files = [source for _, paths in given for source in find_sources(paths)]
    return [files[file].place(line) if 0 <= file < len(files) else f"row {line}" for file, line in places]


def _find(path: str) -> list[Source]:
    here = Path(path)
    if here.is_file():
        return [_file(here)]
    if here.is_dir():
        if (here / "dataset_info.json").exists() or (here / "dataset_dict.json").exists():
            return [_saved_dataset(path, None)]
        files = files_below(here)
        if not files:
            raise UserError(f"folder {path} holds no .parquet, .jsonl, .jsonl.gz or .csv file and is no saved dataset")
        return [_file(file) for file in files]
    if glob.has_magic(path) and not _HUB_NAME.fullmatch(path):
        files = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
        if not files:
            raise UserError(f"no file matches {path}: check the pattern and the working directory ({Path.cwd()})")
        return [_file(file) for file in files]
    folder, colon, split = path.rpartition(":")
    if colon and (Path(folder) / "dataset_dict.json").exists():
        return [_saved_dataset(folder, split)]
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "/")) and not path.endswith(_FILE_NAMES):
        return [_hub_dataset(path)]
    raise UserError(f"{path} does not exist: check the path; relative ones start at {Path.cwd()}")


def files_below(folder: Path) -> list[Path]:
    """The logs in a folder: Parquet and JSON lines, or CSV where there is nothing else."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    logs = [file for file in files if file.name.endswith((".parquet", ".jsonl", ".jsonl.gz"))]
    return logs or [file for file in files if file.name.endswith((".csv", ".csv.gz"))]


def _file(path: Path) -> Source:
    if path.name.endswith(".parquet"):
        return Source(name=str(path), kind="parquet")
    if path.name.endswith(_JSON_NAMES):
        return Source(name=str(path), kind="json")
    if path.name.endswith(_CSV_NAMES):
        return Source(name=str(path), kind="csv")
    raise UserError(f"{path}: the type of the file must be one of {', '.join(_FILE_NAMES)}; convert it")


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
    from huggingface_hub import constants

    name, _, split = path.partition(":")
    trouble = hub.trouble()
    if trouble is not None:  # what is in the cache is used as it is, and nobody waits for retries
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if trouble is not None:
            raise UserError(
                f"{path} is neither a file nor a folder here (relative paths start at {Path.cwd()}), and the hub "
                f"({constants.ENDPOINT}) cannot be reached: {trouble}; correct the path, or download the dataset "
                "beforehand"
            ) from None
        raise UserError(
            f"{path} is neither a file nor a folder here (relative paths start at {Path.cwd()}), nor could "
            f"it be loaded as the hub dataset {name!r}, split {split or 'train'!r}: {error}; correct the "
            "path, or the hub name, or download the dataset beforehand"
        ) from None
    return Source(name=path, kind="dataset", dataset=loaded)

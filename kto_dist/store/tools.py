"""What one asks of a whole store: list it, verify it, take its pairs elsewhere.

In:  a store's root, and where wanted the first digits of a fingerprint. Out: records to print, or a file. Nothing here
needs the model, a config or a GPU, and nothing here changes the store (`gc.py` does).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.store.contents import folders_of, read_shards, told
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.shards import NAME, disagreements, key_column, merge
from kto_dist.store.storage import File, Root, Storage
from kto_dist.store.store import in_use, last_used, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One model's part of a store."""

    folder: str
    fingerprint: str
    """Whole; "" where the manifest is missing or damaged."""
    facts: dict[str, str]
    """What the manifest says of the model, to be read by people."""
    shards: int
    pairs: int
    """A pair that stands in two shards counts twice."""
    size: int
    """Bytes, of all files."""
    used: float | None
    """Seconds since 1970."""
    users: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What reading every byte of one model's part has shown."""

    folder: str
    shards: int
    pairs: int
    """Different ones, in good shards."""
    bad: list[tuple[str, str]]
    """(shard, what is wrong with it)"""
    unjudged: list[tuple[str, str]]
    """(shard, why nothing is known of it)"""
    repeated: int
    """Pairs that stand in more than one shard."""
    difference: float
    """Nats, the largest between two values of a pair."""

    @property
    def good(self) -> bool:
        return not self.bad and not self.unjudged


def summarise(root: Root, prefix: str = "") -> list[Summary]:
    """Reads no shard but its last few bytes."""
    with told(root, "cannot be read"):
        return [_summary(name, folder) for name, folder in folders_of(root, prefix)]


_PRECISION = ("dtype", "logits", "attention", "kernels", "quantisation")


def other_precisions(root: Root, own: Fingerprint) -> list[str]:
    """A sentence for each model of the store that has the same weights, is computed in another way, and is at work:
    what one job scores is then nothing to the other. For a job that is about to start; nothing is certain."""
    mine, said = own.to_dict(), []
    with told(root, "cannot be read"):
        for name, folder in folders_of(root):
            found = read_manifest(folder) or {}
            if own.digest.startswith(name) or any(found.get(key) != mine[key] for key in ("weights", "config")):
                continue
            differing = [
                f"{key} {found.get(key)} there and {mine.get(key)} here"
                for key in _PRECISION
                if found.get(key) != mine.get(key)
            ]
            if differing and (users := in_use(folder)):
                said.append(
                    f"{len(users):,} other jobs ({users[0]}) score the same weights into this store in another way, "
                    f"{', '.join(differing)}: what this one scores is of no use to their run, unless the settings of "
                    "`reference` are the same"
                )
    return said


def _summary(name: str, folder: Storage) -> Summary:
    manifest = read_manifest(folder) or {}
    files = folder.files()
    shards = [file for file in files if NAME.fullmatch(file.name)]
    with ThreadPoolExecutor(max_workers=folder.concurrency) as pool:
        pairs = sum(pool.map(partial(_rows, folder), shards))
    return Summary(
        folder=name,
        fingerprint=str(manifest.get("fingerprint", "")),
        facts={key: str(value) for key, value in manifest.items()},
        shards=len(shards),
        pairs=pairs,
        size=sum(file.size for file in files),
        used=last_used(folder),
        users=in_use(folder),
    )


def _rows(folder: Storage, file: File) -> int:
    try:
        with folder.open(file.name) as opened:
            return pq.read_metadata(opened).num_rows
    except (OSError, pa.ArrowException):  # `verify` says what is wrong
        return 0


def verify(root: Root, prefix: str = "") -> Iterator[Verdict]:
    """Hashes every byte of every shard; changes nothing."""
    for name, folder in folders_of(root, prefix):
        with told(root, "cannot be read"):
            shards = [file.name for file in folder.files() if NAME.fullmatch(file.name)]
        found = read_shards(folder, name, shards)
        repeated, difference = disagreements(list(found.good.values()))
        yield Verdict(
            folder=name,
            shards=len(shards),
            pairs=len(merge(list(found.good.values()))),
            bad=list(found.bad.items()),
            unjudged=list(found.unjudged.items()),
            repeated=repeated,
            difference=difference,
        )


def export(root: Root, target: Path, prefix: str = "") -> int:
    """Writes one model's pairs to a Parquet or CSV file, a row each, sorted by key; returns how many.

    Raises `UserError` where more than one model fits, a shard is damaged, or the file cannot be written.
    """
    if target.suffix not in (".parquet", ".csv"):
        raise UserError(f"the file to export to ({target}) must end in .parquet or .csv")
    folders = folders_of(root, prefix)
    if len(folders) > 1:
        names = ", ".join(name for name, _ in folders)
        raise UserError(
            f"{root} holds {len(folders)} models ({names}): choose one by --fingerprint and its first digits"
        )
    ((name, folder),) = folders
    with told(root, "cannot be read"):
        found = read_shards(folder, name, [file.name for file in folder.files() if NAME.fullmatch(file.name)])
    if found.unjudged:
        shard, why = next(iter(found.unjudged.items()))
        raise UserError(f"{len(found.unjudged)} shards of {folder} cannot be exported: {shard} {why}")
    if found.bad:
        shard, why = next(iter(found.bad.items()))
        raise UserError(
            f"{len(found.bad)} shards of {folder} cannot be trusted ({shard} {why}): score their pairs again with "
            "kto-dist precompute, or remove them with kto-dist store gc, and export then"
        )
    pairs = merge(list(found.good.values()))
    keys = key_column(pairs.keys())
    sink = pa.BufferOutputStream()
    if target.suffix == ".parquet":
        pq.write_table(pa.table({"key": keys, "logp": pairs.logps, "tokens": pairs.tokens}), sink)
    else:
        readable = pa.array([key.hex() for key in keys.to_pylist()], pa.string())
        pa.csv.write_csv(pa.table({"key": readable, "logp": pairs.logps, "tokens": pairs.tokens}), sink)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, sink.getvalue().to_pybytes())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}; give another file") from None
    return len(pairs)

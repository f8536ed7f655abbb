"""What one does to a whole store: list it, verify it, clear it out, take its pairs elsewhere.

In:  a store's root, and where wanted the first digits of a fingerprint. Out: records to print, or a file. Nothing here
needs the model, a config or a GPU, and nothing here disturbs a job that is at work: readers bear that a shard is
replaced by another one that holds its pairs, and what is in use is left alone.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.store.shards import NAME, BadShard, Pairs, decode, disagreements, encode, key_column, merge
from kto_dist.store.storage import TEMPORARY, File, Storage, open_storage
from kto_dist.store.store import FOLDER_DIGITS, FORMAT, MANIFEST, USED, in_use, is_lease, last_used, read_manifest

SMALL_SHARD = 2**18
# pairs, 7 MB: smaller ones are worth merging
LARGE_SHARD = 2**21
# pairs that a merged shard holds at the most: 59 MB; s3fs sends what is larger than 100 MiB in several parts
WORTH_MERGING = 16
# small shards, from which on they are merged
DAMAGED = "damaged"
_ABANDONED_SECONDS = 3600.0
# after which a file under a temporary name, which takes seconds to write, has lost its writer


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One model's part of a store."""

    folder: str
    fingerprint: str
    # whole; "" where the manifest is missing or damaged
    facts: dict[str, str]
    # what the manifest says of the model, to be read by people
    shards: int
    pairs: int
    # a pair that stands in two shards counts twice
    size: int
    # bytes, of all files
    used: float | None
    # seconds since 1970
    users: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What reading every byte of one model's part has shown."""

    folder: str
    shards: int
    pairs: int
    # different ones, in good shards
    bad: list[tuple[str, str]]
    # (shard, what is wrong with it)
    unjudged: list[tuple[str, str]]
    # (shard, why nothing is known of it)
    repeated: int
    # pairs that stand in more than one shard
    difference: float
    # nats, the largest between two values of a pair

    @property
    def good(self) -> bool:
        return not self.bad and not self.unjudged


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """One thing that `gc` would do."""

    folder: str
    files: list[str]
    size: int
    # bytes
    why: str
    merged: bool = False
    # their pairs are written to new shards first
    damaged: bool = False
    # they are read again first, and stay where they turn out to be good
    unused_days: float | None = None
    # days since the model was last used, which is asked again first; it stays where they are fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """What reading the shards of one model has shown. One that is gone meanwhile is in none of these."""

    good: dict[str, Pairs]
    bad: dict[str, str]
    unjudged: dict[str, str]
    # and why; what cannot be read for the moment is no damage


@contextmanager
def _told(root: str | Path, what: str) -> Iterator[None]:
    """A `UserError` for whatever a disk or a network refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the store ({root}) {what}: {error}; check the path and its permissions, or a URL's connection and "
            "credentials"
        ) from None


def folders_of(root: str | Path, prefix: str = "") -> list[tuple[str, Storage]]:
    """(name, folder) of every model in the store. Raises `UserError` where there is no store, or no such model."""
    storage = open_storage(root)
    with _told(root, "cannot be read"):
        names = [
            name for name in storage.folders() if len(name) == FOLDER_DIGITS and not name.strip("0123456789abcdef")
        ]
    if not names:
        raise UserError(f"{root} holds no reference store: give the folder or URL that reference.store names")
    chosen = [name for name in names if name.startswith(prefix[:FOLDER_DIGITS])]
    if not chosen:
        raise UserError(f"no model of {root} has a fingerprint that starts with {prefix}: it has {', '.join(names)}")
    return [(name, storage / name) for name in chosen]


def summarise(root: str | Path, prefix: str = "") -> list[Summary]:
    """Reads no shard but its last few bytes."""
    with _told(root, "cannot be read"):
        return [_summary(name, folder) for name, folder in folders_of(root, prefix)]


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


def verify(root: str | Path, prefix: str = "") -> Iterator[Verdict]:
    """Hashes every byte of every shard; changes nothing."""
    for name, folder in folders_of(root, prefix):
        with _told(root, "cannot be read"):
            shards = [file.name for file in folder.files() if NAME.fullmatch(file.name)]
        found = _load(folder, name, shards)
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


def _load(folder: Storage, name: str, shards: list[str]) -> _Contents:
    manifest, why = _trusted_manifest(folder, name)
    if manifest is None:
        return _Contents(good={}, bad={}, unjudged=dict.fromkeys(shards, why))
    fingerprint = manifest["fingerprint"]

    def read(shard: str) -> Pairs | BadShard | OSError:
        try:
            return decode(shard, folder.read(shard), fingerprint)
        except (BadShard, OSError) as error:
            return error

    with ThreadPoolExecutor(max_workers=folder.concurrency) as pool:
        results = dict(zip(shards, pool.map(read, shards), strict=True))
    return _Contents(
        good={shard: found for shard, found in results.items() if isinstance(found, Pairs)},
        bad={shard: str(found) for shard, found in results.items() if isinstance(found, BadShard)},
        unjudged={
            shard: f"cannot be read: {found}"
            for shard, found in results.items()
            if isinstance(found, OSError) and not isinstance(found, FileNotFoundError)
        },
    )


def _trusted_manifest(folder: Storage, name: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest if it is of the model that the folder is named after, else None and why.

    Shards are judged by the fingerprint in it: by another model's all of them would look foreign.
    """
    try:
        found = read_manifest(folder)
    except OSError as error:
        return None, f"cannot be judged: {MANIFEST} cannot be read: {error}"
    if not found:
        what = "missing" if found is None else "damaged"
        return None, f"cannot be judged: {MANIFEST} is {what}; the next job that uses this model writes it"
    fingerprint = found.get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint.startswith(name):
        return None, (
            f"cannot be judged: {MANIFEST} is that of another model; remove this one file, and the next job that uses "
            "this model writes it"
        )
    return found, ""


def plan_gc(
    root: str | Path,
    *,
    unused_days: float | None = None,
    prefix: str | None = None,
    warn: Callable[[str], None] = print,
) -> list[Removal]:
    """What can go without a loss: what is damaged or abandoned, and shards that one can replace.

    With `unused_days` also the models that nobody has used for so long, with `prefix` the one of that fingerprint, with
    both that one if nobody has. Otherwise never anything of a model that another version's format holds, nor of one
    with a shard that cannot be judged, which `warn` tells, and in no case of one that a job is using. Raises
    `UserError` where `prefix` fits several models.
    """
    removals = []
    folders = folders_of(root, prefix or "")
    if prefix and len(folders) > 1:
        names = ", ".join(name for name, _ in folders)
        raise UserError(
            f"{len(folders)} models of {root} have a fingerprint that starts with {prefix}: {names}; give more"
        )
    for name, folder in folders:
        with _told(root, "cannot be read"):
            removals += _plan_of(name, folder, unused_days, prefix, warn)
    return removals


def _plan_of(
    name: str, folder: Storage, unused_days: float | None, prefix: str | None, warn: Callable[[str], None]
) -> list[Removal]:
    if in_use(folder):
        return []
    files = folder.files()
    if prefix and unused_days is None:
        return [_removal(name, files, f"its fingerprint starts with {prefix}")]
    days = None if unused_days is None else _days_unused(folder, unused_days)
    if days is not None:
        return [_removal(name, files, f"not used for {days:.0f} days", unused_days=unused_days)]
    manifest, _ = _trusted_manifest(folder, name)
    written = (manifest or {}).get("format")
    if manifest and written != FORMAT:
        warn(
            f"{name}: left alone, {MANIFEST} names format {written}, and this version knows {FORMAT}: "
            "--fingerprint or --unused-days remove it whole, the version that wrote it can use it"
        )
        return []
    return _litter(name, folder, files, warn)


def _days_unused(folder: Storage, least: float) -> float | None:
    """None where they are fewer than `least`, or unknown."""
    used = last_used(folder)
    days = None if used is None else (time.time() - used) / 86400
    return None if days is None or days < least else days


def _removal(
    name: str,
    files: list[File],
    why: str,
    *,
    merged: bool = False,
    damaged: bool = False,
    unused_days: float | None = None,
) -> Removal:
    return Removal(
        folder=name,
        files=[file.name for file in files],
        size=sum(file.size for file in files),
        why=why,
        merged=merged,
        damaged=damaged,
        unused_days=unused_days,
    )


def _litter(name: str, folder: Storage, files: list[File], warn: Callable[[str], None]) -> list[Removal]:
    now = time.time()
    shards = [file for file in files if NAME.fullmatch(file.name)]
    found = _load(folder, name, [file.name for file in shards])
    if found.unjudged:
        shard, why = next(iter(found.unjudged.items()))
        warn(f"{name}: left alone, {len(found.unjudged):,} shards cannot be judged ({shard} {why})")
        return []
    good = found.good
    repeated, _ = disagreements(list(good.values()))
    small = [file for file in shards if file.name in good and len(good[file.name]) < SMALL_SHARD]
    # repeats can stand in any of them
    merging = [file for file in shards if file.name in good] if repeated else small
    kinds = [
        ("set aside as damaged", [file for file in files if file.name.endswith(".damaged")]),
        (DAMAGED, [file for file in shards if file.name in found.bad]),
        (
            "left by a writer that was killed",
            [
                file
                for file in files
                if TEMPORARY.fullmatch(file.name) and now - (file.modified or now) > _ABANDONED_SECONDS
            ],
        ),
        ("marks of jobs that have ended", [file for file in files if is_lease(file.name)]),
    ]
    removals = [_removal(name, files, why, damaged=why == DAMAGED) for why, files in kinds if files]
    if repeated or len(small) >= WORTH_MERGING:
        why = (
            f"merged into few; {repeated:,} pairs stand there more than once" if repeated else "small, merged into few"
        )
        removals.append(_removal(name, merging, why, merged=True))
    return removals


def collect(root: str | Path, removals: list[Removal]) -> Iterator[tuple[Removal, bool]]:
    """Does what `plan_gc` said, and yields for each whether: not where a job has come to use the model since."""
    for removal in removals:
        with _told(root, "could not be cleared out to the end"):
            done = _carry_out(open_storage(root) / removal.folder, removal)
        yield removal, done


def _carry_out(folder: Storage, removal: Removal) -> bool:
    if in_use(folder):
        return False
    if removal.merged:
        return _merge_shards(folder, removal)
    if removal.damaged:
        return _remove_damaged(folder, removal)
    if removal.unused_days is not None and _days_unused(folder, removal.unused_days) is None:
        return False
    # the manifest last: without it the rest could not be told apart if this were stopped
    for name in sorted(removal.files, key=lambda name: name in (MANIFEST, USED)):
        folder.remove(name)
    folder.remove_folder()
    return True


def _remove_damaged(folder: Storage, removal: Removal) -> bool:
    """Between the plan and the deed a disk or a network may have recovered."""
    found = _load(folder, removal.folder, removal.files)
    for name in found.bad:
        folder.remove(name)
    return not found.good and not found.unjudged


def _merge_shards(folder: Storage, removal: Removal) -> bool:
    manifest, _ = _trusted_manifest(folder, removal.folder)
    good = _load(folder, removal.folder, removal.files).good
    if manifest is None or not good:
        return False
    whole = merge(list(good.values()))
    for start in range(0, len(whole), LARGE_SHARD):
        part = whole[start : start + LARGE_SHARD]
        folder.write(*encode(part.keys(), part.logps, part.tokens, manifest["fingerprint"]))
    # only what stands in the new ones by now: a shard that another job adds meanwhile is none of these
    for name in good:
        folder.remove(name)
    return True


def export(root: str | Path, target: Path, prefix: str = "") -> int:
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
    with _told(root, "cannot be read"):
        found = _load(folder, name, [file.name for file in folder.files() if NAME.fullmatch(file.name)])
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

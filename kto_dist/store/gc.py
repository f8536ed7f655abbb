"""Clearing a store out: what is damaged, abandoned or unused goes, and many small shards become few.

In:  a store's root. Out: `plan_gc` says what can go, as `Removal` records to show; `collect` does it. Nothing here
disturbs a job that is at work: readers bear that a shard is replaced by another one that holds its pairs, and what is
in use is left alone.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kto_dist.base.errors import UserError
from kto_dist.base.files import TEMPORARY
from kto_dist.store.contents import folders_of, read_shards, told, trusted_manifest
from kto_dist.store.leases import is_piece
from kto_dist.store.shards import NAME, disagreements, encode, merge
from kto_dist.store.storage import File, Root, Storage, open_storage
from kto_dist.store.store import FORMAT, MANIFEST, USED, in_use, is_lease, last_used

SMALL_SHARD = 2**18
"""Pairs, 7 MB: smaller ones are worth merging."""
LARGE_SHARD = 2**21
"""Pairs that a merged shard holds at the most: 59 MB; s3fs sends what is larger than 100 MiB in several parts."""
WORTH_MERGING = 16
"""Small shards, from which on they are merged."""
DAMAGED = "damaged"
ABANDONED = "left by a writer that was killed"
_ABANDONED_SECONDS = 3600.0
"""After which a file under a temporary name, which takes seconds to write, has lost its writer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """One thing that `gc` would do."""

    folder: str
    files: list[str]
    size: int
    """Bytes."""
    why: str
    merged: bool = False
    """Their pairs are written to new shards first."""
    damaged: bool = False
    """They are read again first, and stay where they turn out to be good."""
    abandoned: bool = False
    """Their age is asked again first, by the clock of whoever keeps them; they stay where they are young."""
    unused_days: float | None = None
    """Days since the model was last used, which is asked again first; it stays where they are fewer."""


def plan_gc(
    root: Root,
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
        with told(root, "cannot be read"):
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
    manifest, _ = trusted_manifest(folder, name)
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
    abandoned: bool = False,
    unused_days: float | None = None,
) -> Removal:
    return Removal(
        folder=name,
        files=[file.name for file in files],
        size=sum(file.size for file in files),
        why=why,
        merged=merged,
        damaged=damaged,
        abandoned=abandoned,
        unused_days=unused_days,
    )


def _litter(name: str, folder: Storage, files: list[File], warn: Callable[[str], None]) -> list[Removal]:
    now = time.time()
    shards = [file for file in files if NAME.fullmatch(file.name)]
    found = read_shards(folder, name, [file.name for file in shards])
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
            ABANDONED,
            [file for file in files if TEMPORARY.fullmatch(file.name) and _is_old(file, now)],
        ),
        (
            "marks of jobs that have ended",
            [file for file in files if is_lease(file.name) or is_piece(file.name)],
        ),
    ]
    removals = [
        _removal(name, files, why, damaged=why == DAMAGED, abandoned=why == ABANDONED) for why, files in kinds if files
    ]
    if repeated or len(small) >= WORTH_MERGING:
        why = (
            f"merged into few; {repeated:,} pairs stand there more than once" if repeated else "small, merged into few"
        )
        removals.append(_removal(name, merging, why, merged=True))
    return removals


def collect(root: Root, removals: list[Removal], largest: int = LARGE_SHARD) -> Iterator[tuple[Removal, bool]]:
    """Does what `plan_gc` said, and yields for each whether: not where a job has come to use the model since."""
    for removal in removals:
        with told(root, "could not be cleared out to the end"):
            done = _carry_out(open_storage(root) / removal.folder, removal, largest)
        yield removal, done


def _carry_out(folder: Storage, removal: Removal, largest: int) -> bool:
    if in_use(folder):
        return False
    if removal.merged:
        return _merge_shards(folder, removal, largest)
    if removal.damaged:
        return _remove_damaged(folder, removal)
    if removal.abandoned:
        return _remove_abandoned(folder, removal)
    if removal.unused_days is not None and _days_unused(folder, removal.unused_days) is None:
        return False
    # the manifest last: without it the rest could not be told apart if this were stopped
    for name in sorted(removal.files, key=lambda name: name in (MANIFEST, USED)):
        folder.remove(name)
    folder.remove_folder()
    return True


def _remove_damaged(folder: Storage, removal: Removal) -> bool:
    """Between the plan and the deed a disk or a network may have recovered."""
    found = read_shards(folder, removal.folder, removal.files)
    for name in found.bad:
        folder.remove(name)
    return not found.good and not found.unjudged


def _remove_abandoned(folder: Storage, removal: Removal) -> bool:
    """This machine's clock may be wrong, and a writer that has not said that it is at work has files here as well."""
    probe = f".clock.{uuid.uuid4().hex}"
    folder.write(probe, b"")
    try:
        ages = {file.name: file for file in folder.files()}
        now = ages[probe].modified if probe in ages else None
        old = [] if now is None else [name for name in removal.files if name in ages and _is_old(ages[name], now)]
    finally:
        folder.remove(probe)
    for name in old:
        folder.remove(name)
    return not {*removal.files} & ages.keys() - {*old}


def _is_old(file: File, now: float) -> bool:
    return file.modified is not None and now - file.modified > _ABANDONED_SECONDS


def _merge_shards(folder: Storage, removal: Removal, largest: int) -> bool:
    manifest, _ = trusted_manifest(folder, removal.folder)
    good = read_shards(folder, removal.folder, removal.files).good
    if manifest is None or not good:
        return False
    whole = merge(list(good.values()))
    for start in range(0, len(whole), largest):
        part = whole[start : start + largest]
        folder.write(*encode(part.keys(), part.logps, part.tokens, manifest["fingerprint"]))
    # only what stands in the new ones by now: a shard that another job adds meanwhile is none of these
    for name in good:
        folder.remove(name)
    return True

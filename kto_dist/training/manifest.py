"""What the files of a folder must be: their names, sizes and sha256, made and checked by all ranks at once.

In:  a folder that ranks have written to. Out: `manifest.json` in it, written last; later, what of it is damaged.

Each rank reads its share, so that terabytes take minutes, and waits for the others in short collectives, so that they
may take hours. Ranks that see the same folder share its files; hosts without a shared file system check their own.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kto_dist.base import agree, comm
from kto_dist.base.files import flush, sha256_of, write_whole

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file."""

    size: int
    sha256: str


def write(folder: Path, made: Sequence[Mapping[str, Entry]] = ()) -> None:
    """Collective. All files are there by now; they are flushed to the disk, and listed. Raises `OSError`.

    `made`: by rank, the entries of files that it has flushed itself.
    """
    group = neighbours(folder.parent)

    def entry(name: str) -> tuple[str, Entry]:
        flush(folder / name)
        return name, Entry(size=(folder / name).stat().st_size, sha256=sha256_of(folder / name))

    entries = {name: found for rank in group if made for name, found in made[rank].items()}

    def entries_of_share() -> list[tuple[str, Entry]]:
        left = {name: (folder / name).stat().st_size for name in _files(folder) if name not in entries}
        return _each(_share(left, group), entry)

    others = agree.side_by_side(entries_of_share)
    entries |= {name: found for rank in group for name, found in others[rank]}

    def put_down() -> None:
        if not (folder / NAME).exists():
            write_whole(folder / NAME, _encoded({name: asdict(entries[name]) for name in sorted(entries)}))

    agree.once_per_host(put_down)


def damage(folder: Path) -> list[str]:
    """Collective. What is not as the manifest says, the same list on every rank; empty where all is well."""
    group = neighbours(folder.parent)
    entries = read(folder)

    def look() -> list[str]:
        if entries is None:
            return [f"{NAME} is missing or damaged"]
        share = _share({name: entry.size for name, entry in entries.items()}, group)
        unknown = [f"{name} is not in {NAME}" for name in _files(folder) if name not in entries]
        return unknown + [text for text in _each(share, lambda name: _wrong(folder / name, entries[name])) if text]

    return list(dict.fromkeys(text for texts in agree.side_by_side(look) for text in texts))


def read(folder: Path) -> Mapping[str, Entry] | None:
    """None where there is no manifest that can be believed."""
    try:
        content = json.loads((folder / NAME).read_bytes())
        files = content["files"]
        if content["format"] != FORMAT or content["checksum"] != _checksum(files):
            return None
        return {name: Entry(**entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _wrong(path: Path, entry: Entry) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{path.name} has {size:,} of {entry.size:,} bytes"
        return None if sha256_of(path) == entry.sha256 else f"{path.name} has other bytes than were written"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"


def _files(folder: Path) -> list[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NAME)


def _share(sizes: Mapping[str, int], group: list[int]) -> list[str]:
    """This rank's files: the largest go round first, so that all have about as much to read."""
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    return order[group.index(comm.rank()) :: len(group)]


def _each(names: list[str], work: Callable[[str], T]) -> list[T]:
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(work, names))


def neighbours(root: Path) -> list[int]:
    """Collective. The ranks that see the same files as this one: those of its host, and others on a shared disk."""
    token = comm.broadcast(f".seen-{uuid.uuid4().hex}")
    if comm.is_main():
        with contextlib.suppress(OSError):  # a disk that cannot be written: every host for itself
            (root / token).touch()
    comm.barrier()
    seen = comm.gather(os.path.exists(root / token))  # of a disk that fails as well
    if comm.is_main():
        with contextlib.suppress(OSError):
            (root / token).unlink()
    heads = comm.gather(comm.rank() - comm.local_rank())  # ranks of a host are neighbours
    own = comm.rank()
    return [
        rank
        for rank in range(comm.world_size())
        if (seen[rank] and seen[own]) or (not seen[rank] and not seen[own] and heads[rank] == heads[own])
    ]


def _encoded(files: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, "checksum": _checksum(files), "files": files}, indent=1).encode()


def _checksum(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

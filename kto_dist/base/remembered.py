"""The sha256 of large files, read once: remembered as long as a file is the same file.

In:  a path. Out: its content's sha256.

A file is known by everything that a file system tells files apart by: device, inode, size, time of modification, time
of change (which `touch` and `cp -p` can't set) and a sample of its content. What is remembered stands in the user's
cache folder, one small JSON file each. A file whose time stamps are as young as the clock's granularity allows to be
changed again unnoticed is remembered by this process alone.
"""

import contextlib
import hashlib
import json
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole

SETTLED_SECONDS = 10.0
"""FAT keeps times to 2 s, object stores that are mounted to 1 s; the rest is for a server whose clock is behind."""
REMEMBERED_FILES = 500
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def sha256_once(path: Path, *, settled: float = SETTLED_SECONDS) -> str:
    """In hexadecimal. Raises `UserError` for a file that changes meanwhile, `OSError` for one that cannot be read.

    `settled`: seconds since the last change after which the digest outlives this process.
    """
    with path.open("rb") as file:
        return _digest_of(identity(file), path, settled)


@lru_cache(maxsize=10_000)
def _digest_of(key: str, path: Path, settled: float) -> str:
    kept = cache_folder()
    known = None if kept is None else _recall(kept, key)
    if known is not None:
        return known
    started, digest = time.time(), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        after = os.stat(file.fileno())
        if identity(file) != key:
            raise UserError(f"{path} changed while it was read: start again when whatever writes it has ended")
    if kept is not None and started - max(after.st_mtime, after.st_ctime) > settled:
        _remember(kept, key, digest.hexdigest())
    return digest.hexdigest()


def identity(file: BinaryIO) -> str:
    """A hash of all that tells this file from another one, and from itself before a change."""
    stat = os.stat(file.fileno())
    known = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    digest = hashlib.sha256(json.dumps(known).encode())
    for place in range(_SAMPLES):
        digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, place * stat.st_size // _SAMPLES))
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """None where there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kto_dist" / "sha256"
    except RuntimeError:
        return None


def _recall(folder: Path, key: str) -> str | None:
    try:
        entry = json.loads((folder / f"{key}.json").read_bytes())
        digest: str = entry["digest"]
        return digest if entry["checksum"] == _checksum(key, digest) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remember(folder: Path, key: str, digest: str) -> None:
    content = {"checksum": _checksum(key, digest), "digest": digest}
    with contextlib.suppress(OSError):  # without a cache one only waits longer the next time
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.json", json.dumps(content).encode())
        entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for entry in entries[REMEMBERED_FILES:]:
            entry.unlink(missing_ok=True)


def _checksum(key: str, digest: str) -> str:
    return hashlib.sha256(json.dumps([key, digest]).encode()).hexdigest()

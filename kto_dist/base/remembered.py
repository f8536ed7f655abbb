"""Digests of large files, read once: remembered as long as a file is the same file.

In:  a path. Out: its content's sha256. (`store.hashes` remembers other digests in the same way.)

A file is known by everything that a file system tells files apart by: device, inode, size, time of modification, time
of change (which `touch` and `cp -p` can't set) and a sample of its content. What is remembered stands in the user's
cache folder, one small JSON file each. A file whose time stamps are as young as the clock's granularity allows to be
changed again unnoticed is not remembered there.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole

SETTLED_SECONDS = 10.0
"""FAT keeps times to 2 s, object stores that are mounted to 1 s; the rest is for a server whose clock is behind."""
REMEMBERED_FILES = 500
SAMPLES, _SAMPLE_BYTES = 64, 4096
_CACHE = "sha256"


def sha256_once(path: Path, *, settled: float = SETTLED_SECONDS) -> str:
    """In hexadecimal. Raises `UserError` for a file that changes meanwhile, `OSError` for one that cannot be read.

    `settled`: seconds since the last change after which the digest outlives this process.
    """
    with path.open("rb") as file:
        return _digest_of(file_identity(file), path, settled)


@lru_cache(maxsize=10_000)
def _digest_of(key: str, path: Path, settled: float) -> str:
    known = recall(_CACHE, key)
    if isinstance(known, str):
        return known
    started, digest = time.time(), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        after = os.stat(file.fileno())
        if file_identity(file) != key:
            raise changed(path)
    if is_settled(after, started, settled):
        remember(_CACHE, key, digest.hexdigest())
    return digest.hexdigest()


def changed(path: Path) -> UserError:
    return UserError(f"{path} changed while it was read: start again when whatever writes it has ended")


def file_identity(
    file: BinaryIO, *more: str, samples: int = SAMPLES, fstat: Callable[[int], os.stat_result] = os.fstat
) -> str:
    """A hash of all that tells this file from another one, and from itself before a change, and of `more`."""
    stat = fstat(file.fileno())
    known = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, *more]
    digest = hashlib.sha256(json.dumps(known).encode())
    for place in range(samples):
        digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, place * stat.st_size // samples))
    return digest.hexdigest()


def is_settled(after: os.stat_result, started: float, settled: float) -> bool:
    """Whether the last change lay so many seconds before the reading started (seconds since 1970)."""
    return started - max(after.st_mtime, after.st_ctime) > settled


def cache_folder(name: str) -> Path:
    """Raises `RuntimeError` where there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kto_dist" / name


def recall(name: str, key: str) -> Any:
    """What `remember` was given, or None."""
    try:
        entry = json.loads((cache_folder(name) / f"{key}.json").read_bytes())
        return entry["digests"] if entry["checksum"] == _checksum(key, entry["digests"]) else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return None


def remember(name: str, key: str, digests: str | dict[str, str], most: int = REMEMBERED_FILES) -> None:
    content = {"checksum": _checksum(key, digests), "digests": digests}
    with contextlib.suppress(OSError, RuntimeError):  # without a cache one only waits longer the next time
        folder = cache_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.json", json.dumps(content).encode())
        # files that are gone: every checkpoint of a long run would stay here otherwise
        entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for entry in entries[most:]:
            entry.unlink(missing_ok=True)


def _checksum(key: str, digests: object) -> str:
    return hashlib.sha256(json.dumps([key, digests], sort_keys=True).encode()).hexdigest()

"""The content of weight files as hashes: read in parallel, and remembered as long as a file is the same file.

A safetensors file is hashed tensor by tensor (name, dtype, shape, bytes), so what counts is what a model computes
with: the same tensors in one file or in ten, in another order or with other metadata, have the same hashes. Other
formats (pickles, GGUF) are hashed as a whole.

What is remembered stands in the user's cache folder, one small JSON file a weight file, under everything by which a
file system tells files apart: device, inode, size, time of modification, time of change (which `touch` and `cp -p`
can't set) and a sample of its content. A file whose time stamps are as young as the clock's granularity allows to be
changed again unnoticed is hashed, but not remembered.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole

BLOCK = 64 * 2**20
# Bytes hashed by one thread at a time; part of what a hash means, so not to be changed.
SETTLED_SECONDS = 10.0
# FAT keeps times to 2 s, object stores that are mounted to 1 s; the rest is for a server whose clock is behind.
REMEMBERED_FILES = 500
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    label: str
    # what is hashed along with the bytes
    start: int
    stop: int


def file_digests(paths: Sequence[Path]) -> list[dict[str, str]]:
    """For each file {label: sha256}: a label a tensor, or one for the whole file.

    Raises `UserError` for a file that cannot be read, is truncated, or changes meanwhile.
    """
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=_THREADS) as pool:
        jobs = []
        for path in paths:
            try:
                # opening also makes a network file system ask its server how the file looks by now
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}): check the path and its permissions") from None
            started = time.time()
            identity = _identity(file)
            known = _recall(identity)
            if known is None:
                parts = _parts(path, file)
                blocks = [
                    pool.submit(_sha256, file.fileno(), start, min(start + BLOCK, part.stop))
                    for part in parts
                    for start in range(part.start, part.stop, BLOCK)
                ]
                jobs.append((path, file, started, identity, parts, iter(blocks)))
            else:
                jobs.append(known)
        return [job if isinstance(job, dict) else _finish(*job) for job in jobs]


def _finish(path, file, started, identity, parts, blocks) -> dict[str, str]:
    digests = {}
    for part in parts:
        digest = hashlib.sha256(part.label.encode() + b"\0")
        for _ in range(math.ceil((part.stop - part.start) / BLOCK)):
            digest.update(next(blocks).result())
        digests[part.label] = digest.hexdigest()
    after = os.stat(file.fileno())
    if _identity(file) != identity:
        raise UserError(f"{path} changed while it was read: start again when whatever writes it has ended")
    if started - max(after.st_mtime, after.st_ctime) > SETTLED_SECONDS:
        _remember(identity, digests)
    return digests


def _sha256(descriptor: int, start: int, stop: int) -> bytes:
    digest = hashlib.sha256()
    while start < stop:
        # not a memory map: a file that is truncated meanwhile would kill the process
        data = os.pread(descriptor, min(2**20, stop - start), start)
        if not data:
            raise UserError(f"a weight file ends at byte {start}, before its last tensor: fetch or export it again")
        digest.update(data)
        start += len(data)
    return digest.digest()


def _parts(path: Path, file: BinaryIO) -> list[_Part]:
    size = os.stat(file.fileno()).st_size
    if path.suffix != ".safetensors":
        return [_Part(label="", start=0, stop=size)]
    try:
        length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
        header = json.loads(os.pread(file.fileno(), length, 8)) if 0 < length <= size - 8 else None
        parts = [
            _Part(
                label=json.dumps([name, tensor["dtype"], tensor["shape"]]),
                start=8 + length + tensor["data_offsets"][0],
                stop=8 + length + tensor["data_offsets"][1],
            )
            for name, tensor in sorted(header.items())
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path} is no safetensors file: fetch or export it again") from None
    if max((part.stop for part in parts), default=0) > size:
        raise UserError(f"{path} is truncated at {size:,} bytes: fetch or export it again")
    return parts


def _identity(file: BinaryIO) -> str:
    """A hash of all that tells this file from another one, and from itself before a change."""
    stat = os.stat(file.fileno())
    known = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, Path(file.name).suffix]
    digest = hashlib.sha256(json.dumps(known).encode())
    for place in range(_SAMPLES):
        digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, place * stat.st_size // _SAMPLES))
    return digest.hexdigest()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kto_dist" / "hashes"


def _recall(identity: str) -> dict[str, str] | None:
    try:
        entry = json.loads((cache_folder() / f"{identity}.json").read_bytes())
        return entry["digests"] if entry["checksum"] == _checksum(identity, entry["digests"]) else None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):  # RuntimeError: there is no home folder
        return None


def _remember(identity: str, digests: dict[str, str]) -> None:
    content = {"checksum": _checksum(identity, digests), "digests": digests}
    with contextlib.suppress(OSError, RuntimeError):  # without a cache one only waits longer the next time
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{identity}.json", json.dumps(content).encode())
        # files that are gone: every checkpoint of a long run would stay here otherwise
        entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for entry in entries[REMEMBERED_FILES:]:
            entry.unlink(missing_ok=True)


def _checksum(identity: str, digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([identity, digests], sort_keys=True).encode()).hexdigest()

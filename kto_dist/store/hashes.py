"""The content of weight files as hashes: read in parallel, and remembered as long as a file is the same file.

A safetensors file is hashed tensor by tensor (name, dtype, shape, bytes), so what counts is what a model computes
with: the same tensors in one file or in ten, in another order or with other metadata, have the same hashes. Other
formats (pickles, GGUF) are hashed as a whole.

What is remembered, and how a file is known to be the same, says `base.remembered`.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kto_dist.base.errors import UserError
from kto_dist.base.remembered import (
    REMEMBERED_FILES,
    SAMPLES,
    SETTLED_SECONDS,
    changed,
    file_identity,
    is_settled,
    recall,
    remember,
)

BLOCK = 64 * 2**20
"""Bytes hashed by one thread at a time; part of what a hash means, so not to be changed."""
_CACHE = "hashes"
_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hashing:
    """How files are read, told apart and remembered."""

    block: int = BLOCK
    samples: int = SAMPLES
    """Places of a file that are read to tell it from itself before a change."""
    settled_seconds: float = SETTLED_SECONDS
    remembered_files: int = REMEMBERED_FILES
    pread: Callable[[int, int, int], bytes] = os.pread
    fstat: Callable[[int], os.stat_result] = os.fstat


HASHING = Hashing()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    label: str
    """What is hashed along with the bytes."""
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A file that is being hashed."""

    path: Path
    file: BinaryIO
    started: float
    """Seconds since 1970."""
    key: str
    parts: list[_Part]
    blocks: list[Future[bytes]]
    """Of all parts, in order."""


def file_digests(paths: Sequence[Path], how: Hashing = HASHING) -> list[dict[str, str]]:
    """For each file {label: sha256}: a label a tensor, or one for the whole file.

    Raises `UserError` for a file that cannot be read, is truncated, or changes meanwhile.
    """
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=_THREADS) as pool:
        jobs: list[dict[str, str] | _Job] = []
        for path in paths:
            try:
                # opening also makes a network file system ask its server how the file looks by now
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}): check the path and its permissions") from None
            started = time.time()
            key = _key(file, how)
            known: dict[str, str] | None = recall(_CACHE, key)
            jobs.append(known if known is not None else _begin(path, file, started, key, pool, how))
        return [job if isinstance(job, dict) else _finish(job, how) for job in jobs]


def _begin(path: Path, file: BinaryIO, started: float, key: str, pool: ThreadPoolExecutor, how: Hashing) -> _Job:
    parts = _parts(path, file)
    blocks = [
        pool.submit(_sha256, file.fileno(), start, min(start + how.block, part.stop), how)
        for part in parts
        for start in range(part.start, part.stop, how.block)
    ]
    return _Job(path=path, file=file, started=started, key=key, parts=parts, blocks=blocks)


def _finish(job: _Job, how: Hashing) -> dict[str, str]:
    digests, blocks = {}, iter(job.blocks)
    for part in job.parts:
        digest = hashlib.sha256(part.label.encode() + b"\0")
        for _ in range(math.ceil((part.stop - part.start) / how.block)):
            digest.update(next(blocks).result())
        digests[part.label] = digest.hexdigest()
    after = how.fstat(job.file.fileno())
    if _key(job.file, how) != job.key:
        raise changed(job.path)
    if is_settled(after, job.started, how.settled_seconds):
        remember(_CACHE, job.key, digests, how.remembered_files)
    return digests


def _sha256(descriptor: int, start: int, stop: int, how: Hashing) -> bytes:
    digest = hashlib.sha256()
    while start < stop:
        # not a memory map: a file that is truncated meanwhile would kill the process
        data = how.pread(descriptor, min(2**20, stop - start), start)
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
        header = json.loads(os.pread(file.fileno(), length if 0 < length <= size - 8 else 0, 8))
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


def _key(file: BinaryIO, how: Hashing) -> str:
    """With the file's kind: how it is hashed depends on it."""
    return file_identity(file, Path(file.name).suffix, samples=how.samples, fstat=how.fstat)

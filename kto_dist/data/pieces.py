"""A large log on several hosts: each makes tokens of its share ahead, in a cache that all of them see.

In:  a host's stretches of a log (`stretches.py`). Out: pieces in the cache, which `tokenise` puts together in place of
reading the files again; where hosts see no common cache it finds the pieces of one host alone, and reads the rest.

1. `PieceWriter` the parts of one host as they come from the encoder; the folder gets its name when it is whole
2. `read_piece`  the same parts again
3. `say_wrong`   in place of a piece, where a row is wrong

A piece belongs to one key of the cache, which knows all files and settings: numbers of files, sources and lines in it
are the log's, and only those of pairs begin at 0 in each piece.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from kto_dist.base.files import flush, sha256_of, write_whole
from kto_dist.data.encode import COUNTS, SCHEMA, Part
from kto_dist.data.formats import FileSoFar, Found
from kto_dist.data.rows import BadRows
from kto_dist.data.stretches import Stretch

_ABOUT = "piece.json"
_DIGEST_BYTES = 16
_FILES = ("rows.arrow", "digests", "contents")
_WRONG = ".wrong"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """Who takes part."""

    number: int
    """This one's, from 0."""
    count: int


ALONE = Hosts(number=0, count=1)


def folder_of(cache: Path, key: str, hosts: Hosts) -> Path:
    return cache / f".{key}.piece-{hosts.number}-of-{hosts.count}"


def remove_pieces(cache: Path, key: str) -> None:
    """Of whatever number of hosts."""
    for folder in cache.glob(f".{key}.piece-*"):
        shutil.rmtree(folder, ignore_errors=True)


def say_wrong(folder: Path) -> None:
    """That a row of this host's is wrong, where its piece would have been: hosts whose rows come later may stop."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name(folder.name + _WRONG).mkdir(exist_ok=True)


def wrong_before(cache: Path, key: str, hosts: Hosts) -> bool:
    """Whether a row before this host's is known to be wrong: that one will be said, and its own do not matter."""
    earlier = (Hosts(number=number, count=hosts.count) for number in range(hosts.number))
    return any((found := folder_of(cache, key, host)).with_name(found.name + _WRONG).exists() for host in earlier)


def forget_wrong(cache: Path, key: str) -> None:
    for folder in cache.glob(f".{key}.piece-*{_WRONG}"):
        shutil.rmtree(folder, ignore_errors=True)


class PieceWriter:
    """Writes a piece beside its final place."""

    def __init__(self, final: Path, splits: Sequence[str], sources: int) -> None:
        self._final = final
        self._folder = final.with_name(f"{final.name}.{uuid.uuid4().hex}")
        self._splits = [_Writing(self._folder / name, sources) for name in splits]

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, parts: Sequence[Part]) -> None:
        """A part a split."""
        for split, part in zip(self._splits, parts, strict=True):
            split.add(part)

    def close(self, stretches: Sequence[Stretch], read: Found) -> None:
        """The piece is there for others when this returns. `stretches`: those that it is made of."""
        about: dict[str, Any] = {
            "stretches": _listed(stretches),
            "files": [[file, so_far.to_dict()] for file, so_far in read.files.items()],
            "splits": {split.folder.name: split.close() for split in self._splits},
            "pairs": read.pairs,
            "found": sorted(read.found),
            "cut": sorted(read.cut),
            "bad": read.bad.to_dict(),
        }
        write_whole(self._folder / _ABOUT, json.dumps({**about, "checksum": _checksum(about)}).encode())
        if self._final.exists():  # damaged
            shutil.rmtree(self._final)
        os.replace(self._folder, self._final)


class _Writing:
    """One split of a piece."""

    def __init__(self, folder: Path, sources: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._arrow = pa.OSFile(str(folder / _FILES[0]), "wb")
        self._rows = pa.ipc.new_file(self._arrow, SCHEMA)
        self._columns: list[IO[bytes]] = [(folder / name).open("wb") for name in _FILES[1:]]
        self._counts = np.zeros((2, len(COUNTS)), np.int64)
        self._sources = np.zeros((sources, 2), np.int64)
        self._shortened_headers = 0

    def add(self, part: Part) -> None:
        if part.batch.num_rows:
            self._rows.write_batch(part.batch)
        for column, content in zip(self._columns, (part.digests, part.contents.tobytes()), strict=True):
            column.write(content)
        self._counts += part.counts
        self._sources += part.sources
        self._shortened_headers += part.shortened_headers

    def close(self) -> dict[str, Any]:
        self._rows.close()
        self._arrow.close()
        for column in self._columns:
            column.close()
        for name in _FILES:
            flush(self.folder / name)
        return {
            "counts": self._counts.tolist(),
            "sources": self._sources.tolist(),
            "shortened_headers": self._shortened_headers,
            "sha256": {name: sha256_of(self.folder / name) for name in _FILES},
        }


def read_piece(
    folder: Path, splits: Sequence[str], stretches: Sequence[Stretch], first_pair: int
) -> tuple[Iterator[list[Part]], Found] | None:
    """None where there is none, or it is not as it was written. `first_pair`: pairs of the stretches before."""
    try:
        about: dict[str, Any] = json.loads((folder / _ABOUT).read_bytes())
        if about.pop("checksum") != _checksum(about) or about["stretches"] != _listed(stretches):
            return None
        for name in splits:
            for file, digest in about["splits"][name]["sha256"].items():
                if sha256_of(folder / name / file) != digest:
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    read = Found(
        files={file: FileSoFar.from_dict(so_far) for file, so_far in about["files"]},
        pairs=about["pairs"],
        found=frozenset(about["found"]),
        cut=frozenset(about["cut"]),
        bad=BadRows.from_dict(about["bad"]),
    )
    return _parts(folder, splits, about["splits"], first_pair), read


def _listed(stretches: Sequence[Stretch]) -> list[list[int | None]]:
    return [[stretch.file, stretch.start, stretch.stop] for stretch in stretches]


def _parts(folder: Path, splits: Sequence[str], about: dict[str, Any], first_pair: int) -> Iterator[list[Part]]:
    """One split after the other; the others have nothing meanwhile."""
    empty = [_nothing(len(about[name]["sources"])) for name in splits]
    for place, name in enumerate(splits):
        counted = about[name]
        digests, contents = ((folder / name / file).open("rb") for file in _FILES[1:])
        with digests, contents, pa.memory_map(str(folder / name / _FILES[0])) as mapped:
            batches = pa.ipc.open_file(mapped)
            # what is counted comes with the first part: a split may have dropped rows and kept none
            for number in range(max(1, batches.num_record_batches)):
                parts = list(empty)
                batch = batches.get_batch(number) if batches.num_record_batches else empty[place].batch
                rows, first = batch.num_rows, number == 0
                part = Part(
                    batch=batch,
                    digests=digests.read(_DIGEST_BYTES * rows),
                    contents=np.frombuffer(contents.read(8 * rows), np.uint64),
                    counts=np.array(counted["counts"], np.int64) if first else empty[place].counts,
                    sources=np.array(counted["sources"], np.int64) if first else empty[place].sources,
                    shortened_headers=counted["shortened_headers"] if first else 0,
                )
                parts[place] = part.numbered(first_pair)
                yield parts


def _nothing(sources: int) -> Part:
    return Part(
        batch=pa.RecordBatch.from_pylist([], schema=SCHEMA),
        digests=b"",
        contents=np.zeros(0, np.uint64),
        counts=np.zeros((2, len(COUNTS)), np.int64),
        sources=np.zeros((sources, 2), np.int64),
        shortened_headers=0,
    )


def _checksum(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

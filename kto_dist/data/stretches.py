"""Parts of a log's files, so that several hosts can read one large file.

In:  sources, and how many hosts there are. Out: what each host reads: neighbours, which together are the whole log.

JSON lines are cut by bytes, after the end of a line; Parquet between row groups; datasets between rows. Other files are
read from their start and stay whole: what is gzipped, CSV, whose line ends may stand within a quoted field, and a JSON
array.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from kto_dist.data.sources import Source

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A part of a file."""

    file: int
    """Its number in the log."""
    start: int = 0
    """The first byte of JSON lines, the first row group of Parquet, the first row of a dataset."""
    stop: int | None = None
    """Where the next one starts; None: this is the last one of the file."""

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop is None


def share_out(sources: Sequence[Source], count: int, least: int) -> list[tuple[Stretch, ...]]:
    """What each host reads, by bytes: some may read nothing. No file is cut into parts of less than `least` bytes."""
    sizes = [source.size() for source in sources]
    edges = [sum(sizes) * host // count for host in range(1, count)]
    stretches, weights, before = [], [], 0
    for file, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        wanted = _spaced([edge - before for edge in edges], size, least)
        found = _cuts(source, wanted, size) if wanted else {}
        places = [0, *found, None]
        stretches += [Stretch(file=file, start=start or 0, stop=stop) for start, stop in pairwise(places)]
        weights += [stop - start for start, stop in pairwise([0, *found.values(), size])]
        before += size
    return [tuple(stretches[share.start : share.stop]) for share in neighbours(weights, count)]


def neighbours(sizes: Sequence[int], count: int) -> list[range]:
    """Each host's of things with sizes: neighbours([5, 1, 1, 5], 2) -> [0..1, 2..3]. Some may be empty."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    owners = np.minimum(middles * count // max(1, sum(sizes)), count - 1)
    edges = np.searchsorted(owners, np.arange(count + 1))
    return [range(start, stop) for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same, those that follow each other in a file as one."""
    found: list[Stretch] = []
    for stretch in stretches:
        last = found[-1] if found else None
        if last is not None and (last.file, last.stop) == (stretch.file, stretch.start):
            found[-1] = Stretch(file=last.file, start=last.start, stop=stretch.stop)
        else:
            found.append(stretch)
    return found


def _spaced(edges: Sequence[int], size: int, least: int) -> list[int]:
    """Those that leave at least so many bytes on either side."""
    found = [0]
    for edge in edges:
        if edge - found[-1] >= max(1, least) and size - edge >= max(1, least):
            found.append(edge)
    return found[1:]


def _cuts(source: Source, wanted: Sequence[int], size: int) -> Mapping[int, int]:
    """Near these bytes: where a stretch may start -> the bytes before it. Empty for a source that stays whole."""
    if source.kind == "json" and not source.name.endswith(".gz"):
        return _after_lines(source.name, wanted, size)
    if source.kind == "parquet":
        return _between_groups(source.name, wanted, size)
    if source.kind == "dataset":
        rows = len(source.dataset)
        return {row: size * row // rows for row in (rows * byte // size for byte in wanted) if 0 < row < rows}
    return {}


def _after_lines(path: str, wanted: Sequence[int], size: int) -> dict[int, int]:
    places = []
    try:
        with open(path, "rb") as file:
            if _may_be_array(file):
                return {}
            for byte in wanted:
                file.seek(byte - 1)
                file.readline()
                places.append(file.tell())
    except OSError:  # whoever reads it says what is wrong with it
        return {}
    return {place: place for place in places if place < size}


def _may_be_array(file: IO[bytes]) -> bool:
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    while block := file.read(2**16):
        if begun := block.lstrip():
            return begun.startswith(b"[")
    return False


def _between_groups(path: str, wanted: Sequence[int], size: int) -> dict[int, int]:
    try:
        about = pyarrow.parquet.read_metadata(path)
    except (pa.ArrowException, OSError):  # as above
        return {}
    sizes = [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]
    starts = np.cumsum([0, *sizes]) * (size / max(1, sum(sizes)))
    groups = [int(np.abs(starts - byte).argmin()) for byte in wanted]
    return {group: int(starts[group]) for group in groups if 0 < group < len(sizes)}

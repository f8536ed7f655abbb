"""Where to cut rows into chunks: on the boundaries of units where they fit. Host arithmetic, no tensors.

A unit is the sequences that share one coefficient (`losses`): a single one, or a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows that go through the head together: whole units, or a piece of one that is longer than a chunk."""

    start: int
    stop: int
    """rows; may be equal to `start`, for sequences without any"""
    first: int
    last: int
    """sequences first..last-1 touch these rows"""
    complete: bool
    """these sequences have all of their rows in this chunk or before"""
    piece: bool
    """part of one long unit"""


def cut(lengths: Sequence[int], rows: int, unit: int = 1) -> Iterator[Chunk]:
    """At most `rows` rows a chunk. cut([2, 0, 1, 5, 1], 3) -> sequences 0-2, two pieces of 3, sequence 4."""
    start = first = stop = 0
    for number in range(0, len(lengths), unit):
        length = sum(lengths[number : number + unit])
        if stop + length - start > rows and number > first:
            yield Chunk(start=start, stop=stop, first=first, last=number, complete=True, piece=False)
            start, first = stop, number
        if length > rows:
            # of equal size, since a short one costs a pass over dW as well
            for begin, end in evenly(stop, stop + length, rows):
                done = end == stop + length
                yield Chunk(start=begin, stop=end, first=number, last=number + unit, complete=done, piece=True)
            start, first = stop + length, number + unit
        stop += length
    if first < len(lengths):
        yield Chunk(start=start, stop=stop, first=first, last=len(lengths), complete=True, piece=False)


def evenly(start: int, stop: int, most: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """start..stop in as few parts of at most `most` as it takes, of equal size; all but the last a multiple.

    `most` must be a multiple itself. evenly(0, 10, 4) -> 0..3, 3..6, 6..10; evenly(0, 10, 4, 2) -> 0..4, 4..8, 8..10.
    """
    assert most % multiple == 0
    parts = -(-(stop - start) // most)
    if not parts:
        return
    edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
    if multiple > 1:
        size = -(-(stop - start) // (parts * multiple)) * multiple
        edges = [min(stop, start + size * part) for part in range(parts + 1)]
    yield from ((begin, end) for begin, end in pairwise(edges) if begin < end)


# The tile of its result that a matmul's program makes at a time, in large products on today's GPUs.
TILE_ROWS, TILE_COLUMNS = 128, 256
# What a chunk costs beside its products (another pass over dW, a few launches), in units of one wave of tiles.
_CHUNK_COST = 0.1


@lru_cache(maxsize=1024)
def even_rows(total: int, most: int, width: int, processors: int) -> int:
    """Rows a chunk, at most `most`, so that dH = G W (rows, width) keeps a GPU's `processors` busy to the end.

    Its tiles run in waves of one a processor, each over the whole vocabulary, and the last wave takes as long as a full
    one. For 132 processors and width 1024 a chunk of 4,096 rows is one wave (128 tiles), and one of 5,461 is two:
    even_rows(16384, 6000, 1024, 132) = 4224, four chunks in place of three.
    """
    across = -(-width // TILE_COLUMNS)

    def waves(rows: int) -> int:
        return -(-across * -(-rows // TILE_ROWS) // processors)

    fewest = max(1, -(-total // most))
    sizes = [max(1, -(-total // chunks)) for chunks in range(fewest, fewest + 3)]
    costs = [(-(-total // rows) * (waves(rows) + _CHUNK_COST), -rows) for rows in sizes]
    rows = -min(costs)[1]
    # as many as the same waves hold: sequences rarely end where a chunk should
    return max(rows, min(most, waves(rows) * processors // across * TILE_ROWS))

"""Where to cut rows into chunks: on the boundaries of sequences where they fit. Host arithmetic, no tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows that go through the head together: whole sequences, or a piece of one that is longer than a chunk."""

    start: int
    stop: int
    # rows; may be equal, for sequences without any
    first: int
    last: int
    # sequences first..last-1 touch these rows
    complete: bool
    # these sequences have all of their rows in this chunk or before
    piece: bool
    # part of one long sequence


def cut(lengths: Sequence[int], rows: int) -> Iterator[Chunk]:
    """At most `rows` rows a chunk. cut([2, 0, 1, 5, 1], 3) -> sequences 0-2, two pieces of 3, sequence 4."""
    start = first = stop = 0
    for number, length in enumerate(lengths):
        if stop + length - start > rows and number > first:
            yield Chunk(start=start, stop=stop, first=first, last=number, complete=True, piece=False)
            start, first = stop, number
        if length > rows:
            pieces = -(-length // rows)
            for piece in range(pieces):  # of equal size, since a short one costs a pass over dW as well
                begin, end = (stop + length * k // pieces for k in (piece, piece + 1))
                done = piece == pieces - 1
                yield Chunk(start=begin, stop=end, first=number, last=number + 1, complete=done, piece=True)
            start, first = stop + length, number + 1
        stop += length
    if first < len(lengths):
        yield Chunk(start=start, stop=stop, first=first, last=len(lengths), complete=True, piece=False)

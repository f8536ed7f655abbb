"""A shard's bytes, and many shards as one table that is searched.

    key      16 bytes   128-bit hash of a pair's token ids
    logp     fp64       the reference's log-prob of the completion
    tokens   int32      how many tokens the completion has

A shard is a Parquet file, sorted by key, that names the reference which it belongs to; its own name is the sha256 of
its bytes. So a damaged one is found by its name, one that was copied from another model's folder by its content, and
neither needs anything but the file itself.

In:  arrays. Out: bytes, and back: `Pairs`, sorted, a key once.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
NAME = re.compile(r"[0-9a-f]{64}\.parquet")
BYTES_A_PAIR = 28  # of the columns; a shard of two thousand pairs takes half a byte more for each
SCHEMA = pa.schema([("key", pa.binary(16)), ("logp", pa.float64()), ("tokens", pa.int32())])


class BadShard(Exception):
    """Bytes that are not what their name or their folder says; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Values by key, sorted by the key's first half; every key stands once."""

    high: np.ndarray  # (P,) uint64
    low: np.ndarray  # (P,) uint64
    logps: np.ndarray  # (P,) fp64
    tokens: np.ndarray  # (P,) int32

    def __len__(self) -> int:
        return self.high.size

    def keys(self) -> np.ndarray:  # (P,) KEY
        keys = np.empty(len(self), KEY)
        keys["high"], keys["low"] = self.high, self.low
        return keys

    def __getitem__(self, rows: slice | np.ndarray) -> "Pairs":
        return Pairs(high=self.high[rows], low=self.low[rows], logps=self.logps[rows], tokens=self.tokens[rows])

    def find(self, keys: np.ndarray) -> np.ndarray:  # (Q,) KEY -> (Q,) int64, the row of each, -1 where it is not here
        # In their order a search begins where the one before ended, in memory that is cached.
        order = np.argsort(keys["high"])
        rows = np.empty(keys.size, np.int64)
        rows[order] = _find(self.high, self.low, keys["high"][order], keys["low"][order])
        return rows


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (P,) KEY
    """(U,) where each key stands first, in their order, and (P,) which of these every key is. (`np.unique` compares
    records slowly, and so does a sort by both halves: the first one alone tells nearly all keys apart.)"""
    order = np.argsort(keys["high"])
    high = keys["high"][order]
    again = 1 + np.flatnonzero(high[1:] == high[:-1])
    tied = np.zeros(keys.size, dtype=bool)
    tied[again], tied[again - 1] = True, True
    rows = np.flatnonzero(tied)
    among = order[rows]
    order[rows] = among[np.lexsort((among, keys["low"][among], high[rows]))]
    new = np.ones(keys.size, dtype=bool)
    new[again] = keys["low"][order[again]] != keys["low"][order[again - 1]]
    same_as = np.empty(keys.size, np.int64)
    same_as[order] = np.cumsum(new) - 1
    return order[new], same_as


def _find(high: np.ndarray, low: np.ndarray, sought_high: np.ndarray, sought_low: np.ndarray) -> np.ndarray:
    """(Q,) int64, the row of each among (P,) keys that are sorted by their first half; -1 where it is none."""
    rows = np.full(sought_high.size, -1)
    place = np.searchsorted(high, sought_high)
    # the same first half with another second half is one in 2^64; walk over such neighbours all the same
    pending = np.flatnonzero(place < high.size)
    while pending.size:
        here = place[pending]
        same_high = high[here] == sought_high[pending]
        hit = same_high & (low[here] == sought_low[pending])
        rows[pending[hit]] = here[hit]
        pending = pending[same_high & ~hit]
        place[pending] += 1
        pending = pending[place[pending] < high.size]
    return rows


class Wanted:
    """Values of P pairs, taken from one shard after the other: a store may hold far more than a run wants, and more
    than there is memory for. Of several values of a pair the smallest counts, as in `merge`."""

    def __init__(self, keys: np.ndarray):  # (P,) KEY, in whatever order; equal ones have one value
        first, self._of_pair = distinct(keys)
        self._high, self._low = keys["high"][first], keys["low"][first]
        self._logps = np.full(self._high.size, np.inf)

    def take(self, high: np.ndarray, low: np.ndarray, logps: np.ndarray) -> None:
        """(Q,) each: keys, and their values. Fastest where they are sorted, as in a shard."""
        rows = _find(self._high, self._low, high, low)
        hit = rows >= 0
        np.minimum.at(self._logps, rows[hit], logps[hit])

    def values(self) -> tuple[np.ndarray, np.ndarray]:  # (P,) fp64, (P,) bool
        """And whether each has come; one that has not is 0."""
        logps = self._logps[self._of_pair]
        found = np.isfinite(logps)
        logps[~found] = 0
        return logps, found


EMPTY = Pairs(high=np.zeros(0, np.uint64), low=np.zeros(0, np.uint64), logps=np.zeros(0), tokens=np.zeros(0, np.int32))


def merge(parts: Sequence[Pairs]) -> Pairs:
    """All of them, sorted, a key once: of several values of a pair the smallest counts.

    Two devices may round a value differently and both store it. Which one counts must not hang on who asks, on the
    shards' names or on the order of a listing; the smallest is a function of the values alone.
    """
    if not parts:
        return EMPTY
    order = np.argsort(np.concatenate([part.high for part in parts]))

    def sorted_column(name: str) -> np.ndarray:
        # one after the other: the parts and the result are as much memory as a store of millions should take
        return np.concatenate([getattr(part, name) for part in parts])[order]

    high, low, logps, tokens = map(sorted_column, ("high", "low", "logps", "tokens"))
    again = 1 + np.flatnonzero(high[1:] == high[:-1])  # rows whose first half is that of the row before
    if not again.size:
        return Pairs(high=high, low=low, logps=logps, tokens=tokens)
    tied = np.zeros(order.size, dtype=bool)
    tied[again], tied[again - 1] = True, True
    rows = np.flatnonzero(tied)
    ranked = rows[np.lexsort((logps[rows], low[rows], high[rows]))]
    for column in (low, logps, tokens):
        column[rows] = column[ranked]
    keep = np.ones(order.size, dtype=bool)
    keep[again] = low[again] != low[again - 1]
    return Pairs(high=high, low=low, logps=logps, tokens=tokens)[keep]


def disagreements(parts: Sequence[Pairs]) -> tuple[int, float]:
    """Pairs that stand in several parts, and the largest difference between two values of one of them."""
    whole = merge(parts)
    times = np.zeros(len(whole), np.int64)
    largest = np.full(len(whole), -np.inf)
    for part in parts:
        rows = whole.find(part.keys())
        np.add.at(times, rows, 1)
        np.maximum.at(largest, rows, part.logps)
    several = times > 1
    return int(several.sum()), float((largest - whole.logps)[several].max(initial=0.0))


def key_column(keys: np.ndarray) -> pa.FixedSizeBinaryArray:  # (P,) KEY
    keys = np.ascontiguousarray(keys)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), keys.size, [None, pa.py_buffer(keys)])


def encode(keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray, fingerprint: str) -> tuple[str, bytes]:
    """A shard's name and bytes.

    The bytes say when they were written and carry a random number, so that no two shards have one name: who finds a
    damaged file can move it away by its name without touching a good one that has been written in its place.
    """
    order = np.argsort(keys["high"])
    schema = SCHEMA.with_metadata({"fingerprint": fingerprint, "written": f"{time.time_ns()} {uuid.uuid4().hex}"})
    table = pa.table(
        [key_column(keys[order]), pa.array(logps[order]), pa.array(tokens[order], pa.int32())], schema=schema
    )
    sink = pa.BufferOutputStream()
    # hashes and sums of logarithms don't compress
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    data = sink.getvalue().to_pybytes()
    return f"{hashlib.sha256(data).hexdigest()}.parquet", data


def decode(name: str, data: bytes, fingerprint: str) -> Pairs:
    """What a shard holds. Raises `BadShard` unless every byte is what was written, for this reference."""
    if f"{hashlib.sha256(data).hexdigest()}.parquet" != name:
        raise BadShard("is damaged")
    try:
        # read_table would set up a data set: ten times as slow for a small shard
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise BadShard(f"is no Parquet file ({error})") from None
    if not table.schema.equals(SCHEMA):
        raise BadShard("is no shard of log-probs")
    if (table.schema.metadata or {}).get(b"fingerprint") != fingerprint.encode():
        raise BadShard("belongs to another reference")
    if any(column.null_count for column in table.columns):
        raise BadShard("lacks values")
    column = table["key"].combine_chunks()
    keys = np.frombuffer(column.buffers()[1], KEY, count=len(column), offset=column.offset * KEY.itemsize)
    logps = table["logp"].to_numpy()
    if not np.isfinite(logps).all():
        raise BadShard("holds values that are not finite")
    return Pairs(high=keys["high"], low=keys["low"], logps=logps, tokens=table["tokens"].to_numpy())

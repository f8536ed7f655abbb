"""How workers divide the pairs of a list: pieces that all of them cut alike, whoever comes when.

A piece is a function of the pairs that a run needs and of nothing else: not of what is stored already, of the order of
the rows, or of the device. Pairs of one prompt stay together where they fit, so that its tokens are read once where
prompts are shared. The longest come first, as in a pass.

In:  keys, prompts and lengths of different pairs. Out: `Pieces`, their names and which pairs each has.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kto_dist.store.shards import Pairs

CUT = 1
"""Of `cut_pieces`; it rises with any change of what it returns. Workers with different pieces score the same pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """P different pairs in pieces."""

    names: list[str]
    """The first digits of a hash of the keys, so that other pairs are another piece."""
    places: np.ndarray
    """(P,) int64 into the pairs, piece after piece."""
    starts: np.ndarray
    """(pieces + 1,) int64 into `places`."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, piece: int) -> np.ndarray:
        return self.places[self.starts[piece] : self.starts[piece + 1]]

    @property
    def of_pair(self) -> np.ndarray:
        """(P,) which piece every pair is in."""
        number = np.empty(self.places.size, np.int64)
        number[self.places] = np.repeat(np.arange(len(self)), np.diff(self.starts))
        return number


def cut_pieces(
    keys: np.ndarray,  # (P,) KEY, all different
    prompt_group: np.ndarray,  # (P,) int64, equal where the prompt's tokens are
    tokens: np.ndarray,  # (P,) int64, prompts and completions
    *,
    most: int,  # tokens that a piece is cut at
) -> Pieces:
    if not keys.size:
        return Pieces(names=[], places=np.zeros(0, np.int64), starts=np.zeros(1, np.int64))
    longest = np.zeros(int(prompt_group.max()) + 1, np.int64)
    np.maximum.at(longest, prompt_group, tokens)
    # a group is known by its smallest key: its number depends on the order of the rows
    by_key = np.lexsort((keys["low"], keys["high"]))
    rank = np.empty(keys.size, np.int64)
    rank[by_key] = np.arange(keys.size)
    smallest = np.full(longest.size, keys.size, np.int64)
    np.minimum.at(smallest, prompt_group, rank)
    order = np.lexsort((rank, -tokens, smallest[prompt_group], -longest[prompt_group]))

    group, counted = prompt_group[order], tokens[order].astype(np.int64)
    before = np.cumsum(counted) - counted
    first = np.insert(group[1:] != group[:-1], 0, True)
    group_before = before[np.maximum.accumulate(np.where(first, np.arange(order.size), 0))]
    # where the group begins decides, and what is wider than a piece is cut
    number = np.stack([group_before // most, np.where(first, 0, before - group_before) // most])
    new = np.insert((number[:, 1:] != number[:, :-1]).any(axis=0), 0, True)
    starts = np.append(np.flatnonzero(new), order.size)
    names = [
        hashlib.blake2b(np.ascontiguousarray(keys[order[start:stop]]).tobytes(), digest_size=8).hexdigest()
        for start, stop in pairwise(starts)
    ]
    return Pieces(names=names, places=order, starts=starts)


class Tally:
    """Which of some pairs are stored by now, told by the shards that come."""

    def __init__(self, keys: np.ndarray):  # (P,) KEY, all different
        self._order = np.lexsort((keys["low"], keys["high"]))
        ordered = keys[self._order]
        nothing = np.zeros(keys.size)
        self._sorted = Pairs(
            high=ordered["high"], low=ordered["low"], logps=nothing, tokens=np.zeros(keys.size, np.int32)
        )
        self.found = np.zeros(keys.size, dtype=bool)
        """(P,)"""

    def forget(self) -> None:
        self.found[:] = False

    def add(self, shard: Pairs) -> None:
        rows = self._sorted.find(shard.keys())
        self.found[self._order[rows[rows >= 0]]] = True

"""A pair's key: 128 bits from the token ids of its prompt and of its completion, and of nothing else.

The key is the sum of two 128-bit digests, one of each side. A run has twice as many pairs as rows and every row's
sides return in several of them, so each side is hashed once a row, and pairs cost an addition. The digests are those of
a cryptographic hash, with another personalisation for either side: two pairs share a key by chance alone, with a
probability of 2^-128, and where a prompt ends is part of the key.

In:  rows and how many tokens of them a pair keeps. Out: arrays of `KEY`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kto_dist.base import comm
from kto_dist.data.examples import Examples
from kto_dist.store.shards import KEY

_SIDES = {"prompt": b"kto prompt", "completion": b"kto completion"}


AT_ONCE = 2**20
"""Pairs whose keys are added up at a time: what is made on the way stays small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Digests:
    """Of one side of P pairs, a digest a row: pairs are twice as many. `digests[places]` are those of (Q,) pairs."""

    rows: np.ndarray
    """(P,) rows that give this side."""
    of_row: np.ndarray
    """(N,) KEY, of the rows that some pair keeps whole."""
    cut: np.ndarray
    """(C,) pairs that keep less of their row, in order."""
    of_cut: np.ndarray
    """(C,) KEY"""

    def __getitem__(self, places: np.ndarray) -> np.ndarray:  # (Q,) int64 -> (Q,) KEY
        found = self.of_row[self.rows[places]]
        if self.cut.size:
            where = np.minimum(np.searchsorted(self.cut, places), self.cut.size - 1)
            hit = self.cut[where] == places
            found[hit] = self.of_cut[where[hit]]
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class PairKeys:
    keys: np.ndarray
    """(P,) KEY."""
    prompts: Digests
    """Of the prompts alone: equal where pairs have the same prompt, cut alike."""


def pair_keys(
    examples: Examples,
    prompts: np.ndarray,  # (P,) rows that give the prompt
    completions: np.ndarray,  # (P,) rows that give the completion
    prompt_kept: np.ndarray,  # (P,) tokens, from the prompt's end
    completion_kept: np.ndarray,  # (P,) tokens, from the completion's start
) -> PairKeys:
    """Collective: every rank hashes its share of the rows."""
    front = _side(examples, "prompt", prompts, prompt_kept)
    back = _side(examples, "completion", completions, completion_kept)
    keys = np.empty(prompts.size, KEY)
    for start in range(0, prompts.size, AT_ONCE):
        places = np.arange(start, min(start + AT_ONCE, prompts.size))
        keys[places] = _sum(front[places], back[places])
    return PairKeys(keys=keys, prompts=front)


def _sum(front: np.ndarray, back: np.ndarray) -> np.ndarray:
    keys = np.empty(front.size, KEY)
    for half in ("high", "low"):
        keys[half] = front[half] + back[half]  # wraps around
    return keys


def _side(examples: Examples, side: str, rows: np.ndarray, kept: np.ndarray) -> Digests:
    """A row that is cut in some pairs only has a digest for each length."""
    lengths = examples.prompt_lengths if side == "prompt" else examples.completion_lengths
    whole = kept == lengths[rows]
    wanted = np.zeros(len(examples), dtype=bool)
    wanted[rows[whole]] = True
    shared = np.flatnonzero(wanted)
    cut = np.flatnonzero(~whole)
    # Pairs that cut a row are few: an over-long prompt with an over-long completion.
    all_rows = np.concatenate([shared, rows[cut]])
    all_kept = np.concatenate([lengths[shared], kept[cut]])
    found = _hashed_by_all_ranks(examples, side, all_rows, all_kept)
    of_row = np.zeros(len(examples), KEY)
    of_row[shared] = found[: shared.size]
    return Digests(rows=rows, of_row=of_row, cut=cut, of_cut=found[shared.size :].copy())


def _hashed_by_all_ranks(examples: Examples, side: str, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:  # (R,) KEY
    ranks, rank = comm.world_size(), comm.rank()
    bounds = [rows.size * turn // ranks for turn in range(ranks + 1)]
    own = slice(bounds[rank], bounds[rank + 1])
    return np.concatenate(comm.gather(_hashed(examples, side, rows[own], kept[own])))


def _hashed(examples: Examples, side: str, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    digests = np.zeros(rows.size, KEY)
    order = np.argsort(rows, kind="stable")
    first, done = 0, 0
    for offsets, values in examples.token_chunks(side):
        after = int(np.searchsorted(rows, first + len(offsets) - 1, sorter=order))
        here = order[done:after]
        local = rows[here] - first
        if side == "prompt":
            stops = offsets[local + 1]
            starts = stops - kept[here]
        else:
            starts = offsets[local]
            stops = starts + kept[here]
        width = 4  # bytes of a token id
        ids = _bytes(values).data
        digests[here] = _digests(side, ids, (starts * width).tolist(), (stops * width).tolist())
        first, done = first + len(offsets) - 1, after
    return digests


def _digests(side: str, ids: memoryview, starts: Sequence[int], stops: Sequence[int]) -> np.ndarray:  # KEY
    person, blake2b = _SIDES[side], hashlib.blake2b
    found = [
        blake2b(ids[start:stop], digest_size=16, person=person).digest()
        for start, stop in zip(starts, stops, strict=True)
    ]
    return np.frombuffer(b"".join(found), KEY)


def _bytes(ids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(ids, dtype="<i4").view(np.uint8)

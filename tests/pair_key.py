"""The definition of a pair's key, for one pair at a time and in plain numbers.

It shares no code with kto_dist/keys.py: a change of either by which stored values would not be found again is seen.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from kto_dist.store.shards import KEY


def pair_key(prompt: Iterable[int], completion: Iterable[int]) -> bytes:
    """16 bytes, as a shard holds them: two 64-bit sums that wrap around, of the digests of both sides."""
    sides = ((b"kto prompt", prompt), (b"kto completion", completion))
    digests = [
        hashlib.blake2b(b"".join(int(token).to_bytes(4, "little") for token in ids), digest_size=16, person=person)
        for person, ids in sides
    ]
    halves = zip(*((digest.digest()[:8], digest.digest()[8:]) for digest in digests), strict=True)
    sums = [sum(int.from_bytes(part, "little") for part in half) % 2**64 for half in halves]
    return b"".join(total.to_bytes(8, "little") for total in sums)


def keys_array(keys: list[bytes]) -> np.ndarray:  # (P,) KEY
    return np.frombuffer(b"".join(keys), dtype=KEY)

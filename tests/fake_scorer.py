"""A reference that costs nothing: pair number n has a key and, for each model, a value that are functions of n.

As a program it stores pairs FIRST..LAST in shards, and says after each how far it is: a job to kill and to race.
"""

import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_dist.base.errors import UserError
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.shards import KEY, NAME
from kto_dist.store.store import FORMAT, Store

IDENTITY = Fingerprint(weights="w", config="c", dtype="float32", logits="float32", attention="sdpa")
OTHER = Fingerprint(weights="w", config="c", dtype="bfloat16", logits="float32", attention="sdpa")


def keys_of(pairs: Sequence[int]) -> np.ndarray:  # (P,) KEY
    return np.frombuffer(b"".join(hashlib.blake2b(b"%d" % n, digest_size=16).digest() for n in pairs), dtype=KEY)


def value_of(identity: Fingerprint, pairs: Sequence[int]) -> np.ndarray:  # (P,) fp64
    own = int(identity.digest[:8], 16) / 2**32
    return -np.asarray(pairs, dtype=np.float64) - own


def fill(store: Store, pairs: Sequence[int], identity: Fingerprint | None = None, noise: float = 0.0) -> None:
    """One shard."""
    identity = identity or (OTHER if store.folder.path.name == OTHER.digest[:32] else IDENTITY)
    store.add(keys_of(pairs), value_of(identity, pairs) + noise, np.ones(len(pairs)))


def shards_of(store: Store) -> list[Path]:
    return sorted(path for path in store.folder.path.iterdir() if NAME.fullmatch(path.name))


def without_checksum(manifest: Path) -> dict[str, Any]:
    """A manifest's content as older versions wrote it."""
    return {name: value for name, value in json.loads(manifest.read_text()).items() if name != "checksum"}


def of_format(manifest: Path, number: int) -> dict[str, Any]:
    """A manifest's content as another version writes it: later ones have a checksum, the older one knew no facts."""
    content = {**without_checksum(manifest), "format": number}
    if number < FORMAT:
        return {name: content[name] for name in ("format", "fingerprint", *IDENTITY.to_dict())}
    return {**content, "checksum": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


FILL = [sys.executable, __file__]
"""This module as a program."""


def run_fill(root: Path, first: int, last: int, **options: object) -> subprocess.Popen:
    """A process of its own that stores pairs first..last, a shard after the other."""
    arguments = [f"{name}={value}" for name, value in options.items()]
    return subprocess.Popen([*FILL, str(root), str(first), str(last), *arguments], stdout=subprocess.PIPE, text=True)


def found_in(root: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    return Store(root, IDENTITY, warn=lambda text: None).lookup(keys_of(range(count)))


def main() -> None:
    root, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = dict(argument.split("=") for argument in sys.argv[4:])
    shard, noise = int(options.get("shard", 50)), float(options.get("noise", 0))
    if "largest_file" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(options["largest_file"]),) * 2)
    with Store(root, IDENTITY) as store:
        store.begin(last - first)
        for start in range(first, last, shard):
            fill(store, range(start, min(start + shard, last)), IDENTITY, noise)
            print(min(start + shard, last), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as refusal:
        assert "make room" in str(refusal)
        sys.exit(2)

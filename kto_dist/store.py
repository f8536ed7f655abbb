"""The reference's log-probs on disk: a value a pair, computed once, ever.

A store is a folder; every reference model has a sub-folder of its own, named by the model's fingerprint:

    <store>/<fingerprint>/manifest.json           what was scored: the whole fingerprint and what went into it
    <store>/<fingerprint>/<sha256>.parquet        a shard: key (16 bytes), logp (fp64), tokens (int32)

Shards are written whole or not at all (temporary name, fsync, rename), by whichever rank computed them, and are named
by the hash of their bytes: a damaged one is found when it is read, set aside, and its pairs are computed again.

A pair's key is a 128-bit hash of its token ids, so that nothing but the reference and the text decides its value.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_dist.errors import UserError
from kto_dist.files import sha256_of, write_whole

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
FORMAT = 1
_SEPARATOR = b"\xff\xff\xff\xff"  # no token has the id -1
_SCHEMA = pa.schema([("key", pa.binary(16)), ("logp", pa.float64()), ("tokens", pa.int32())])


def pair_key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """16 bytes from the token ids (int32) of a prompt and a completion."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4"))
    digest.update(_SEPARATOR)
    digest.update(np.ascontiguousarray(completion, dtype="<i4"))
    return digest.digest()


def keys_array(keys: list[bytes]) -> np.ndarray:  # (P,) KEY
    return np.frombuffer(b"".join(keys), dtype=KEY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What decides the reference's log-probs: never a path, never parameters in memory."""

    weights: str
    # sha256 over the hashes of the weight files
    config: str
    # sha256 of the model's configuration
    dtype: str
    logits: str
    # precision of the logits, which depends on the device
    attention: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.__slots__}


# What names a file or a tool, not the function that the model computes.
_IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"}


def fingerprint(
    folder: Path, gguf_file: str | None, model_config: dict[str, Any], *, dtype: str, logits: str, attention: str
) -> Fingerprint:
    """Hashes the weight files of a model folder, several at a time. Raises `UserError` where there are none."""
    if gguf_file:
        files = [folder / gguf_file]
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"the reference's folder ({folder}) holds no *.safetensors or pytorch_model*.bin to score with")
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(sha256_of, files))
    kept = {key: value for key, value in model_config.items() if key not in _IRRELEVANT}
    return Fingerprint(
        weights=hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest(),
        config=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
        dtype=dtype,
        logits=logits,
        attention=attention,
    )


class Store:
    """The log-probs of one reference. Cheap to open; `lookup` reads the shards once."""

    def __init__(self, root: str | Path, identity: Fingerprint, warn: Callable[[str], None] = print):
        """Creates the folder if needed. Raises `UserError` when it belongs to another model or can't be written."""
        self.folder = Path(root) / identity.digest[:32]
        self._warn = warn
        manifest = self.folder / "manifest.json"
        content = {"format": FORMAT, "fingerprint": identity.digest, **identity.to_dict()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists():
                write_whole(manifest, json.dumps(content, indent=1).encode())
            found = json.loads(manifest.read_text())
        except OSError as error:
            raise UserError(
                f"reference.store ({root}) cannot be written: {error}; give a folder that this user may write to"
            ) from None
        except json.JSONDecodeError:
            raise UserError(f"{manifest} is damaged: delete {self.folder}, and its pairs are scored again") from None
        if found != content:
            differing = sorted(key for key in content if found.get(key) != content[key])
            raise UserError(
                f"{self.folder} belongs to another reference (they differ in {', '.join(differing)}): "
                "delete it, or give another reference.store"
            )
        self._known: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (P,) KEY -> (P,) fp64, (P,) bool
        """Values and whether each was found; a value that was not found is 0."""
        if self._known is None:
            self._known = self._read()
        high, low, value = self._known
        logps, found = np.zeros(keys.size), np.zeros(keys.size, dtype=bool)
        place = np.searchsorted(high, keys["high"])
        # the same first half with another second half is one in 2^64; walk over such neighbours all the same
        pending = np.flatnonzero(place < high.size)
        while pending.size:
            here = place[pending]
            same_high = high[here] == keys["high"][pending]
            hit = same_high & (low[here] == keys["low"][pending])
            logps[pending[hit]], found[pending[hit]] = value[here[hit]], True
            pending = pending[same_high & ~hit]
            place[pending] += 1
            pending = pending[place[pending] < high.size]
        return logps, found

    def add(self, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> None:
        """Writes one shard; it is found by the next `Store` on this folder."""
        if not keys.size:
            return
        packed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), keys.size, [None, pa.py_buffer(keys.tobytes())])
        table = pa.table([packed, pa.array(logps), pa.array(tokens, pa.int32())], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        data = sink.getvalue().to_pybytes()
        write_whole(self.folder / f"{hashlib.sha256(data).hexdigest()}.parquet", data)

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys, values = [np.zeros(0, KEY)], [np.zeros(0)]
        for shard in sorted(self.folder.glob("*.parquet")):
            table = self._read_shard(shard)
            if table is not None:
                column = table["key"].combine_chunks()
                start = column.offset * KEY.itemsize
                keys.append(np.frombuffer(column.buffers()[1], KEY, count=len(column), offset=start))
                values.append(table["logp"].to_numpy())
        key, value = np.concatenate(keys), np.concatenate(values)
        order = np.argsort(key["high"], kind="stable")
        return key["high"][order], key["low"][order], value[order]

    def _read_shard(self, shard: Path) -> pa.Table | None:
        # every rank reads, and whoever finds the damage first sets the shard aside
        try:
            data = shard.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != shard.stem:
            with contextlib.suppress(FileNotFoundError):
                os.replace(shard, shard.with_suffix(".damaged"))
            self._warn(f"{shard.name} in the reference store is damaged: set aside, its pairs will be scored again")
            return None
        return pq.read_table(pa.BufferReader(data), schema=_SCHEMA)

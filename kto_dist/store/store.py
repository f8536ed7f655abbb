"""The reference's log-probs on disk or in an object store: a value a pair, computed once, ever.

A store is a folder (or a URL); every reference model has a sub-folder of its own, named by the model's fingerprint:

    <store>/<fingerprint>/manifest.json           what was scored: the fingerprint, what went into it, facts to read,
                                                  and a checksum of these
    <store>/<fingerprint>/<sha256>.parquet        a shard of pairs (see shards.py), never changed once it is there
    <store>/<fingerprint>/used.json               when it was last used, to the hour
    <store>/<fingerprint>/use-<id>.json           a job is at work here: `kto-dist store gc` leaves the folder alone
    <store>/<fingerprint>/piece-<id>.<n>.json     a worker scores a piece of what is missing (see leases.py)
    <store>/<fingerprint>/workers.json            what its pairs were scored on (see reference/worker.py)
    <store>/<fingerprint>/<name>.damaged          set aside: not what its name says

Any number of jobs read and write at the same time without locks: a shard appears whole or not at all, under a name of
its own, and two values of one pair are settled by a rule (`shards.merge`). Whoever reads checks every byte; a shard
that is not what it should be is set aside, and its pairs are computed again.
"""

import contextlib
import errno
import hashlib
import json
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import numpy as np

from kto_dist.base.errors import UserError
from kto_dist.base.processes import lives, named, whereabouts
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.shards import BYTES_A_PAIR, NAME, BadShard, Pairs, Wanted, decode, encode
from kto_dist.store.storage import FULL, Root, Storage, open_storage

FORMAT = 2
MANIFEST, USED = "manifest.json", "used.json"
_CHECKSUM = "checksum"
FOLDER_DIGITS = 32
"""Of a fingerprint's 64, in the folder's name."""
MANY_SHARDS = 2000
"""Beyond which a listing is longer than it needs to be."""
_RENEWED_AFTER = 3600.0
LEASE_SECONDS = 24 * 3600.0
"""A use that was not renewed for so long, by another machine, has ended without saying so."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Store:
    """The log-probs of one reference. Cheap to open; each `lookup` reads and checks all shards, and keeps nothing.

    Reading needs no permission to write. `begin` asks for it ahead of the first `add`, and `close` ends the use.
    """

    def __init__(
        self,
        root: Root,
        fingerprint: Fingerprint,
        warn: Callable[[str], None] = print,
        model: str = "",
    ):
        """`model`: what people call it, for `kto-dist store ls`; it decides nothing.

        Creates the folder if needed. Raises `UserError` when it belongs to another model, or isn't there and can't be
        created.
        """
        self._root, self._digest, self._warn = root, fingerprint.digest, warn
        self.folder = open_storage(root) / self._digest[:FOLDER_DIGITS]
        self._settle_manifest(fingerprint, model)
        with contextlib.suppress(OSError):  # a store that cannot be written can be read all the same
            _note_use(self.folder)
        self._told: set[str] = set()
        self._added: set[str] = set()
        self._lease: str | None = None
        self._renewed = 0.0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle_manifest(self, fingerprint: Fingerprint, model: str) -> None:
        content = {"format": FORMAT, "fingerprint": self._digest, **fingerprint.to_dict()}
        try:
            found = read_manifest(self.folder)
            if not found:
                # each shard names its reference as well, so a lost or damaged manifest costs nothing
                if found is not None:
                    self._warn(f"{MANIFEST} in the reference store ({self.folder}) is damaged: it is written again")
                facts = {"model": model, "created": _timestamp(), "platform": platform.platform()}
                self.folder.write(MANIFEST, _sealed({**content, **facts}))
                found = content
        except OSError as error:
            raise self._refusal(error, "cannot be opened or created") from None
        self._check_manifest(found, content)

    def _check_manifest(self, found: dict[str, Any], content: dict[str, Any]) -> None:
        written = found.get("format")
        if written != FORMAT:
            # Nothing here says to remove the manifest: to this version the shards of another format look damaged.
            older = type(written) is int and written < FORMAT
            clear = f"; `kto-dist store gc {self._root} --fingerprint {self._digest[:12]}` removes it" if older else ""
            raise UserError(
                f"{self.folder} is of format {written}, and this version of kto_dist knows format {FORMAT}: give "
                f"another reference.store, or use the version of kto_dist that wrote it{clear}"
            )
        differing = [
            f"{key} is {found.get(key)} there and {value} here"
            for key, value in content.items()
            if found.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{self.folder} belongs to another reference ({'; '.join(differing)}): remove its {MANIFEST}, which "
                "loses no pair of this one, or give another reference.store"
            )

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (P,) KEY -> (P,) fp64, (P,) bool
        """Values and whether each was found; a value that was not found is 0."""
        wanted = Wanted(keys)
        self.tell(wanted)
        return wanted.values()

    def tell(self, *lists: Wanted) -> None:
        """Gives each of them what is stored, for which every shard is read once. Takes the memory of a few shards,
        however much the store holds."""
        for pairs in self._read(set()):
            for wanted in lists:
                wanted.take(pairs.high, pairs.low, pairs.logps)

    def begin(self, pairs: int = 0) -> None:
        """To be called ahead of long work: raises `UserError` unless `pairs` more can be written, and says that this
        process is at work here."""
        try:
            free = self.folder.free()
        except OSError as error:
            raise self._refusal(error, "lacks pairs of this run, but its free space is unknown") from None
        if free is not None and free < pairs * (BYTES_A_PAIR + 1):
            raise UserError(
                f"reference.store ({self._root}) has {free:,} bytes left, but lacks {pairs:,} pairs, which take "
                f"{pairs * (BYTES_A_PAIR + 1):,}: make room, or give another reference.store"
            )
        self._lease = self._lease or f"use-{uuid.uuid4().hex}.json"
        try:
            self._renew()
        except OSError as error:
            raise self._refusal(error, "lacks pairs of this run, but cannot be written") from None

    def add(self, keys: np.ndarray, logps: np.ndarray, tokens: np.ndarray) -> None:
        """Writes one shard, which is there for good when this returns.

        Raises `UserError` when a value is not finite, or the store is full or cannot be written.
        """
        if not keys.size:
            return
        broken = int(np.count_nonzero(~np.isfinite(logps)))
        if broken:
            raise UserError(
                f"the reference gives {broken:,} of {keys.size:,} pairs a log-prob that is no finite number: its "
                "weights are damaged, or overflow in reference.dtype; try fp32"
            )
        name, data = encode(keys, logps, tokens, self._digest)
        try:
            self.folder.write(name, data)
            self._added.add(name)
            if self._lease and time.monotonic() - self._renewed > _RENEWED_AFTER:
                self._renew()
        except OSError as error:
            raise self._refusal(error, f"cannot take {keys.size:,} more pairs") from None

    def close(self) -> None:
        """Ends the use; what was read stays usable."""
        if self._lease:
            with contextlib.suppress(OSError):  # it will count as ended when this process has
                self.folder.remove(self._lease)
            self._lease = None

    def _renew(self) -> None:
        assert self._lease
        self.folder.write(self._lease, json.dumps({"time": time.time(), **whereabouts()}).encode())
        self._renewed = time.monotonic()

    def news(self) -> Iterator[Pairs]:
        """What has come since this was asked last, by whomever, a shard at a time; the first time all that is there.

        `lookup` knows nothing of this.
        """
        return self._read(self._told)

    def has_lost(self) -> bool:
        """Whether shards are gone that `news` has told of, or that were added here; `news` then tells again all that is
        there."""
        try:
            # a listing may lag behind
            unlisted = (self._told | self._added) - {file.name for file in self.folder.files()}
            lost = any(not self._has(name) for name in unlisted)
        except OSError as error:
            raise self._refusal(error, "cannot be read") from None
        if lost:
            self._told.clear()
            self._added.clear()
        return lost

    def _has(self, name: str) -> bool:
        try:
            with self.folder.open(name):
                return True
        except FileNotFoundError:
            return False

    def _read(self, seen: set[str]) -> Iterator[Pairs]:
        """The shards that are not in `seen`, which gets their names."""
        bad: set[str] = set()
        anew = not seen
        # Merging shards replaces many by one, perhaps while they are listed or read. A listing that was begun after
        # the last byte was read, and names nothing new, shows that nothing was missed.
        for attempt in range(10):
            names = self._listed()
            wanted = [name for name in names if name not in seen]
            if not wanted and (attempt or not anew):
                break
            # as many at a time as the storage likes: what is read waits in memory until it is taken
            for start in range(0, len(wanted), self.folder.concurrency):
                for name, result in self._read_some(wanted[start : start + self.folder.concurrency]):
                    seen.add(name)
                    if isinstance(result, Pairs):
                        yield result
                    else:
                        bad.add(name)
                        self._warn(f"{name} in the reference store {result}: set aside, its pairs will be scored again")
            if set(names) - seen:  # a listing may show for a while what is gone
                time.sleep(0.05 * attempt)
        seen -= bad - set(names)
        if anew and len(names) > MANY_SHARDS:
            self._warn(
                f"the reference store has {len(names):,} shards for this model, and opens faster with few: "
                f"`kto-dist store gc {self._root}` merges them"
            )

    def _listed(self) -> list[str]:
        try:
            return [file.name for file in self.folder.files() if NAME.fullmatch(file.name)]
        except OSError as error:
            raise self._refusal(error, "cannot be read") from None

    def _read_some(self, names: Sequence[str]) -> list[tuple[str, Pairs | BadShard]]:
        """Those of them that are not gone."""
        try:
            with ThreadPoolExecutor(max_workers=self.folder.concurrency) as pool:
                results = list(pool.map(self._read_shard, names))
        except OSError as error:
            raise self._refusal(error, "cannot be read") from None
        return [(name, result) for name, result in zip(names, results, strict=True) if result is not None]

    def _read_shard(self, name: str) -> Pairs | BadShard | None:
        """None where it is gone."""
        try:
            data = self.folder.read(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: it was removed while it was read
                return None
            raise
        try:
            return decode(name, data, self._digest)
        except BadShard as bad:
            # every rank reads, and whoever finds the damage first sets the shard aside
            with contextlib.suppress(OSError):
                self.folder.rename(name, name.removesuffix(".parquet") + ".damaged")
            return bad

    def _refusal(self, error: OSError, what: str) -> UserError:
        if error.errno in FULL:
            remedy = "is full: make room; what has been scored so far is kept"
        elif error.errno in _READ_ONLY or isinstance(error, PermissionError):
            remedy = "give a folder that this user may write to, or one that holds every pair already"
        else:
            remedy = "give a folder that this user may write to, or check the connection and the credentials of a URL"
        return UserError(f"reference.store ({self._root}) {what}: {error}; {remedy}")


def read_manifest(folder: Storage) -> dict[str, Any] | None:
    """None where there is none, nothing in it where it is damaged. Raises `OSError`."""
    try:
        found = json.loads(folder.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    checksum = found.pop(_CHECKSUM, None)
    return found if (_as_named(found) if checksum is None else checksum == _checksum(found)) else {}


def _sealed(content: dict[str, Any]) -> bytes:
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1).encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_named(found: dict[str, Any]) -> bool:
    """Of a manifest from before there were checksums: whether its fingerprint is that of what it says went into it.

    What another format means by its fields is not known here. That before this one had no `created`, and later ones
    have checksums: with neither the number is this format's, with a damaged digit.
    """
    if found.get("format") != FORMAT:
        return "created" not in found
    return found.get("fingerprint") == _checksum({name: found[name] for name in Fingerprint.__slots__ if name in found})


def last_used(folder: Storage) -> float | None:
    """Seconds since 1970, to the hour."""
    try:
        return float(json.loads(folder.read(USED))["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_use(folder: Storage) -> None:
    now, before = time.time(), last_used(folder)
    if before is None or not 0 <= now - before <= _RENEWED_AFTER:
        folder.write(USED, json.dumps({"time": now}).encode())


def in_use(folder: Storage) -> list[str]:
    """Who is at work there, a line each: jobs of this machine while they live, others while they renew their lease."""
    lines = []
    for file in folder.files():
        if is_lease(file.name):
            try:
                use = json.loads(folder.read(file.name))
                who, age = {key: use[key] for key in whereabouts()}, time.time() - use["time"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
            except OSError as error:  # somebody may be there
                lines.append(f"someone whose mark {file.name} cannot be read: {error}")
                continue
            alive = lives(who)
            if age < LEASE_SECONDS if alive is None else alive:
                lines.append(named(who))
    return lines


def is_lease(name: str) -> bool:
    return name.startswith("use-") and name.endswith(".json")


def _timestamp() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

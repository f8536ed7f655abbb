"""What lies in a store, model by model: its folders, its shards, and how far either can be trusted.

In:  a store's root. Out: the folders of its models, and `Contents`, what reading every byte of a model's shards shows.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.store.shards import BadShard, Pairs, decode
from kto_dist.store.storage import FULL, Root, Storage, open_storage
from kto_dist.store.store import FOLDER_DIGITS, MANIFEST, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What reading the shards of one model has shown. One that is gone meanwhile is in none of these."""

    good: dict[str, Pairs]
    bad: dict[str, str]
    unjudged: dict[str, str]
    """And why; what cannot be read for the moment is no damage."""


@contextmanager
def told(root: Root, what: str) -> Iterator[None]:
    """A `UserError` for whatever a disk or a network refuses."""
    try:
        yield
    except OSError as error:
        remedy = "check the path and its permissions, or a URL's connection and credentials"
        if error.errno in FULL:
            remedy = "it is full: make room; what has been scored so far is kept"
        raise UserError(f"the store ({root}) {what}: {error}; {remedy}") from None


def folders_of(root: Root, prefix: str = "") -> list[tuple[str, Storage]]:
    """(name, folder) of every model in the store. Raises `UserError` where there is no store, or no such model."""
    storage = open_storage(root)
    with told(root, "cannot be read"):
        names = [
            name for name in storage.folders() if len(name) == FOLDER_DIGITS and not name.strip("0123456789abcdef")
        ]
    if not names:
        raise UserError(f"{root} holds no reference store: give the folder or URL that reference.store names")
    chosen = [name for name in names if name.startswith(prefix[:FOLDER_DIGITS])]
    if not chosen:
        raise UserError(f"no model of {root} has a fingerprint that starts with {prefix}: it has {', '.join(names)}")
    return [(name, storage / name) for name in chosen]


def read_shards(folder: Storage, name: str, shards: list[str]) -> Contents:
    manifest, why = trusted_manifest(folder, name)
    if manifest is None:
        return Contents(good={}, bad={}, unjudged=dict.fromkeys(shards, why))
    fingerprint = manifest["fingerprint"]

    def read(shard: str) -> Pairs | BadShard | OSError:
        try:
            return decode(shard, folder.read(shard), fingerprint)
        except (BadShard, OSError) as error:
            return error

    with ThreadPoolExecutor(max_workers=folder.concurrency) as pool:
        results = dict(zip(shards, pool.map(read, shards), strict=True))
    return Contents(
        good={shard: found for shard, found in results.items() if isinstance(found, Pairs)},
        bad={shard: str(found) for shard, found in results.items() if isinstance(found, BadShard)},
        unjudged={
            shard: f"cannot be read: {found}"
            for shard, found in results.items()
            if isinstance(found, OSError) and not isinstance(found, FileNotFoundError)
        },
    )


def trusted_manifest(folder: Storage, name: str) -> tuple[dict[str, Any] | None, str]:
    """The manifest if it is of the model that the folder is named after, else None and why.

    Shards are judged by the fingerprint in it: by another model's all of them would look foreign.
    """
    try:
        found = read_manifest(folder)
    except OSError as error:
        return None, f"cannot be judged: {MANIFEST} cannot be read: {error}"
    if not found:
        what = "missing" if found is None else "damaged"
        return None, f"cannot be judged: {MANIFEST} is {what}; the next job that uses this model writes it"
    fingerprint = found.get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint.startswith(name):
        return None, (
            f"cannot be judged: {MANIFEST} is that of another model; remove this one file, and the next job that uses "
            "this model writes it"
        )
    return found, ""

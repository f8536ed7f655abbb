"""What was read of a log before: a folder of parts with a manifest, and which file is which of them.

In:  the folder, the settings that decide a part's rows, and the files of this run with their digests.
Out: the parts that are there, and the files that none of them holds.

A file is known by its content, wherever it lies now and whether it is gzipped, and may be gone. manifest.json is
written last, so a part without an entry is no part.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sources import Digest, Format, LogFile, digest

# Raise it when the same file becomes other rows, or when what a part holds changes.
_FORMAT = 4
# A vote's number, of the number of its source, its position, and its place in the row.
_PLACE_BITS, _POSITION_BITS = 10, 34
VOTE = f"(number << {_POSITION_BITS + _PLACE_BITS}) | (position << {_PLACE_BITS}) | sub::UBIGINT"
_REWRITTEN = ("parquet", "sqlite", "json")


@dataclass(kw_only=True, slots=True, eq=False)
class Part:
    """One file that was read."""

    digest: str
    path: str
    """Where it lay when it was read, or under which name it was seen since then, whatever the working directory was."""
    format: Format
    bytes: int
    """Of what it holds, unpacked."""
    rows: int
    """Good ones; a pair has two."""
    bad: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> message about the first such row."""
    seen: list[str] = field(default_factory=list)
    """Which of the mapped columns had a value, and what else some row had."""
    notices: dict[str, int] = field(default_factory=dict)
    """What the rows hold besides, and looks as if it belonged -> rows."""


def place_of(vote: int) -> tuple[int, int]:
    """(number of the source, position) of a vote."""
    return vote >> (_POSITION_BITS + _PLACE_BITS), (vote >> _PLACE_BITS) & ((1 << _POSITION_BITS) - 1)


def match(parts: list[Part], found: list[tuple[LogFile, Digest]]) -> tuple[set[int], list[tuple[LogFile, Digest]]]:
    """Ids of the parts that a file still holds, and the files that no part holds, in order.

    Each part is the content of one file: a second file of the same bytes is another delivery. But a file and the same
    file gzipped, which lie side by side while a rotation goes on, are one.
    """
    held, new, seen = set(), [], set()
    free = defaultdict(list)
    for part in reversed(parts):
        free[part.digest].append(part)
    here = {_place(file.path): content.hex for file, content in found}
    for file, content in found:
        delivery = (_place(file.path), content.hex)
        if delivery in seen:
            continue
        seen.add(delivery)
        if not free[content.hex]:
            new.append((file, content))
            continue
        part = free[content.hex].pop()
        held.add(id(part))
        there = here.get(_stem(part.path))
        if there not in (None, part.digest) or not os.path.exists(part.path):
            part.path = os.path.realpath(file.path)  # it was renamed
    return held, new


def grown(parts: list[Part], file: LogFile) -> Part | None:
    """What the file was before it grew, whether it was renamed since or not; or None."""
    path = os.path.realpath(file.path)
    here = [part for part in parts if _stem(part.path) == _stem(path)]
    if file.format in _REWRITTEN:
        return next((part for part in here if part.format == file.format), None)
    candidates = [*here, *(part for part in parts if part not in here and _may_be_rotated(part.path, path))]
    if not candidates:
        return None
    prefixes = digest(file, {part.bytes for part in candidates}).prefixes
    return next(
        (
            part
            for part in sorted(candidates, key=lambda part: (part not in here, -part.bytes))
            if (part.bytes, part.digest) in prefixes and (part in here or not _still_there(part))
        ),
        None,
    )


def _may_be_rotated(old: str, new: str) -> bool:
    """app.jsonl -> app.jsonl.1, app-20260131.jsonl.gz, archive/app.jsonl: a rotation adds to the name."""
    stem = os.path.basename(old).split(".")[0]
    return re.match(re.escape(stem) + r"[._-]", os.path.basename(new)) is not None


def _still_there(part: Part) -> bool:
    if not os.path.exists(part.path):
        return False
    file = LogFile(path=part.path, format=part.format, gzipped=part.path.lower().endswith(".gz"))
    return digest(file).hex == part.digest


def _place(path: str) -> str:
    """Where a file lies, which stays the same when a rotation gzips it."""
    return _stem(os.path.realpath(path))


def _stem(path: str) -> str:
    return path.removesuffix(".gz")


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    with (state / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"input.state ({state}) is in use by another run: wait for it, or give another folder"
            ) from None
        yield


def settings_of(config: MiningConfig, salt: str) -> dict[str, Any]:
    """What decides a part's rows beside the file."""
    names = {"format", "encoding", "delimiter", "table", "query", "rows", "ignore", "max_row_mebibytes"}
    read = config.input.model_dump(mode="json", include=names)
    return {
        **{f"input.{name}": value for name, value in read.items()},
        **{f"columns.{name}": list(value) for name, value in config.columns.given().items()},
        **{f"turns.{name}": value for name, value in config.turns.model_dump(mode="json").items()},
        "roles": config.roles.model_dump(mode="json"),
        "where": config.where.model_dump(mode="json"),
        "clean.normalise": config.clean.normalise,
        "clean.ignore_case": config.clean.ignore_case,
        "output.form": config.output.form,
        "users.hash_ids": config.users.hash_ids,
        # slow on purpose: a guessable salt must not be guessed from here
        "users.salt": hashlib.pbkdf2_hmac("sha256", salt.encode(), b"kto_dist.feedback", 200_000).hex(),
        "the state's format": _FORMAT,
    }


def read_manifest(state: Path, settings: dict[str, Any]) -> list[Part]:
    path = state / "manifest.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, parts = content["settings"], [Part(**entry) for entry in content["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {state}, and give all files of the log again") from None
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if differing:
        raise UserError(
            f"input.state ({state}) was read under another {', '.join(differing)}: restore the setting, or delete the "
            "folder (or name another), and give all files of the log again"
        )
    for part in parts:
        if not part_path(state, part.digest).exists():
            raise UserError(f"{state} lacks the part of {part.path}: delete the folder, and give all files again")
    return parts


def write_manifest(state: Path, settings: dict[str, Any], parts: list[Part]) -> None:
    content = {"settings": settings, "parts": [asdict(part) for part in parts]}
    try:
        write_whole(state / "manifest.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
        kept = {part_path(state, part.digest) for part in parts}
        for path in {*state.glob("*.parquet"), *state.glob(".*.parquet")} - kept:
            path.unlink()
    except OSError as error:
        raise no_room(state, error) from None


def no_room(state: Path, error: Exception) -> UserError:
    return UserError(
        f"what was read of the log cannot be written to {state}: {error}; make room, or give another folder"
    )


def part_path(state: Path, digest: str) -> Path:
    return state / f"{digest}.parquet"

"""DeepSpeed's compiled ops: made once a host, ahead of the ranks, and never waited for in silence.

DeepSpeed compiles an op on its first use. A build that is killed leaves a file `lock` in the op's folder, and torch
waits for ever, without a word, until it goes. Here one process of a host builds, with a bound; others wait for it and
say so; and a lock whose owner is gone is removed.

In:  names of ops. Out: `<extensions>/<op>/<op>.so`, and beside it `built.json`: by whom, and for which versions.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import _get_build_directory

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.base.processes import lives, named, whereabouts
from kto_dist.model.config import DeepspeedConfig

_BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}
_NOTE = "built.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds."""

    between_looks: float = 0.5
    between_words: float = 30.0
    """Of somebody who waits."""
    quiet: float = 600.0
    """After which a build by nobody knows whom, in whose folder nothing was written, has ended without saying so."""
    bound: float = 3600.0
    """Longest that a build is waited for."""


def needed(section: DeepspeedConfig) -> list[str]:
    """The ops of a policy."""
    nvme = "nvme" in (section.offload_optimizer, section.offload_parameters)
    return (["cpu_adam"] if section.offload_optimizer != "none" else []) + (["async_io"] if nvme else [])


def command(op: str) -> list[str]:
    """Builds an op, or finds that it is there."""
    builder = _BUILDERS[op]
    return [sys.executable, "-c", f"from deepspeed.ops.op_builder import {builder}; {builder}().load(verbose=False)"]


def compile_ops(
    ops: list[str],
    say: Say,
    *,
    build: Callable[[str], list[str]] = command,
    patience: Patience = Patience(),
) -> None:
    """One process of each host. Raises `UserError` where an op cannot be built, or another build of it does not end."""
    for op in ops:
        try:
            _compile(op, say, build(op), patience)
        except OSError as error:
            raise UserError(
                f"DeepSpeed's {op} has no place to be compiled: {error}; give a folder that this user may write to "
                "(the environment variable TORCH_EXTENSIONS_DIR), or set the offload that needs it to none"
            ) from error


def _compile(op: str, say: Say, words: list[str], patience: Patience) -> None:
    folder = Path(_get_build_directory(op, verbose=False))
    with _alone(op, folder, say, patience):
        if _is_built(op, folder):
            return
        _end_of_others(op, folder, say, patience)
        say(f"compiling DeepSpeed's {op} in {folder}: a few minutes, once for this machine")
        _note(folder, {"by": whereabouts()})
        _build(op, words, patience)
        _note(folder, {"by": whereabouts(), "for": _versions()})


def _build(op: str, words: list[str], patience: Patience) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience.bound)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"DeepSpeed's {op} was not compiled within {patience.bound:,.0f} s: try again when the machine has less to "
            "do, or set the offload that needs it to none"
        ) from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1][:300]
        raise UserError(
            f"DeepSpeed's {op} cannot be compiled: {last}. It needs a C++ compiler, ninja and the headers that "
            "`ds_report` names; or set the offload that needs it to none"
        )


@contextmanager
def _alone(op: str, folder: Path, say: Say, patience: Patience) -> Iterator[None]:
    """No other start of this program compiles the op here meanwhile; the lock goes with whoever holds it."""
    with (folder.parent / f".{op}.building").open("a") as lock:
        waiting = _Waiting(f"another start compiles DeepSpeed's {op} in {folder}", say, patience)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting.look()
        yield


def _end_of_others(op: str, folder: Path, say: Say, patience: Patience) -> None:
    """Until torch's own lock is gone: by whoever holds it, or because nobody does."""
    lock = folder / "lock"
    waiting = None
    while lock.exists():
        pid, note = _holder(lock), _read(folder)
        # who has noted that the build ended is not the one who builds now
        owner = {} if "for" in note else note.get("by") or {}
        gone = pid is None and lives(owner) is False
        if gone or (pid is None and _quiet_for(folder) > patience.quiet):
            say(f"removing {lock}: a build of DeepSpeed's {op} was killed there")
            lock.unlink(missing_ok=True)
            return
        who = f"process {pid}" if pid is not None else f"{named(owner)}, if it still lives," if owner else "somebody"
        waiting = waiting or _Waiting(f"{who} compiles DeepSpeed's {op}: {lock} is there", say, patience)
        waiting.look()


class _Waiting:
    """Says what is waited for, now and then, and for how long; not beyond the bound."""

    def __init__(self, what: str, say: Say, patience: Patience):
        self._what, self._say, self._patience = what, say, patience
        self._started, self._said = time.monotonic(), -1.0

    def look(self) -> None:
        """Sleeps a little. Raises `UserError` where it has been enough."""
        waited = time.monotonic() - self._started
        if self._said < 0 or waited - self._said >= self._patience.between_words:
            self._said = waited
            self._say(f"waiting since {waited:,.0f} s: {self._what}")
        if waited > self._patience.bound:
            raise UserError(
                f"{self._what}, for more than {self._patience.bound:,.0f} s: end it, or remove the lock where nobody "
                "works"
            )
        time.sleep(self._patience.between_looks)


def _holder(lock: Path) -> int | None:
    """The process of this machine that has the file open, as a build has; None where none is seen."""
    path = os.path.realpath(lock)  # as the system names it, whatever links lead there
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == path for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return None


def _quiet_for(folder: Path) -> float:
    newest = 0.0
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):  # what a build is done with, it removes
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest


def _is_built(op: str, folder: Path) -> bool:
    """For these versions, and by a build that ended."""
    there = (folder / f"{op}.so").exists() and not (folder / "lock").exists()
    return there and _read(folder).get("for") == _versions()


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "deepspeed")}}


def _note(folder: Path, content: dict[str, Any]) -> None:
    write_whole(folder / _NOTE, json.dumps(content).encode())


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _NOTE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

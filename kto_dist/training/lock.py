"""One run at a time in a folder: two would mix their metrics and checkpoints.

The lock is a file that its holder keeps locked (`flock`), and that says who the holder is: process, host and job. Where
a file system has no such locks, or hosts do not see each other's, what it says decides: a process of this machine is
looked up, and one of another machine counts while it renews the file. A machine that was switched off, and a container
that was ended, hold nothing when they are back. Nobody can say of another machine that it is gone for good: its file is
watched, and a run goes on where it stays as it is.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.base.processes import lives, named, whereabouts

NAME = ".run.lock"
RENEWED_EVERY, ABANDONED_AFTER = 60.0, 900.0
"""Seconds. Of a holder on another machine; one that has been silent for the longer time counts no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds."""

    silence: float = 3 * RENEWED_EVERY
    """That a file of another machine is watched without a change, before its holder counts as gone. A network file
    system may show its time a minute late."""
    between_looks: float = 5.0


PATIENCE = Patience()

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class RunLock:
    """Of a run's folder, which it creates. `job` is the same on all hosts of one run, whose folder may be shared."""

    def __init__(self, folder: Path, job: str, say: Callable[[str], None] = print, patience: Patience = PATIENCE):
        self._folder, self._job, self._tell, self._patience = folder, job, say, patience
        self._path = folder / NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._released = threading.Event()

    def take(self) -> None:
        """Raises `UserError` where another run holds it, or the folder cannot be written."""
        try:
            missing = [path for path in (self._folder, *self._folder.absolute().parents) if not path.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._take()
        except OSError as error:
            raise UserError(
                f"train.output ({self._folder}) cannot be written: {error}; give a folder with room"
            ) from None

    def release(self) -> None:
        """And removes the folder if nothing was written to it."""
        self._released.set()
        if self._descriptor is None:
            return
        # one that was stopped for long may find that another machine has taken the folder over
        if _read(self._path).get("job") == self._job:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> None:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            locked, known = _flock(descriptor)
            if known and locked and not _is_at(descriptor, self._path):  # its last holder has just removed it
                os.close(descriptor)
                continue
            holder = _read(self._path)
            if holder.get("job") == self._job:  # of this run, on a host that shares the folder
                os.close(descriptor)
                return
            if (known and not locked) or (not (locked and _is_free_here(holder, self._path)) and self._is_held(holder)):
                os.close(descriptor)
                away = f", or remove {self._path} if that machine is gone" if lives(holder) is None else ""
                raise UserError(
                    f"another run ({named(holder)}) is at work in train.output ({self._folder}): wait until it has "
                    f"ended, stop it, or give another folder{away}"
                )
            if known and not _is_at(descriptor, self._path):  # it was given back meanwhile
                os.close(descriptor)
                continue
            try:
                self._say(descriptor if known else None)
            except BaseException:
                os.close(descriptor)  # what the file says is another one's, to give back
                raise
            self._descriptor = descriptor
            threading.Thread(target=self._renew, daemon=True, name="run-lock").start()
            return

    def _is_held(self, holder: dict[str, Any]) -> bool:
        """Whether the holder lives, by what the file says; one of another machine is watched."""
        if not holder.get("host") or all(holder.get(name) == value for name, value in whereabouts().items()):
            return False  # by this process itself, before it replaced itself to start again
        alive = lives(holder)
        if alive is not None:
            return alive
        first, started = _renewed(self._path), time.monotonic()
        if time.time() - first >= ABANDONED_AFTER:
            return False
        self._tell(
            f"train.output ({self._folder}) has the lock of another run ({named(holder)}): waiting "
            f"{self._patience.silence:.0f} s for a sign of life, and going on without one"
        )
        while time.monotonic() - started < self._patience.silence:
            time.sleep(self._patience.between_looks)
            if (now := _renewed(self._path)) != first:
                return now > 0  # else it was given back
        return False

    def _say(self, descriptor: int | None) -> None:
        """`descriptor`: of the locked file; None without such locks, where of several that write the last one wins."""
        content = json.dumps({"job": self._job, **whereabouts()}).encode()
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)  # other hosts of this run ask a server who holds it
            return
        write_whole(self._path, content)
        time.sleep(1.0)
        holder = _read(self._path)
        if holder.get("job") != self._job:
            raise UserError(
                f"another run ({named(holder)}) has started in train.output ({self._folder}) at the same time: give "
                "another folder"
            )

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _flock(descriptor: int) -> tuple[bool, bool]:
    """Whether it is locked now, and whether that is known: some file systems have no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False, False
        raise
    return True, True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Who holds it; nothing where that is not said."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_free_here(holder: dict[str, Any], path: Path) -> bool:
    """Whether the lock that was just taken says that its last holder is gone: one of this kernel, in whatever
    container, would hold it still. So would one of this machine since it was started, and what has its name was this
    machine if it has not renewed the lock since: containers of two machines may be called alike."""
    own = whereabouts()
    if own["boot"] != "" and own["boot"] == holder.get("boot"):
        return True
    began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return own["host"] == holder.get("host") and _renewed(path) < began


def _renewed(path: Path) -> float:
    """Seconds since 1970 by the file system's clock; 0 where the file is gone."""
    try:
        with path.open("rb") as file:  # a network file system asks its server when a file is opened
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0

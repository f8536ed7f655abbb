"""Pieces of work that processes on any number of machines take in turn: a file a lease, which only one can create.

    <folder>/piece-<name>.<term>.json    who has the piece, for how many seconds of silence, and a count that rises

The holder writes its lease again every quarter of that time. A lease is over when its holder, a process of this
machine, is gone, or when the file has stayed as it is for so long by the clock of whoever watches it: no clock of
another machine is believed. Who then creates the file of the next term, which again only one can, has the piece, and
removes the file of the term before. So two processes never take one piece by the same right; one that was stopped for
longer than its lease asks when it goes on, ahead of what it would store, whether it has lost it (`Lease.keep`). The
holder writes and then looks for a next term, the other one creates it and then looks whether the holder has written:
whichever comes second sees the first.

A holder that hangs while its thread goes on renewing would keep its piece for ever: it gives the piece up where it was
not heard of (`Lease.keep`) for longer than its `Patience`.

In:  a folder of a store, and names of pieces. Out: `Lease`, to be held in a `with`.
"""

import contextlib
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.processes import lives, named, whereabouts
from kto_dist.store.contents import told
from kto_dist.store.storage import FULL, Storage

SECONDS = 120.0
"""Of silence, after which a holder on another machine has lost its lease."""
RENEWALS = 4
"""Within this time."""
_NAME = re.compile(r"piece-([0-9a-f]+)\.(\d+)\.json")
_CHOICES = 4
"""Pieces among which one is drawn, so that processes that start at once don't all ask for the first."""
TIMES_SLOWEST = 10
"""The longest time between two signs of work, that a holder may take for the next."""
TIMES_FIRST = 6
"""The least patience, that a process has until its first sign: for loading and compiling."""


class LeaseLost(Exception):
    """Another process has the piece by now."""


def is_piece(name: str) -> bool:
    """Whether a file of a store is a lease."""
    return _NAME.fullmatch(name) is not None


def pieces_held(folder: Storage) -> set[str]:
    """Pieces that somebody has; or had, and was killed on another machine. Raises `OSError`."""
    held = ((piece, _read(folder, _file(piece, term))) for piece, term in _terms(folder).items())
    return {piece for piece, said in held if said is None or lives(said) is not False}


def _terms(folder: Storage) -> dict[str, int]:
    """The newest term of every piece that somebody has."""
    terms: dict[str, int] = {}
    for file in folder.files():
        if found := _NAME.fullmatch(file.name):
            terms[found[1]] = max(int(found[2]), terms.get(found[1], 0))
    return terms


def _file(piece: str, term: int) -> str:
    return f"piece-{piece}.{term}.json"


def _awake() -> float:
    """Seconds, which pass while this process is stopped, and while its machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(kw_only=True, slots=True)
class Patience:
    """How long a process that works on piece after piece renews a lease without a sign of work."""

    least: float
    """Seconds."""
    warn: Callable[[str], None] = lambda text: None
    slowest: float | None = None
    """Seconds between two signs; None until the first one, which says nothing of those that follow."""

    @property
    def seconds(self) -> float:
        if self.slowest is None:
            return TIMES_FIRST * self.least
        return max(self.least, TIMES_SLOWEST * self.slowest)

    def learn(self, seconds: float) -> None:
        self.slowest = 0.0 if self.slowest is None else max(self.slowest, seconds)


class Lease:
    """One piece, while it is held. Renews itself in a thread."""

    def __init__(
        self,
        folder: Storage,
        piece: str,
        term: int,
        seconds: float,
        clock: Callable[[], float] = _awake,
        patience: Patience | None = None,
    ):
        """`clock`: for what this process may sleep through. `patience`: None where it gives no signs of work."""
        self.piece = piece
        self._folder, self._term, self._seconds, self._clock = folder, term, seconds, clock
        self._patience, self._idle = patience, 0.0
        self._file = _file(piece, term)
        self._said = {"token": uuid.uuid4().hex, "seconds": seconds, **whereabouts()}
        self._beat, self._renewed = 0, clock()
        self._ended, self._lost = threading.Event(), threading.Event()
        self._writing = threading.RLock()
        """Nothing is written once the piece was given back. A signal's handler may end what its own thread ends."""

    @property
    def lost(self) -> bool:
        """Whether the piece may be another's: its lease was taken, or could not be renewed for too long."""
        return self._lost.is_set()

    def keep(self) -> None:
        """To be called ahead of what only a holder may do, and as a sign of work. Raises `LeaseLost`."""
        # late by two turns: this process was stopped, or its machine slept, and its thread may come only after this
        if not self.lost and self._clock() - self._renewed > 2 * self._seconds / RENEWALS:
            with self._writing:
                if not self._ended.is_set():
                    self._renew()
        if self._patience is not None:
            # lost or not: else one whose work always takes longer would lose every piece
            self._patience.learn(self._idle)
        self._idle = 0.0
        if self.lost:
            raise LeaseLost(self.piece)

    def begin(self) -> bool:
        """Creates the file, and renews it from now on; False where another process has created it."""
        self._renewed = self._clock()
        # an answer that was lost on its way is asked for again: the file may be there, and ours
        if not self._folder.create(self._file, self._content()) and not self._is_ours():
            return False
        threading.Thread(target=self._keep_renewing, daemon=True, name="lease").start()
        return True

    def end(self) -> None:
        """Gives the piece back; no error where that cannot be said: the lease then ends by its silence."""
        self._ended.set()
        self._remove()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _content(self) -> bytes:
        return json.dumps({**self._said, "beat": self._beat}).encode()

    def _is_ours(self) -> bool:
        found = _read(self._folder, self._file)
        return found is not None and found.get("token") == self._said["token"]

    def _remove(self) -> None:
        with self._writing, contextlib.suppress(OSError):
            if self._is_ours():
                self._folder.remove(self._file)

    def _keep_renewing(self) -> None:
        turn = self._seconds / RENEWALS
        while not self._ended.wait(turn):
            # in turns, not by a clock: a process that was stopped has not hung
            self._idle += turn
            if self._patience is not None and self._idle > self._patience.seconds:
                self._lost.set()
                self._remove()
                self._patience.warn(
                    f"no sign of work for more than {self._patience.seconds:,.0f} s, so the piece at hand is left to "
                    "others: end this process, if it hangs"
                )
                return
            with self._writing:
                if self._ended.is_set() or not self._renew():
                    return

    def _renew(self) -> bool:
        """False where the lease is lost."""
        began = self._clock()
        try:
            if self._is_ours():
                self._beat += 1
                self._folder.write(self._file, self._content())
                # it was another's already, who has removed the file between the look and the write; if that took long
                # enough the next term has ended as well, and is seen no more
                awake = self._clock() - began < self._seconds
                if awake and _terms(self._folder).get(self.piece, self._term) <= self._term:
                    self._renewed = began
                    return True
                self._folder.remove(self._file)
        except OSError:
            if self._clock() - self._renewed < self._seconds:
                return True
        self._lost.set()
        return False


class Leases:
    """What a process knows of the leases in a folder, and the ones that it takes."""

    def __init__(
        self,
        folder: Storage,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
        patience: Patience | None = None,
    ):
        """`patience`: of this process with itself, from lease to lease. Raises `UserError` where two processes could
        create one file here."""
        self._folder, self._seconds, self._clock, self._patience = folder, seconds, clock, patience
        self._seen: dict[str, tuple[bytes, float]] = {}
        """Newest files of other holders: their content, and when it was first seen."""
        self._held: Lease | None = None
        self._check_creation()

    @property
    def pause(self) -> float:
        """Seconds between two looks at what others have."""
        return min(5.0, self._seconds / RENEWALS / 2)

    def take(self, pieces: Sequence[str]) -> Lease | None:
        """One of the first of `pieces` that nobody has; None while others have all of them. Raises `UserError`."""
        with told(self._folder, "cannot be worked on"):
            return self._take(pieces)

    def _take(self, pieces: Sequence[str]) -> Lease | None:
        terms = _terms(self._folder)
        newest = {_file(*held) for held in terms.items()}
        self._seen = {name: seen for name, seen in self._seen.items() if name in newest}
        free = [piece for piece in pieces if piece not in terms]
        while free:
            piece = free.pop(random.randrange(min(_CHOICES, len(free))))
            if lease := self._begin(piece, 0):
                return lease
        for piece in pieces:
            if piece not in terms or (last := self._last_words(name := _file(piece, terms[piece]))) is None:
                continue
            if lease := self._begin(piece, terms[piece] + 1):
                if self._has_gone_on(name, last):
                    lease.end()
                    continue
                # all of them: if one stayed, its holder might go on after this lease, and find it there
                for earlier in range(terms[piece] + 1):
                    with contextlib.suppress(OSError):
                        self._folder.remove(_file(piece, earlier))
                return lease
        return None

    def holders(self, pieces: Collection[str]) -> list[str]:
        """Who has some of them, as `take` has found it last."""
        held = ((_NAME.fullmatch(name), data) for name, (data, _) in self._seen.items())
        return sorted({named(_parsed(data) or {}) for found, data in held if found and found[1] in pieces})

    def sweep(self, done: Collection[str]) -> None:
        """Removes what holders that are gone have left of pieces that are done: who was killed right after the last
        write, or between two terms. No error where that fails: `kto-dist store gc` does it as well."""
        with contextlib.suppress(OSError):
            for file in self._folder.files():
                found = _NAME.fullmatch(file.name)
                if found and found[1] in done and self._last_words(file.name) is not None:
                    self._folder.remove(file.name)

    def give_back(self) -> None:
        """Ends the lease that was taken last: for a process's last words."""
        if self._held is not None:
            self._held.end()

    def _begin(self, piece: str, term: int) -> Lease | None:
        # known before it is there: a signal may end this process in between
        self._held = lease = Lease(self._folder, piece, term, self._seconds, patience=self._patience)
        if not lease.begin():
            return None
        # a listing that was made while another process took the piece over may have shown neither of the two files
        if _terms(self._folder).get(piece, term) > term:
            lease.end()
            return None
        return lease

    def _last_words(self, name: str) -> bytes | None:
        """What a lease that is over says; None while it is not."""
        try:
            data = self._folder.read(name)
        except FileNotFoundError:  # it was given back just now
            return None
        said = _parsed(data) or {}
        if said and lives(said) is False:
            return data
        before, since = self._seen.get(name, (None, 0.0))
        if data != before:
            self._seen[name] = (data, self._clock())
            return None
        return data if self._clock() - since > float(said.get("seconds", self._seconds)) else None

    def _has_gone_on(self, name: str, last: bytes) -> bool:
        """Whether a holder has said something after its last words; it was stopped, and not gone."""
        with contextlib.suppress(FileNotFoundError):
            return self._folder.read(name) != last
        return False

    def _check_creation(self) -> None:
        name = f".create.{uuid.uuid4().hex}"
        try:
            first, second = (self._folder.create(name, text) for text in (b"1", b"2"))
            self._folder.remove(name)
        except OSError as error:
            remedy = (
                "make room"
                if error.errno in FULL
                else "give a folder or a bucket that this user may write to, or use `kto-dist precompute` without "
                "--worker"
            )
            raise UserError(
                f"workers take pieces by creating files in {self._folder}, and that fails: {error}; {remedy}"
            ) from None
        if not first or second:
            raise UserError(
                f"workers take pieces by creating files in {self._folder}, and there two processes could create one "
                "file: give a folder, or a bucket whose server knows conditional writes (If-None-Match), as S3 does, "
                "or use `kto-dist precompute` without --worker"
            )


def _read(folder: Storage, name: str) -> dict[str, Any] | None:
    try:
        return _parsed(folder.read(name))
    except FileNotFoundError:
        return None


def _parsed(data: bytes) -> dict[str, Any] | None:
    """None for what is half written, or none of ours."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

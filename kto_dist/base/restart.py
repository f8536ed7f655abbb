"""All ranks of a job start again, in place, or end: for a failure on one rank while the others wait for it.

A rank that calls `Restarts.now` says so in a store that every rank looks at from a thread; then each of them replaces
itself by the same command (`exec`), with some environment variables changed. No launcher notices: the processes stay.
`Restarts.end` goes the same way: every rank ends with the status of the one that failed.

The same threads watch over the job: each rank says once a second where it stands, rank 0 looks whether all do, and
the others whether rank 0 answers. One that is silent, or that the others wait for, ends the job by name.

Only a process that runs nothing but the job may do this: `Restarts` are made by the command, never by `train`.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not re-export it

from kto_dist.base import comm, hosts, watch
from kto_dist.base.doing import Clock, Observer
from kto_dist.base.exits import FAILED
from kto_dist.base.ports import free_port

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_HEAR = 5.0
"""That others get to look, before a rank that has failed leaves."""
SECONDS_OF_SILENCE = 5.0
"""After which a rank is gone, where a collective has just failed."""
SECONDS_TO_JOIN = 2.0
"""Within which ranks that meet the same error come to tell it."""
ORDER = "KTO_DIST_RESTART"
_ORDER, _READ = "order", "read"

LastWords = Callable[[bool], None]
"""Is given whether the job has failed."""
_last_words: list[LastWords] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Why a job starts again, and with what."""

    reason: str
    step: int
    """Updates done when it failed."""
    settings: dict[str, int | None]
    """What is set to how much from now on."""


@contextlib.contextmanager
def before(last_words: LastWords) -> Iterator[None]:
    """Inside, what this process still does before it is replaced, or ended because another rank has failed."""
    _last_words.append(last_words)
    try:
        yield
    finally:
        _last_words.remove(last_words)


def order() -> Order | None:
    """Of the restart that this process comes from."""
    text = os.environ.get(ORDER)
    return None if text is None else Order(**json.loads(text))


def again(reason: str, step: int, settings: Mapping[str, int | None]) -> Order:
    """The next order: what an earlier restart has set stays, or what it was for would come again."""
    before = order()
    return Order(reason=reason, step=step, settings={**({} if before is None else before.settings), **settings})


def overrides(settings: Mapping[str, int | None]) -> list[str]:
    """As on a command line."""
    return [f"{name}={'null' if value is None else value}" for name, value in settings.items()]


class Restarts:
    """The means to start again; one a process."""

    def __init__(self) -> None:
        """Collective."""
        self._heard, self._leaving = threading.Event(), threading.Event()
        self._store: TCPStore | None = None
        self._over = False
        self._hosts = hosts.by_rank()
        if comm.size(comm.WORLD) == 1:
            return
        host, ports, wait = os.environ["MASTER_ADDR"], (0, 0), timedelta(seconds=60)
        if comm.is_main():
            # at a port that the system picks as it is opened; the next start's is to be free where rank 0 is
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            ports = self._store.port, free_port()
        port, self._next_port = comm.broadcast(ports)
        if self._store is None:
            self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        # of its own for the thread: a client answers one question at a time
        ears = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        self._observer, self._beats = Observer(), 0
        self._beat(ears)
        comm.barrier()  # all have a beat from now on
        threading.Thread(target=self._listen, args=(ears,), daemon=True, name="restarts").start()
        if not comm.is_main():
            threading.Thread(target=self._mind_rank_0, daemon=True, name="rank 0").start()

    def now(self, order: Order) -> NoReturn:
        """Replaces every rank's process."""
        port = comm.NO_PORT if self._store is None else str(self._next_port)
        changes = {ORDER: json.dumps(asdict(order)), "MASTER_PORT": port}
        if self._store is None:
            _go(changes)
        self._order({"changes": changes})
        _wait_to_be_replaced()

    def hold(self, seconds: float = 0.0) -> None:
        """Does not return where a restart or the end was ordered, within some seconds from now: what failed here failed
        because another rank did."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store went with rank 0's old process
            while True:
                if self._heard.is_set() or (self._store is not None and self._store.check([_ORDER])):
                    _wait_to_be_replaced()
                if self._store is None or time.monotonic() >= deadline:
                    return
                time.sleep(0.05)

    def cause(self, failure: Exception) -> str | None:
        """Of a collective that has failed: whose fault it is, as far as one can see. None where it is another failure,
        or nobody's."""
        if self._store is None or not watch.is_of_collective(failure):
            return None
        with contextlib.suppress(ValueError):  # not in the main thread
            # the launcher is about to end the ranks that are left: not before they have said why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            before = self._all_beats(self._store)
            time.sleep(SECONDS_OF_SILENCE)
            after = self._all_beats(self._store)
        except RuntimeError:
            return f"{hosts.named([0], self._hosts)} has ended, or is cut off: all others need it"
        silent = [
            SECONDS_OF_SILENCE if old.number == new.number else 0.0 for old, new in zip(before, after, strict=True)
        ]
        waited = comm.timeout() if watch.is_timeout(failure) else 0.0
        if not any(silent) and not waited:
            return None
        return watch.verdict(after, silent, self._hosts, SECONDS_OF_SILENCE, waited)

    def say_cause(self, text: str) -> None:
        """Once a host."""
        assert self._store is not None
        self.hold()  # rank 0 may have said it
        self._leaving.set()
        with contextlib.suppress(RuntimeError):
            if self._store.add(f"cause on {self._hosts[comm.rank()].head}", 1) == 1:
                print(f"error: {text}", file=sys.stderr, flush=True)
            return
        self._say_for_host(text)

    def speaker(self, text: str) -> str | None:
        """What this rank, which has met an error, is to say ahead of its words: nothing where all ranks have come with
        the same ones, else its number. None where another rank of its host says them."""
        ranks, head = comm.size(comm.WORLD), comm.rank() - comm.local_rank()
        if self._store is None:
            return ""
        self._leaving.set()  # nobody ends it in mid-word
        own = f"{hosts.named([comm.rank()], self._hosts)}: "
        key = hashlib.sha256(text.encode()).hexdigest()
        deadline = time.monotonic() + SECONDS_TO_JOIN
        try:
            came = self._store.add(key, 1)
            first = self._store.add(f"{key} on {head}", 1) == 1
            while came < ranks and time.monotonic() < deadline:
                time.sleep(0.05)
                came = self._store.add(key, 0)
        except RuntimeError:  # rank 0 has gone
            return own
        if not first:
            return None
        return "" if came >= ranks else own

    def end(self, status: int) -> None:
        """Ends the other ranks, wherever they wait; returns when they have heard of it, or after some seconds."""
        self._leaving.set()
        if self._store is None:
            return
        deadline = time.monotonic() + SECONDS_TO_HEAR
        with contextlib.suppress(RuntimeError):
            self._order({"status": status})
            while self._store.add(_READ, 0) < comm.size(comm.WORLD) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _order(self, order: dict[str, Any]) -> None:
        """The first one counts."""
        assert self._store is not None
        self._store.compare_set(_ORDER, "", json.dumps(order))

    def _beat(self, ears: TCPStore) -> None:
        ears.set(f"beat {comm.rank()}", watch.Beat(number=self._beats, place=self._observer.place()).text())
        self._beats += 1  # rank 0 has answered

    def _all_beats(self, store: TCPStore) -> list[watch.Beat]:
        names = [f"beat {rank}" for rank in range(comm.size(comm.WORLD))]
        return [watch.Beat.of(text.decode()) for text in store.multi_get(names)]

    def _watch(self, ears: TCPStore) -> Iterator[str | None]:
        """On rank 0, a look at a time: what is wrong."""
        heard: list[int] = []
        silent = [0.0] * comm.size(comm.WORLD)
        clock = Clock()
        while True:
            beats, passed = self._all_beats(ears), clock.passed()
            numbers = [beat.number for beat in beats]
            if heard:
                silent = [
                    age + passed if old == new else 0.0 for age, old, new in zip(silent, heard, numbers, strict=True)
                ]
            heard = numbers
            yield watch.verdict(beats, silent, self._hosts, watch.limit(comm.timeout()))

    def _mind_rank_0(self) -> None:
        """On the others: it answers, or this process ends."""
        seen, silent, clock = self._beats, 0.0, Clock()
        while silent < watch.limit(comm.timeout()):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if self._leaving.is_set() or self._over:
                return
            passed = clock.passed()
            silent = silent + passed if self._beats == seen else 0.0
            seen = self._beats
        _say_last_words(failed=True)
        self._say_for_host(
            f"{hosts.named([0], self._hosts)}: nothing was heard for {silent:.0f} s: killed, stopped or cut off. All "
            "others wait for it"
        )
        os._exit(FAILED)

    def _say_for_host(self, text: str) -> None:
        """Without the store: the first rank of each host that is left says it."""
        first = 1 if self._hosts[comm.rank()].head == 0 else 0
        if comm.local_rank() == first:
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _listen(self, ears: TCPStore) -> None:
        wrong = self._watch(ears) if comm.is_main() else None
        try:
            while not ears.check([_ORDER]):
                self._beat(ears)
                if wrong is not None and (text := next(wrong)) is not None and not self._leaving.is_set():
                    print(f"error: {text}. The job ends (cluster.timeout)", file=sys.stderr, flush=True)
                    ears.compare_set(_ORDER, "", json.dumps({"status": FAILED}))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            order = json.loads(ears.get(_ORDER))
            self._heard.set()
            # the store lies with rank 0, and everyone has to have read it before that process is replaced
            ears.add(_READ, 1)
            deadline = time.monotonic() + (SECONDS_TO_HEAR if "status" in order else float("inf"))
            while comm.is_main() and ears.add(_READ, 0) < comm.size(comm.WORLD) and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:  # rank 0 has ended, and its store with it
            self._over = True
            return
        if comm.is_main() and "status" in order:
            time.sleep(0.5)  # the one that has failed is about to see that all have read
        if "changes" in order:
            _go(order["changes"])
        if not self._leaving.is_set():  # else its main thread tells its own error, and leaves
            _say_last_words(failed=True)
            sys.stdout.flush()
            os._exit(order["status"])


def _say_last_words(*, failed: bool) -> None:
    for say in list(_last_words):
        say(failed)


def _go(changes: dict[str, str]) -> NoReturn:
    _say_last_words(failed=False)
    _replace(changes)


def _wait_to_be_replaced() -> NoReturn:
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _replace(environment: dict[str, str]) -> NoReturn:
    os.environ.update(environment)
    # torchrun's agent serves the old port alone: rank 0 has to serve the new one
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            # sockets and devices of the old process: closed by `exec`, not before, since other threads use them
            try:
                os.set_inheritable(descriptor, False)
            except OSError:  # gone meanwhile
                continue
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

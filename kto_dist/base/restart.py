"""All ranks of a job start again, in place: for a failure on one rank while the others wait for it in a collective.

A rank that calls `Restarts.now` says so in a store that every rank looks at from a thread; then each of them replaces
itself by the same command (`exec`), with some environment variables changed. No launcher notices: the processes stay.

Only a process that runs nothing but the job may do this: `Restarts` are made by the command, never by `train`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not re-export it

from kto_dist.base import comm

SECONDS_BETWEEN_LOOKS = 1.0
ORDER = "KTO_DIST_RESTART"
_ORDER = "order"
_last_words: list[Callable[[], None]] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Why a job starts again, and with what."""

    reason: str
    step: int
    """Updates done when it failed."""
    setting: str
    tokens: int
    """What is set to how much from now on."""


@contextlib.contextmanager
def before(last_words: Callable[[], None]) -> Iterator[None]:
    """Inside, what this process still does before it is replaced."""
    _last_words.append(last_words)
    try:
        yield
    finally:
        _last_words.remove(last_words)


def order() -> Order | None:
    """Of the restart that this process comes from."""
    text = os.environ.get(ORDER)
    return None if text is None else Order(**json.loads(text))


class Restarts:
    """The means to start again; one a process."""

    def __init__(self) -> None:
        """Collective."""
        self._heard = threading.Event()
        self._store: TCPStore | None = None
        if comm.size(comm.WORLD) == 1:
            return
        host, port = os.environ["MASTER_ADDR"], comm.broadcast(_free_port())
        wait = timedelta(seconds=60)
        self._store = TCPStore(host, port, is_master=comm.is_main(), wait_for_workers=False, timeout=wait)
        # of its own for the thread: a client answers one question at a time
        ears = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        threading.Thread(target=self._listen, args=(ears,), daemon=True, name="restarts").start()

    def now(self, order: Order) -> NoReturn:
        """Replaces every rank's process."""
        port = comm.NO_PORT if self._store is None else str(_free_port())
        changes = {ORDER: json.dumps(asdict(order)), "MASTER_PORT": port}
        if self._store is None:
            _go(changes)
        self._store.set(_ORDER, json.dumps(changes))
        _wait_to_be_replaced()

    def hold(self) -> None:
        """Does not return where a restart was ordered: what failed here failed because another rank was replaced."""
        with contextlib.suppress(RuntimeError):  # the store went with rank 0's old process
            if self._heard.is_set() or (self._store is not None and self._store.check([_ORDER])):
                _wait_to_be_replaced()

    def _listen(self, ears: TCPStore) -> None:
        try:
            while not ears.check([_ORDER]):
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except RuntimeError:  # rank 0 has ended, and its store with it
            return
        changes = json.loads(ears.get(_ORDER))
        self._heard.set()
        # the store lies with rank 0, and everyone has to have read it before that process is replaced
        ears.add("read", 1)
        while comm.is_main() and ears.add("read", 0) < comm.size(comm.WORLD):
            time.sleep(0.05)
        _go(changes)


def _go(changes: dict[str, str]) -> NoReturn:
    for say in list(_last_words):
        say()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

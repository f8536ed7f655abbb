"""All ranks of a job start again, in place: for a failure on one rank while the others wait for it in a collective.

A rank that calls `Restarts.now` says so in a store that every rank looks at from a thread; then each of them replaces
itself by the same command (`exec`), with some environment variables changed. No launcher notices: the processes stay.

Only a process that runs nothing but the job may do this: `arm` is called by the command, never by `train`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
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


def before(last_words: Callable[[], None]) -> None:
    """What this process still does before it is replaced."""
    _last_words.append(last_words)


def order() -> Order | None:
    """Of the restart that this process comes from."""
    text = os.environ.get(ORDER)
    return None if text is None else Order(**json.loads(text))


class Restarts:
    """The means to start again; one a process."""

    def __init__(self, host: str, port: int):
        leads = comm.is_main()
        self._store = TCPStore(host, port, is_master=leads, wait_for_workers=False, timeout=timedelta(seconds=60))
        # of its own for the thread: a client answers one question at a time
        self._ears = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._heard = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="restarts").start()

    def now(self, order: Order) -> NoReturn:
        """Replaces every rank's process."""
        self._store.set(_ORDER, json.dumps({ORDER: json.dumps(asdict(order)), "MASTER_PORT": str(_free_port())}))
        _wait_to_be_replaced()

    def hold(self) -> None:
        """Does not return where a restart was ordered: what failed here failed because another rank was replaced."""
        with contextlib.suppress(RuntimeError):  # the store went with rank 0's old process
            if self._heard.is_set() or self._store.check([_ORDER]):
                _wait_to_be_replaced()

    def _listen(self) -> None:
        while not self._ears.check([_ORDER]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        order = json.loads(self._ears.get(_ORDER))
        self._heard.set()
        # the store lies with rank 0, and everyone has to have read it before that process is replaced
        self._ears.add("read", 1)
        while comm.is_main() and self._ears.add("read", 0) < comm.world_size():
            time.sleep(0.05)
        for say in _last_words:
            say()
        _replace(order)


def _wait_to_be_replaced() -> NoReturn:
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def arm() -> Restarts | None:
    """Collective. None for a single rank, which can go on in place."""
    if comm.world_size() == 1:
        return None
    port = comm.broadcast(_free_port())
    return Restarts(os.environ["MASTER_ADDR"], port)


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

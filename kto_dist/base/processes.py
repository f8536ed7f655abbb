"""Which process on which machine: told apart after a reboot, in another container and on another host as well."""

import contextlib
import ctypes
import os
import platform
import signal
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

HOST = "KTO_DIST_HOST"
"""Of the environment: what the launcher calls this host."""
START = "KTO_DIST_START"
"""Of the environment: which start of a job this is. Ranks that an earlier one has left on a host do not join it."""


def host() -> str:
    """What this machine is called: by the launcher, else by itself."""
    return os.environ.get(HOST) or platform.node() or "an unnamed host"


def whereabouts(pid: int | None = None) -> dict[str, str | int]:
    """What tells a process of this machine (by default this one) from every other one."""
    pid = os.getpid() if pid is None else pid
    return {**_machine(), "pid": pid, "started": _started(pid)}


def lives(who: Mapping[str, object]) -> bool | None:
    """Whether the process of these `whereabouts` is there; None where another machine knows, or this one hides it."""
    if any(who.get(name) != value for name, value in _machine().items()):
        return None
    pid = who.get("pid")
    if not isinstance(pid, int) or not who.get("started"):
        return False
    return None if _is_hidden(pid) else _started(pid) == who["started"]


def named(who: Mapping[str, object]) -> str:
    """For a message."""
    return f"process {who.get('pid', 'unknown')} on {who.get('host', 'an unknown host')}"


@cache
def _machine() -> dict[str, str]:
    facts = {"host": platform.node(), "boot": "", "namespace": ""}
    with contextlib.suppress(OSError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts["namespace"] = os.readlink("/proc/self/ns/pid")
    return facts


def _started(pid: int) -> str:
    """When a process of this machine started, in ticks; empty where there is no such process."""
    try:
        # the name, in parentheses, may hold anything; the first field after it is the state, the 20th the time
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _is_hidden(pid: int) -> bool:
    """Whether it is there, of another user, and this machine tells of own processes alone (`hidepid` of /proc)."""
    if os.path.exists(f"/proc/{pid}/stat"):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def die_with_parent() -> None:
    """When the parent ends, however it ends, this process is killed (Linux; elsewhere nothing happens)."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    set_parent_death_signal = 1
    prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it has ended just before
        os.kill(os.getpid(), signal.SIGKILL)


def die_with(who: Mapping[str, object], seconds: float = 0.5) -> None:
    """Asks in a thread, from now on, whether a process of this machine lives; when not, this one is killed."""

    def watch() -> None:
        while lives(who) is not False:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="die-with").start()

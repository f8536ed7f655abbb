"""What one host has to say before a job: `python -m kto_dist.cluster.probe`, asked by `preflight`.

In:  a line of JSON on standard input (`Question`). Out: a line of JSON (`Facts`). Nothing is left behind.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kto_dist.base.ports import free_port
from kto_dist.base.source import source_digest

PACKAGES = ("kto_dist", "torch", "deepspeed", "transformers", "tokenizers", "triton", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a host is asked."""

    name: str
    """Of the host, as the hostfile has it."""
    written: dict[str, str] = field(default_factory=dict)
    """Folders that the job writes to, by setting."""
    read: dict[str, str] = field(default_factory=dict)
    """Files and folders that it reads, by setting."""
    head: str = ""
    """The address of rank 0's host."""
    marks: dict[str, str] = field(default_factory=dict)
    """Files that the launching host has made in written folders, or where these are going to be, by setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What it answers."""

    python: str
    versions: dict[str, str]
    source: str
    gpus: list[str]
    """Name and MiB of each."""
    cores: int
    memory_gib: float
    clock: float
    """Seconds since 1970."""
    port: int
    """Free at this moment."""
    loopback: str
    """The loopback address that the host's own name leads to; empty where it leads to none."""
    interfaces: list[str]
    """With an address, without the loopback."""
    route: str
    """The interface towards rank 0's host; empty where it is not known."""
    lost: str
    """Why rank 0's host is not found by its name; empty where it is."""
    open_files: int
    disks: dict[str, float]
    """GiB that are free, by setting; and of /dev/shm."""
    problems: dict[str, str]
    """By setting."""
    sees: dict[str, bool]
    """Whether the launching host's mark is there, by setting: a shared file system."""


def look(question: Question) -> Facts:
    problems: dict[str, str] = {}
    disks: dict[str, float] = {"/dev/shm": _free(Path("/dev/shm"))}
    sees: dict[str, bool] = {}
    for setting, name in question.written.items():
        folder = Path(name)
        sees[setting] = setting in question.marks and _is_there(Path(question.marks[setting]))
        if problem := _unwritable(folder):
            problems[setting] = problem
        disks[setting] = _free(folder)
    for setting, name in question.read.items():
        if not _is_there(Path(name)):
            problems[setting] = f"{name} is not there"
        elif not os.access(name, os.R_OK):
            problems[setting] = f"{name} cannot be read"
    own, lost = _way(question.head)
    return Facts(
        python=platform.python_version(),
        versions={package: _version(package) for package in PACKAGES},
        source=source_digest(),
        gpus=_gpus(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        clock=time.time(),
        port=free_port(),
        loopback=_loopback(),
        interfaces=[name for _, name in socket.if_nameindex() if name != "lo"],
        route=_interface(own),
        lost=lost,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disks=disks,
        problems=problems,
        sees=sees,
    )


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def _gpus() -> list[str]:
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def existing(folder: Path) -> Path:
    """It, or what there is of it."""
    folder = folder.absolute()
    while not _is_there(folder):
        folder = folder.parent
    return folder


def _is_there(path: Path) -> bool:
    """Not where nobody may look, as below another user's private folder."""
    try:
        return path.exists()
    except OSError:
        return False


def _free(folder: Path) -> float:
    try:
        return shutil.disk_usage(existing(folder)).free / 2**30
    except OSError:
        return 0.0


def _unwritable(folder: Path) -> str | None:
    """Tried in what there is of it."""
    trial = existing(folder) / f".kto-dist-{uuid.uuid4().hex}"
    try:
        trial.write_bytes(b"x")
        found = trial.read_bytes()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}"
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return None if found == b"x" else f"{folder} gives back other bytes than were written"


def _loopback() -> str:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    return address if address.startswith("127.") else ""


def _way(head: str) -> tuple[str, str]:
    """The address of this host that a datagram to another one would come from, and why there is none. None is sent."""
    reason = ""
    if not head:
        return "", ""
    try:
        found = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        return "", f"the name is not known there: {error}"
    for family, kind, _, _, address in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0]), ""
        except OSError as error:
            reason = reason or f"no way leads to {address[0]}: {error}"
    return "", reason


def _interface(own: str) -> str:
    """With this address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if own and any(address.address == own for address in addresses):
            return name
    return ""


if __name__ == "__main__":
    print(json.dumps(asdict(look(Question(**json.loads(sys.stdin.readline()))))))

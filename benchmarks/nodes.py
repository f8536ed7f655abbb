"""Hosts that are all this machine, each with a network, processes, a name, a disk, a /dev/shm and an sshd of its own.

In:  a folder, names. Out: `Nodes`, which are switched on and off, and cut off from the network; `Job`, which is
`kto-dist launch` on one of them, reached by ssh from there as any host is.

Linux's namespaces, so that it takes root, iproute2, util-linux and openssh-server; `why_not` says what is missing.
Nothing of it has a name outside: when the processes end, however they end, networks and mounts are gone.

    <folder>/disk, <folder>/scratch             on every host its own: its disk, and its folder of temporary files
    <folder>/hosts/NAME/{disk,scratch,shm}      the same, seen from outside; shm is its /dev/shm
    <folder>/ssh                                every host's /etc/ssh
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from kto_dist.base.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("node-a", "node-b")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_PROGRAMS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter", "mount")
_ALL = ("--net", "--mount", "--uts", "--ipc", "--pid")
_SECONDS_TO_START = 600.0
"""Of a machine that is busy with other things; one that has ended is not waited for."""
_CACHE = "torchinductor_"
"""How the name of torch's cache begins, which a user's runs share."""
OWN = ("disk", "scratch", "shm")
"""Folders that every host has for itself."""

_SSHD = """HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/login.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
SetEnv TMPDIR={scratch} CUDA_VISIBLE_DEVICES=
"""
_CLIENT = """Host *
  IdentityFile /etc/ssh/login
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_INIT = """set -e
echo {name} > /proc/sys/kernel/hostname
ip link set lo up
mount --bind {own}/disk {folder}/disk
mount --bind {own}/scratch {folder}/scratch
mount --bind {own}/shm /dev/shm
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/names /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {sshd} -D -e
"""


def why_not() -> str | None:
    """What hosts lack here; None where they can be made."""
    if os.geteuid():
        return "hosts of network namespaces need root"
    if missing := [program for program in _PROGRAMS if _found(program) is None]:
        return f"hosts of network namespaces need {', '.join(missing)} (iproute2, util-linux, openssh-server)"
    trial = "ip link add name one type bridge && ip link add name two type veth peer name six && mount -t tmpfs x /run"
    done = subprocess.run(
        ["unshare", *_ALL, "--fork", "sh", "-c", trial], env=_environment(), capture_output=True, text=True
    )
    if done.returncode:
        return f"this kernel, or container, gives no network namespaces ({done.stderr.strip()[-200:]})"
    return None


def _found(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


def _environment(**more: str) -> dict[str, str]:
    """As a login has it, with this project's code ahead of another version's."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    return {
        **kept,
        "PATH": _PATH,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        **more,
    }


def _check(words: Sequence[str], **more: object) -> None:
    done = subprocess.run(words, env=_environment(), capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")


class Nodes:
    """Hosts at one switch."""

    def __init__(self, folder: Path, names: Sequence[str] = NAMES):
        self.folder, self.names = folder, tuple(names)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, str] = {}
        self._made = 0
        self._slow: set[str] = set()
        self._keys()
        for name in self.names:
            for part in OWN:
                (self.folder / "hosts" / name / part).mkdir(parents=True, exist_ok=True)
        for part in ("disk", "scratch"):
            (self.folder / part).mkdir(exist_ok=True)

    def __enter__(self) -> "Nodes":
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], env=_environment(), preexec_fn=die_with_parent
        )
        _until(lambda: os.stat(f"/proc/{self._switch.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino)
        self._on_switch("link", "add", "switch", "type", "bridge")
        self._on_switch("link", "set", "switch", "up")
        try:
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill(name)
        self._switch.kill()
        self._switch.wait()

    @property
    def disk(self) -> Path:
        """As the hosts call it, each its own."""
        return self.folder / "disk"

    @property
    def hostfile(self) -> Path:
        """A rank a host."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots=1\n" for name in self.names))
        return path

    def seen(self, name: str, path: Path | str) -> Path:
        """From outside, what a host calls so."""
        return self.folder / "hosts" / name / Path(path).relative_to(self.folder)

    def start(self, name: str) -> None:
        """Switches it on; its disk is as it was left, its /dev/shm and its temporary files are gone."""
        own, number = self.folder / "hosts" / name, self.names.index(name) + 1
        for part in ("scratch", "shm"):
            for path in (own / part).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        script = _INIT.format(name=name, own=own, folder=self.folder, sshd=_found("sshd"))
        log = own / "sshd.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                ["unshare", *_ALL, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                preexec_fn=die_with_parent,
            )
        self._running[name] = process
        _until(lambda: self._first(name) is not None and b"Server listening" in log.read_bytes())
        self._made += 1
        port = self._ports[name] = f"port-{self._made}"
        self._on_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self._first(name)))
        self._on_switch("link", "set", port, "master", "switch", "up")
        # the same each time: the other hosts remember it
        self._inside(name, "ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}")
        self._inside(name, "ip", "addr", "add", f"{_address(number)}/24", "dev", "eth0")
        self._inside(name, "ip", "link", "set", "eth0", "up")

    def kill(self, name: str) -> None:
        """Switches it off: SIGKILL to all of its processes at once, and no word over the network."""
        process, first = self._running.pop(name), None
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            first = self._first_of(process)
        if first is not None:
            with contextlib.suppress(RuntimeError, KeyError):  # it has no link yet
                self.cut(name)
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        process.kill()
        process.wait()

    def runs(self, name: str) -> bool:
        return name in self._running

    def cut(self, name: str) -> None:
        """Takes its link down, at the switch: nothing comes through, and nobody is told."""
        self._on_switch("link", "set", self._ports[name], "down")

    def mend(self, name: str) -> None:
        self._on_switch("link", "set", self._ports[name], "up")

    def slow(self, name: str, rate: str) -> None:
        """Its link takes so much (`2mbit`), each way, from now on; what does not fit waits for up to 400 ms."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        self._on_switch("qdisc", "replace", "dev", self._ports[name], *shape, program="tc")
        self._inside(name, "tc", "qdisc", "replace", "dev", "eth0", *shape)
        self._slow.add(name)

    def quicken(self, name: str) -> None:
        """Its link takes what it can again."""
        self._on_switch("qdisc", "del", "dev", self._ports[name], "root", program="tc")
        self._inside(name, "tc", "qdisc", "del", "dev", "eth0", "root")
        self._slow.discard(name)

    def is_slow(self, name: str) -> bool:
        return name in self._slow

    def popen(self, name: str, words: Sequence[str], said: Path) -> "subprocess.Popen[bytes]":
        """A program on a host. Its process is the child of the one that is returned, which ends with its status."""
        enter = ["nsenter", "--target", str(self._first(name)), *_ALL]
        go = ["sh", "-c", 'cd "$0" && exec "$@"', str(self.disk)]
        with said.open("ab") as file:
            return subprocess.Popen(
                [*enter, *go, *words],
                env=_environment(TMPDIR=str(self.folder / "scratch")),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=die_with_parent,
            )

    def ranks(self) -> dict[int, int]:
        """By rank the process, as it is called outside."""
        return {
            int(environment["RANK"]): process.pid
            for process, words, environment in self._processes()
            if "kto_dist.commands.entry" in words and "RANK" in environment
        }

    def left(self) -> list[str]:
        """What a job has left on hosts that run: processes, shared memory, temporary files."""
        found = [f"process {process.pid}: {shlex.join(words)}" for process, words, _ in self._processes()]
        for name in self._running:
            own = self.folder / "hosts" / name
            for part in ("scratch", "shm"):
                paths = [path for path in (own / part).iterdir() if not path.name.startswith(_CACHE)]
                found += [str(path.relative_to(own.parent)) for path in paths]
        return found

    def _processes(self) -> list[tuple[psutil.Process, list[str], dict[str, str]]]:
        """Of this project, on hosts that run."""
        spaces = {_space(first) for name in self._running if (first := self._first(name)) is not None}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                words = process.cmdline()
                if any("kto_dist" in word for word in words) and _space(process.pid) in spaces - {None}:
                    found.append((process, words, process.environ()))
        # `nsenter` and the shell that start a program are outside
        return [entry for entry in found if not entry[1][0].endswith("nsenter")]

    def _keys(self) -> None:
        ssh = self.folder / "ssh"
        if ssh.exists():
            return
        ssh.mkdir(parents=True)
        for name in ("host_key", "login"):
            _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)])
        (ssh / "sshd_config").write_text(_SSHD.format(scratch=self.folder / "scratch"))
        (ssh / "ssh_config").write_text(_CLIENT)
        lines = [f"{_address(number)} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "names").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def _first(self, name: str) -> int | None:
        return self._first_of(self._running[name])

    def _first_of(self, process: "subprocess.Popen[bytes]") -> int | None:
        """The first process of the host, as it is called outside."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children():
                return child.pid
        if process.poll() is not None:
            raise RuntimeError(f"a host has ended by itself, with status {process.returncode}")
        return None

    def _on_switch(self, *words: str, program: str = "ip") -> None:
        _check(["nsenter", "--target", str(self._switch.pid), "--net", program, *words])

    def _inside(self, name: str, *words: str) -> None:
        _check(["nsenter", "--target", str(self._first(name)), "--net", *words])


class Job:
    """`kto-dist launch`, on the first host."""

    def __init__(self, nodes: Nodes, config: Path, said: Path, words: Sequence[str] = ()):
        self._nodes, self.said = nodes, said
        launch = [sys.executable, "-m", "kto_dist.commands.cli", "launch", str(config)]
        self._process = nodes.popen(nodes.names[0], [*launch, "--hostfile", str(nodes.hostfile), *words], said)

    def wait(self, seconds: float) -> int:
        """The status as a shell has it. Raises `TimeoutError`, and ends it, where it goes on for longer."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()
            raise TimeoutError(f"the job goes on after {seconds:.0f} s:\n{self.words()}") from None
        return status if status >= 0 else 128 - status

    def runs(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """To the launching process alone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                child.send_signal(number)

    def words(self) -> str:
        return self.said.read_text(errors="replace")


def _address(number: int) -> str:
    return f"10.213.7.{number}"


def _space(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    return None


def _until(happened, seconds: float = _SECONDS_TO_START) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if happened():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"a host does not start within {seconds:.0f} s")
        time.sleep(0.02)

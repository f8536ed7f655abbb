"""A program on another host, or on this one: over ssh, or directly.

What it is to be told travels by standard input; its command line is the same for everybody to see.
"""

import contextlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kto_dist.base.errors import UserError
from kto_dist.cluster.hostfile import Node

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ControlPath=none", "-T")
"""A connection of its own: over one that is shared, the keep-alive is that of whoever made it."""
_ASKS = 3
"""Questions of ssh to a silent host, before it takes it for lost."""
_HERE = {"localhost", "127.0.0.1", "::1"}


def ssh_within(seconds: float) -> tuple[str, ...]:
    """`SSH`, which takes a silent host for lost before ranks that wait so long for each other do."""
    between = max(1, min(15, int(seconds / (2 * _ASKS))))
    return (*SSH, "-o", f"ServerAliveInterval={between}", "-o", f"ServerAliveCountMax={_ASKS}")


@dataclass(frozen=True, slots=True)
class Reach:
    """How hosts are reached."""

    ssh: tuple[str, ...] = SSH
    """The command ahead of a host's name."""
    folder: str = ""
    """The working directory on every host; empty: this one's."""

    def command(self, node: Node, module: str) -> list[str]:
        """That runs a module of this package on a host, with this Python at the same path."""
        python = [sys.executable, "-u", "-m", module]
        if is_here(node):
            return python
        folder = shlex.quote(self.folder or os.getcwd())
        # `exec`: the shell must not stay between, where it would outlive what it has started
        return [*self.ssh, node.name, f"cd {folder} && exec env {_path()}{shlex.join(python)}"]

    def start(self, node: Node, module: str, *, quiet: bool = False) -> "subprocess.Popen[str]":
        """Raises `UserError` where there is no ssh here."""
        try:
            return subprocess.Popen(
                self.command(node, module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if quiet else None,
                stderr=subprocess.PIPE if quiet else None,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"{self.ssh[0]}, by which {node.name} is reached, cannot be started ({error}): install openssh-client, "
                "or name another command by --ssh"
            ) from None

    def ask(self, nodes: Sequence[Node], module: str, questions: Sequence[str], seconds: float) -> list["Answer"]:
        """All at once: each is told its question, and says what it has to."""
        started = [self.start(node, module, quiet=True) for node in nodes]
        # before anything is waited for: a host that is slow, or silent, takes no time from the others
        for process, question in zip(started, questions, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended: its answer says why
                process.stdin.write(question + "\n")
                process.stdin.flush()
        answers, deadline = [], time.monotonic() + seconds
        for process in started:
            try:
                said, complaint = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # with all that it has started, which would hold the pipes
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                said, complaint = process.communicate()
                complaint = f"no answer within {seconds:.0f} s. {complaint}"
            answers.append(Answer(process.returncode, said, complaint.strip()))
        return answers


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    said: str
    complaint: str


def is_here(node: Node) -> bool:
    own = platform.node()
    return node.address in _HERE | {own, own.partition(".")[0]}


def _path() -> str:
    """Where Python looks for this package, if not in its own environment: no secret, and needed from the start."""
    path = os.environ.get("PYTHONPATH")
    return f"PYTHONPATH={shlex.quote(path)} " if path else ""

"""A program in the place of ssh, and hosts that are all this machine: what a launcher does with several, on one."""

import os
import stat
import sys
from pathlib import Path

from kto_dist.cluster.probe import Facts

SSH = """#!{python}
# as ssh runs a command on a host: through a shell there, with nothing of this environment but what a login has
import os, sys, time
host, command = sys.argv[1], sys.argv[2]
with open({folder!r} + "/asked", "a") as file:
    file.write(host + "\\t" + command + "\\n")
down = {folder!r} + "/down-" + host
if os.path.exists(down):
    awaited = open(down).read()
    while awaited and not os.path.exists({folder!r} + "/" + awaited):
        time.sleep(0.02)
    sys.stderr.write("ssh: connect to host " + host + " port 22: Connection refused\\n")
    sys.exit(255)
if os.path.exists({folder!r} + "/mute-" + host):
    time.sleep(600)
kept = {{name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}}
os.execve("/bin/sh", ["sh", "-c", command], kept)
"""


def fake_ssh(folder: Path) -> Path:
    """Hosts with a file `down-NAME` in the folder are not reached, which shows once there is a file of the name that
    stands in it; those with `mute-NAME` say nothing; `asked` has what went over the command line."""
    program = folder / "ssh"
    program.write_text(SSH.format(python=sys.executable, folder=str(folder)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def hostfile(folder: Path, *names: str, slots: int = 1) -> Path:
    """127.0.0.2, ...: every one of them is this machine."""
    path = folder / "hostfile"
    path.write_text("# who takes part\n" + "".join(f"{name} slots={slots}\n" for name in names))
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **more}


def facts(**more: object) -> Facts:
    """What a sound host answers, but for `more`."""
    content = {
        "python": "3.11.2",
        "versions": {"torch": "2.13.0"},
        "source": "abc",
        "gpus": ["H100, 81559"] * 8,
        "cores": 64,
        "memory_gib": 1000.0,
        "clock": 1000.0,
        "port": 1234,
        "loopback": "",
        "interfaces": ["eth0"],
        "route": "eth0",
        "lost": "",
        "open_files": 65536,
        "disks": {"/dev/shm": 100.0},
        "problems": {},
        "sees": {"train.output": True},
        **more,
    }
    return Facts(**content)

"""A program in the place of ssh, and hosts that are all this machine: what a launcher does with several, on one."""

import os
import stat
import sys
from pathlib import Path

SSH = """#!{python}
# as ssh runs a command on a host: through a shell there, with nothing of this environment but what a login has
import os, sys
host, command = sys.argv[1], sys.argv[2]
with open({folder!r} + "/asked", "a") as file:
    file.write(host + "\\t" + command + "\\n")
if os.path.exists({folder!r} + "/down-" + host):
    sys.stderr.write("ssh: connect to host " + host + " port 22: Connection refused\\n")
    sys.exit(255)
if os.path.exists({folder!r} + "/mute-" + host):
    import time
    time.sleep(600)
kept = {{name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}}
os.execve("/bin/sh", ["sh", "-c", command], kept)
"""


def fake_ssh(folder: Path) -> Path:
    """Hosts with a file `down-NAME` in the folder are not reached, those with `mute-NAME` say nothing; `asked` has what
    went over the command line."""
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

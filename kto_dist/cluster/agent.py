"""What runs on every host: `python -m kto_dist.cluster.agent`, started over ssh, or directly on the launching host.

Under Slurm and Kubernetes, which start programs themselves, it is `... agent train CONFIG [section.key=value ...]`,
with NODE_RANK, NNODES, SLOTS, MASTER_ADDR and MASTER_PORT in the environment.

In:  from standard input, a line of JSON: the job (`Job`); then `here` once a second, `stop` (the ranks save and end) or
     `kill`. Where standard input ends, or nothing comes for as long as `cluster.timeout`, the launcher is gone, stopped
     or cut off, and the ranks are ended.
Out: the ranks' output; the status of the worst of them.

The job comes this way, and not on a command line, since it holds the environment, with tokens and passwords in it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from kto_dist.base.doing import Clock
from kto_dist.base.errors import UserError
from kto_dist.base.exits import DONE, FAILED, LAUNCHER, MISTAKE, TERMINATED, WORDS, leave
from kto_dist.base.processes import HOST, START, host, whereabouts
from kto_dist.base.secrets import masked
from kto_dist.training.config import Config

ENTRY = "kto_dist.commands.entry"
_SECONDS_TO_FOLLOW = 30.0
"""That ranks have to end by themselves, once one of them has failed: they say why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one host has to do."""

    module: str
    """That every rank runs."""
    words: list[str]
    """Its arguments."""
    folder: str
    """The working directory, the same path on every host."""
    environment: dict[str, str] = field(default_factory=dict)
    """Beside that of the host."""
    host: str
    """What it is called."""
    first: int
    """Rank of its first process."""
    slots: int
    """Its ranks."""
    size: int
    """Ranks of all hosts."""
    address: str
    """Of rank 0's host."""
    port: int
    grace: float
    """Seconds that ranks have to save and end."""
    silence: float = 0.0
    """Seconds without a word of the launcher, after which it counts as gone; 0 where there is none."""
    start: str = ""
    """Which start of the job this is."""

    def text(self) -> str:
        return json.dumps(asdict(self))


def job_of(words: Sequence[str], environment: Mapping[str, str]) -> Job:
    """Of a host that a scheduler has started. Raises `UserError`."""
    try:
        node, nodes = int(environment["NODE_RANK"]), int(environment["NNODES"])
        slots, address, port = int(environment["SLOTS"]), environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"a host that a scheduler starts needs NODE_RANK, NNODES, SLOTS (ranks of a host), MASTER_ADDR and "
            f"MASTER_PORT in its environment: {error} is missing, or no number"
        ) from None
    job, config, *overrides = words
    return Job(
        module=ENTRY,
        words=[job, config, *overrides],
        folder=os.getcwd(),
        host=host(),
        first=node * slots,
        slots=slots,
        size=nodes * slots,
        address=address,
        port=port,
        grace=Config.load(config, overrides).cluster.grace,
    )


def environment_of(job: Job, local: int, base: Mapping[str, str]) -> dict[str, str]:
    """Of one rank."""
    found = {
        **base,
        **job.environment,
        HOST: job.host,
        START: job.start,
        LAUNCHER: json.dumps(whereabouts()),
        "RANK": str(job.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(job.size),
        "LOCAL_WORLD_SIZE": str(job.slots),
        "LOCAL_SIZE": str(job.slots),
        "MASTER_ADDR": job.address,
        "MASTER_PORT": str(job.port),
    }
    if any(word != masked(word) for word in job.words):
        found[WORDS] = json.dumps(job.words)
    # each rank would otherwise start a thread a core, and they would fight for them
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.slots)))
    return found


class Ranks:
    """The processes of this host. They, and nothing of them, outlive this one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        command = [sys.executable, "-u", "-m", job.module, *map(masked, job.words)]
        self._processes = [
            subprocess.Popen(
                command,
                env=environment_of(job, local, os.environ),
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            for local in range(job.slots)
        ]
        self._stopped_at: float | None = None
        self._failed_at: float | None = None
        self._said: set[int] = set()
        self._silent, self._clock = 0.0, Clock()

    def hear(self) -> None:
        """The launcher is there."""
        self._silent = 0.0

    def stop(self) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def watch(self) -> int:
        """Returns when all have ended: 0, or the status of the one that says most."""
        while any(process.poll() is None for process in self._processes):
            self._look()
            time.sleep(0.1)
        self._look()
        self.kill()  # what they have started
        return worst([process.returncode for process in self._processes])

    def _mind_launcher(self) -> None:
        """A connection that was cut off ends by itself on the other side alone: the ranks would wait here for others,
        and be in the way of the next start."""
        before, self._silent = self._silent, self._silent + self._clock.passed()
        if before < self._job.silence <= self._silent:
            print(
                f"error: on {self._job.host}: nothing was heard of the launching process for {self._silent:.0f} s: it "
                "was cut off, or stopped, as Ctrl-Z does. The ranks of this host are ended (cluster.timeout)",
                file=sys.stderr,
                flush=True,
            )
            self.kill()

    def _look(self) -> None:
        self._mind_launcher()
        now = time.monotonic()
        for local, process in enumerate(self._processes):
            status = process.poll()
            if status is not None and status < 0 and local not in self._said and self._failed_at is None:
                self._said.add(local)
                print(
                    f"error: rank {self._job.first + local} on {self._job.host} was killed by signal {-status} "
                    f"({signal.Signals(-status).name}): by somebody, or by the system where memory ran out",
                    file=sys.stderr,
                    flush=True,
                )
            if status and self._failed_at is None:
                self._failed_at = now
        if self._failed_at is not None and now - self._failed_at > _SECONDS_TO_FOLLOW:
            self.kill()
        if self._stopped_at is not None and now - self._stopped_at > self._job.grace:
            self.kill()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            # a rank leads a session: what it has started goes along. SIGTERM is its own business
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number == signal.SIGTERM and process.poll() is None:
                    process.send_signal(number)
                elif number != signal.SIGTERM:
                    os.killpg(process.pid, number)


def worst(statuses: list[int]) -> int:
    """Of several processes: a mistake of the user's, a stop by a signal, the first failure, or 0."""
    shell = [status if status >= 0 else 128 - status for status in statuses]
    for wanted in (MISTAKE, TERMINATED):
        if wanted in shell and all(status in (DONE, wanted) or status > 128 for status in shell):
            return wanted
    failures = [status for status in shell if status != DONE]
    return FAILED if FAILED in failures else (failures or [DONE])[0]


def _obey(ranks: Ranks, orders: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in orders:
            ranks.hear()
            if line.strip() == "stop":
                ranks.stop()
            elif line.strip() == "kill":
                ranks.kill()
    # the launcher has ended, however it has
    ranks.stop()
    time.sleep(5.0)
    ranks.kill()
    os._exit(FAILED)


def main(words: Sequence[str]) -> int:
    try:
        if words:
            job = job_of(words, os.environ)
        else:
            content: dict[str, Any] = json.loads(sys.stdin.readline())
            job = Job(**content)
    except UserError as mistake:
        print(f"error: {masked(str(mistake))}", file=sys.stderr)
        return MISTAKE
    try:
        ranks = Ranks(job)
    except OSError as error:
        print(f"error: on {job.host}: {job.module} cannot be started in {job.folder}: {error}", file=sys.stderr)
        return MISTAKE
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ranks.stop())
    if not words:
        threading.Thread(target=_obey, args=(ranks, sys.stdin), daemon=True).start()
    return ranks.watch()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))  # not through the interpreter's end: a thread of it still reads from standard input

"""One job on several hosts: started, stopped as a whole, watched, and started again.

In:  the hosts, and what every rank is to run. Out: the exit status, as of a job on one host: 0, 2 for a mistake, 143
after SIGTERM, else a failure.

1. an agent on every host (`agent.py`), over ssh, starts its ranks; what it is to do travels by standard input
2. SIGTERM, SIGINT and SIGHUP go to every rank, which saves and ends, within `cluster.grace`
3. a host whose agent fails ends the job on the others; so does this process, however it ends. One that does not answer
   is given up, and named
4. a failure that is no mistake starts the job again, from its newest checkpoint, on the hosts that still answer
"""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kto_dist.base.exits import DONE, FAILED, MISTAKE, TERMINATED
from kto_dist.base.signals import stops_to
from kto_dist.cluster.agent import ENTRY, Job, worst
from kto_dist.cluster.hostfile import Node
from kto_dist.cluster.remote import Reach

_LOST = 255
"""How ssh ends where there is no connection, or none any more."""
_KILLED = 128
"""From here on a status is a signal's: that rank has told nobody."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
_SECONDS_TO_FOLLOW = 15.0
"""That other hosts have to end, once ranks of one have ended by themselves: those have told the others, who are stopped
or cut off if they go on."""
_SECONDS_TO_END = 20.0
"""Beyond what ranks have to save."""
_SECONDS_BETWEEN_WORDS, _LEAST_SILENCE = 1.0, 10.0
"""That agents hear of this process, and that they wait for it at least: a busy machine may keep it from saying so."""
_SECONDS_TO_KILL = 5.0
"""That an agent which can be reached takes to end its ranks by force."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is run, and where."""

    nodes: tuple[Node, ...]
    reach: Reach
    words: tuple[str, ...]
    """Of the command that every rank runs: the job, the config, overrides."""
    environment: dict[str, str]
    folder: str
    port: int
    """Free on the first host."""
    grace: float
    """Seconds."""
    timeout: float
    """Seconds that ranks of other hosts have to see that one is lost."""
    module: str = ENTRY


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job has."""

    status: int
    lost: tuple[str, ...] = ()
    """Hosts whose connection was, or that did not answer when they were to end."""
    stopped: bool = False
    """By a signal to this process."""


Again = Callable[[Plan], "Plan | None"]
"""A look at all hosts: the plan for those that answer; None where they are too few, or not ready."""


def jobs_of(plan: Plan) -> list[Job]:
    """One a host; ranks are numbered host by host."""
    size, first, jobs, start = sum(node.slots for node in plan.nodes), 0, [], uuid.uuid4().hex
    for node in plan.nodes:
        jobs.append(
            Job(
                module=plan.module,
                words=list(plan.words),
                folder=plan.folder,
                environment=plan.environment,
                host=node.address,
                first=first,
                slots=node.slots,
                size=size,
                address=plan.nodes[0].address,
                port=plan.port,
                grace=plan.grace,
                silence=max(plan.timeout, _LEAST_SILENCE),
                start=start,
            )
        )
        first += node.slots
    return jobs


def launch(plan: Plan, *, restarts: int, again: Again, pause: float = _FIRST_PAUSE) -> int:
    """Runs the job, and starts it again up to `restarts` times. Returns the exit status."""
    ended, first = run(plan), plan
    for done in range(1, restarts + 1):
        if ended.stopped or ended.status in (DONE, MISTAKE, TERMINATED):
            break
        lost = f" ({', '.join(ended.lost)} lost)" if ended.lost else ""
        _say(f"the job failed with status {ended.status}{lost}: start {done} of {restarts} in {pause:.0f} s")
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 2 * pause)
        found = again(first)  # with hosts that were left out before, and are back
        if found is None:  # a host that boots answers later
            continue
        # a run that was to begin anew, or to insist on a checkpoint, has begun by now
        resume = "checkpoint.resume=auto"
        ended = run(replace(found, words=found.words if resume in found.words else (*found.words, resume)))
    return ended.status


def run(plan: Plan) -> Ended:
    """Once."""
    agents = [_Agent(plan.reach, node, job) for node, job in zip(plan.nodes, jobs_of(plan), strict=True)]
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        for agent in agents:
            agent.tell("stop")

    silent: list[str] = []
    with stops_to(stop):
        try:
            _wait(agents, plan, received)
        finally:
            silent += [agent.node.name for agent in agents if agent.status == -1]
            for agent in agents:
                agent.end()
    broken = [agent.node.name for agent in agents if agent.status == _LOST]
    for name in broken:
        _say(f"error: {name} is lost: its connection has ended, or was never made")
    for name in silent:
        _say(f"error: {name} is lost: it does not answer, and was to end")
    lost = (*broken, *silent)
    if received:
        return Ended(128 + received[0], lost, stopped=True)
    return Ended(FAILED if lost else worst([agent.status for agent in agents]), lost)


class _Agent:
    """That of one host, at the other end of a pipe."""

    def __init__(self, reach: Reach, node: Node, job: Job) -> None:
        self.node = node
        self._process = reach.start(node, "kto_dist.cluster.agent")
        self.tell(job.text())

    def tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended
            pipe.write(line + "\n")
            pipe.flush()

    @property
    def status(self) -> int:
        """-1 while it is at work."""
        found = self._process.poll()
        return -1 if found is None else found if found >= 0 else 128 - found

    def end(self) -> None:
        """By force, if it has not ended yet."""
        if self.status == -1:
            self._process.kill()
            self._process.wait()
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError):
            pipe.close()


def _wait(agents: Sequence[_Agent], plan: Plan, received: list[int]) -> None:
    """Until all have ended, or those that are left have had time enough to."""
    failed: float | None = None
    stopped: float | None = None
    said = 0.0
    while any(agent.status == -1 for agent in agents):
        now = time.monotonic()
        if now - said > _SECONDS_BETWEEN_WORDS:
            said = now
            for agent in agents:
                agent.tell("here")
        # ranks of other hosts may end before rank 0, which has more to write, but not long after it
        if failed is None and (agents[0].status == 0 or any(agent.status > 0 for agent in agents)):
            failed = now
        if stopped is None and received:
            stopped = now
        told = any(0 < agent.status < _KILLED for agent in agents)
        patience = min(plan.timeout, _SECONDS_TO_FOLLOW) if told else plan.timeout
        late = (failed is not None and now - failed > patience) or (
            stopped is not None and now - stopped > plan.grace + _SECONDS_TO_END
        )
        if late:
            for agent in agents:
                agent.tell("kill")
            deadline = time.monotonic() + _SECONDS_TO_KILL
            while any(agent.status == -1 for agent in agents) and time.monotonic() < deadline:
                time.sleep(0.2)
            return
        time.sleep(0.1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""Every host is looked at before a job starts on any: what would stop it in an hour stops it now.

In:  the config, the hosts, how they are reached. Out: a line for each host, and what is wrong, with the remedy: what
ends the job, and what a person should know.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kto_dist.base.errors import UserError
from kto_dist.cluster.hostfile import Node
from kto_dist.cluster.probe import Facts, Question, existing
from kto_dist.cluster.remote import Answer, Reach
from kto_dist.training.config import Config

SECONDS_OF_CLOCK = 5.0
"""That clocks may differ: locks and retries compare times of files."""
GIB_OF_DISK, GIB_OF_SHM = 1.0, 0.25
OPEN_FILES = 4096
_SECONDS_TO_ANSWER = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found."""

    lines: list[str]
    """One a host."""
    wrong: list[str]
    """What ends the job."""
    doubts: list[str]
    """What a person should know."""
    environment: dict[str, str]
    """What every rank needs because of it."""
    port: int
    """Free on the first host."""
    unreachable: list[str]
    """Hosts that do not answer."""


def written(config: Config) -> dict[str, str]:
    """Folders of this disk that the job writes to."""
    named = {
        "train.output": config.train.output,
        "reference.store": config.reference.store,
        "data.cache": config.data.cache,
        "deepspeed.nvme_path": config.deepspeed.nvme_path,
        "reference.nvme_path": config.reference.nvme_path,
    }
    return {setting: str(path) for setting, path in named.items() if path and "://" not in str(path)}


def read(config: Config) -> dict[str, str]:
    """Files and folders of this disk that every host reads."""
    found = {}
    for setting, path in (("model.path", config.model.path), ("reference.path", config.reference.path)):
        if path and (path.startswith(("/", ".", "~")) or path.count("/") > 1):  # else a hub's name
            found[setting] = path
    if config.deepspeed.config:
        found["deepspeed.config"] = config.deepspeed.config
    if config.adapter.start:
        found["adapter.start"] = config.adapter.start
    for setting, paths in (("data.train", config.data.train_paths), ("data.heldout", config.data.heldout_paths)):
        for path in paths:
            if "://" not in path and not any(sign in path for sign in "*?[") and Path(path).exists():
                found[f"{setting} ({path})"] = path
    return found


def look(config: Config, nodes: Sequence[Node], reach: Reach) -> Report:
    """Asks all hosts at once."""
    folders = written(config)
    mark = f".kto-dist-{uuid.uuid4().hex}"
    marks = {setting: existing(Path(folder)) / mark for setting, folder in folders.items()}
    # a fast local disk is meant to be each host's own
    marks = {setting: path for setting, path in marks.items() if "nvme" not in setting and _touched(path)}
    told = {setting: str(path) for setting, path in marks.items()}
    questions = [
        Question(name=node.name, written=folders, read=read(config), head=nodes[0].address, marks=told)
        for node in nodes
    ]
    try:
        started = time.time()
        answers = reach.ask(
            nodes,
            "kto_dist.cluster.probe",
            [json.dumps(asdict(question)) for question in questions],
            _SECONDS_TO_ANSWER,
        )
        seconds = time.time() - started
    finally:
        for path in set(marks.values()):
            with contextlib.suppress(OSError):
                path.unlink()
    found, wrong = _facts(nodes, answers)
    unreachable = [node.name for node in nodes if node.name not in found]
    if not found:
        return Report(lines=[], wrong=wrong, doubts=[], environment={}, port=0, unreachable=unreachable)
    more, doubts = judge(nodes, found, seconds, set(marks))
    head = found.get(nodes[0].name)
    return Report(
        lines=[_line(node, found[node.name]) for node in nodes if node.name in found],
        wrong=[*wrong, *more],
        doubts=doubts,
        environment=_environment(nodes, found),
        port=0 if head is None else head.port,
        unreachable=unreachable,
    )


def free_port(node: Node, reach: Reach) -> int:
    """One that is free on a host, at which nothing else is looked. Raises `UserError` where it does not answer."""
    question = json.dumps(asdict(Question(name=node.name, head=node.address)))
    found, wrong = _facts([node], reach.ask([node], "kto_dist.cluster.probe", [question], _SECONDS_TO_ANSWER))
    if wrong:
        raise UserError(f"{wrong[0]} (it was asked for a free port, which --master-port names as well)")
    return found[node.name].port


def _touched(path: Path) -> bool:
    try:
        path.touch()
    except OSError:
        return False
    return True


def _facts(nodes: Sequence[Node], answers: Sequence[Answer]) -> tuple[dict[str, Facts], list[str]]:
    found, wrong = {}, []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            found[node.name] = Facts(**json.loads(answer.said.strip().splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            reason = (answer.complaint.splitlines() or ["no answer"])[-1]
            wrong.append(
                f"{node.name} cannot be used ({reason}): it must be reached by ssh without a password, and have this "
                "Python with this package at the same path, and this folder"
            )
    return found, wrong


def judge(
    nodes: Sequence[Node], found: dict[str, Facts], seconds: float, marked: set[str]
) -> tuple[list[str], list[str]]:
    """What is wrong, and what is doubtful. `seconds`: that the answers took; `marked`: settings with a mark."""
    wrong, doubts = _alone(nodes), []
    first = next(node.name for node in nodes if node.name in found)
    for node in nodes:
        if node.name not in found:
            continue
        facts, head = found[node.name], found[first]
        wrong += [f"{node.name}: {setting}: {text}" for setting, text in facts.problems.items()]
        for what, own, other in (
            ("Python", facts.python.rpartition(".")[0], head.python.rpartition(".")[0]),
            ("this package's source", facts.source, head.source),
            *((package, facts.versions[package], head.versions[package]) for package in head.versions),
        ):
            if own != other:
                wrong.append(f"{node.name} has another {what} ({own}) than {first} ({other}): install the same on both")
        if facts.lost and len(nodes) > 1:
            wrong.append(
                f"{node.name} does not find {nodes[0].address}, the first host, where ranks meet ({facts.lost}): make "
                "it known there, by DNS or /etc/hosts, or write the address that every host reaches in the hostfile"
            )
        if set(facts.gpus) != set(head.gpus):
            wrong.append(
                f"{node.name} has other devices ({_kinds(facts.gpus)}) than {first} ({_kinds(head.gpus)}): take hosts "
                "of one kind"
            )
        if facts.gpus and node.slots > len(facts.gpus):
            wrong.append(
                f"{node.name} has {len(facts.gpus)} GPUs and slots={node.slots} in the hostfile: one rank a GPU"
            )
        if abs(facts.clock - head.clock) > SECONDS_OF_CLOCK + seconds:
            wrong.append(
                f"the clock of {node.name} differs from that of {first} by {facts.clock - head.clock:+.0f} s: set them "
                "by NTP"
            )
        doubts += [
            f"{node.name}: {setting} has {free:.2f} GiB of free disk"
            for setting, free in facts.disks.items()
            if free < (GIB_OF_SHM if setting == "/dev/shm" else GIB_OF_DISK)
        ]
        if facts.open_files < OPEN_FILES:
            doubts.append(f"{node.name} allows {facts.open_files} open files (ulimit -n): {OPEN_FILES} are safe")
        if facts.loopback and len(nodes) > 1:
            doubts.append(
                f"the name of {node.name} leads to {facts.loopback}, where other hosts do not find it: "
                f"{_remedy(nodes, found)}"
            )
    apart = [setting for setting in sorted(marked) if not all(facts.sees.get(setting) for facts in found.values())]
    if apart and len(nodes) > 1:
        doubts.append(
            f"{', '.join(apart)}: not shared by all hosts. A run goes on there as long as every host keeps its disk"
        )
    return wrong, doubts


def _alone(nodes: Sequence[Node]) -> list[str]:
    """Where rank 0's host is called by a name that means every host itself."""
    head, *others = nodes
    away = [node.name for node in others if not node.is_loopback]
    if not head.is_loopback or not away:
        return []
    return [
        f"{head.name} is the first host, where the others look for rank 0, and on {away[0]} this name means itself: "
        "write the name or address that other hosts know it by"
    ]


def _environment(nodes: Sequence[Node], found: dict[str, Facts]) -> dict[str, str]:
    """Where a name leads to a loopback address: the interface that leads to the others, if it is one for all."""
    routes = {facts.route for facts in found.values() if facts.route and facts.route != "lo"}
    if len(nodes) < 2 or len(routes) != 1 or not any(facts.loopback for facts in found.values()):
        return {}
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), routes.pop())


def _remedy(nodes: Sequence[Node], found: dict[str, Facts]) -> str:
    """Of a name that leads to a loopback address."""
    names = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    if interface := next(iter(_environment(nodes, found).values()), None):
        return f"{names} are set to {interface}, where they are not set already"
    seen = ", ".join(f"{name}: {facts.route or 'not known'}" for name, facts in found.items())
    return f"set {names} on each host to the interface that leads to the others ({seen})"


def _line(node: Node, facts: Facts) -> str:
    devices = _kinds(facts.gpus) if facts.gpus else f"{facts.cores} cores, no GPU"
    disk = min((free for setting, free in facts.disks.items() if setting != "/dev/shm"), default=0.0)
    return (
        f"{node.name}: {node.slots} ranks; {devices}; {facts.memory_gib:.0f} GiB of memory; {disk:.0f} GiB of disk; "
        f"torch {facts.versions['torch']}, kto_dist {facts.versions['kto_dist']} ({facts.source})"
    )


def _kinds(gpus: Sequence[str]) -> str:
    kinds = {gpu: gpus.count(gpu) for gpu in gpus}
    return ", ".join(f"{count} x {gpu} MiB" for gpu, count in kinds.items()) or "no GPU"

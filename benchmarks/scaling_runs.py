"""The processes of a run that `scaling.py` measures.

On a CPU ranks are forked from this process, which has imported everything before: importing takes longer than most of
these runs. Where there is a GPU each is a process of its own.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import click
import machine
import scaling_rank
from scaling_cases import Case, warm

from kto_dist.base.ports import free_port

HERE = Path(__file__).resolve().parent
SHOWN = 15
"""Last lines of a run that failed."""


def run(config: Any, case: Case, folder: Path, steps: int, limit: float) -> dict[str, Any]:
    """What rank 0 leaves. Raises `ClickException` where a rank fails."""
    from kto_dist.base.config import to_yaml

    file, result, log = folder / "config.yaml", folder / "result.json", folder / "said.txt"
    file.write_text(to_yaml(config))
    words = [str(file), str(result), str(warm(steps)), str(steps), *["memory"] * case.memory]
    start = _process if machine.has_gpu() else _fork
    alone = case.ranks == 1
    ranks = [start(words, {} if alone else environment, log) for environment in _environments(case)]
    if not _ended(ranks, limit):
        raise click.ClickException(f"{case.name} took more than {limit:.0f} s")
    if not result.exists():
        said = log.read_text(errors="replace").splitlines()[-SHOWN:]
        raise click.ClickException(f"{case.name} left no result:\n" + "\n".join(said))
    return json.loads(result.read_text())


def _environments(case: Case) -> list[dict[str, str]]:
    meeting = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # a node of its own: first of its ranks
    return [
        meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank if case.nodes == 1 else 0)} for rank in range(case.ranks)
    ]


def _process(words: list[str], environment: dict[str, str], log: Path) -> int:
    command = [sys.executable, str(HERE / "scaling_rank.py"), *words]
    opened = (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    files = [opened, (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(command[0], command, {**os.environ, **environment}, file_actions=files)


COMMON = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
IMPORTED = (
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
    "kto_dist.training.loop",
)


def prepare() -> None:
    """Before the first fork: what every rank would import, with one thread."""
    import torch

    os.environ.update(COMMON)
    if machine.has_gpu():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)


def _fork(words: list[str], environment: dict[str, str], log: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(environment)
        sys.argv = ["scaling_rank.py", *words]
        scaling_rank.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(ranks: list[int], limit: float) -> bool:
    """Whether all have, within so many seconds; the others are ended. One that fails ends the others, which wait."""
    left, deadline = set(ranks), time.monotonic() + limit
    failed = False
    try:
        while left and not failed and time.monotonic() < deadline:
            for pid in list(left):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    left.discard(pid)
                    failed |= status != 0
            time.sleep(0.05)
        return failed or not left
    finally:
        for pid in left:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

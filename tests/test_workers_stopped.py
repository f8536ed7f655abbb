"""Workers that are told to stop: what they have scored is stored, and their piece is free."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from reference_runs import Noted, noted, pieces_of, scored_and_found, with_forward, work
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.exits import Stopped
from kto_dist.model.engines import Reference
from kto_dist.reference.worker import TERMS, Working
from kto_dist.store.tools import summarise, verify
from kto_dist.training.config import Config

PIECE = 300
"""Tokens, of about ten pairs."""


def test_a_worker_needs_no_launcher_heeds_none_and_gives_its_piece_back_on_sigterm(tmp_path, tiny_model, tiny_log):
    path = tmp_path / "config.yaml"
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "kto_dist.commands.cli", "precompute", str(path), "--worker"]
    # as one of four under some launcher
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with subprocess.Popen(
        command, env={**os.environ, **ranks}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        while worker.poll() is None and not list((tmp_path / "store").glob("*/piece-*")):
            time.sleep(0.01)
        worker.send_signal(signal.SIGTERM)
        said = worker.stdout.read()
    assert worker.returncode in (-signal.SIGTERM, 143, 0), said
    assert not list((tmp_path / "store").glob("*/piece-*"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "are stored" in done.stdout, done.stdout + done.stderr
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0


def _stopped(config: Config, batches: int | None) -> tuple[int, str]:
    """The exit status of a worker that gets a SIGTERM in the midst of its first shard, and what it says."""

    def stop(done: int) -> None:
        if done == batches:
            os.kill(os.getpid(), signal.SIGTERM)

    notes = Noted(config, stop)
    try:
        work(config, Working(piece_tokens=PIECE), notes.watch, with_forward(notes.wrap))
    except Stopped as stopped:
        return stopped.exit_code, str(stopped)
    return 0, "nothing"


@pytest.mark.parametrize("batches", (1, 3))
def test_a_worker_that_gets_a_sigterm_loses_nothing_of_what_it_has_scored(tmp_path, tiny_model, tiny_log, batches):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=96)
    status, said = run_ranks(_stopped, 1, config, batches)[0]
    assert status == 143 and "what it has scored is stored" in said
    # after the micro-batch at hand
    assert len(Path(f"{config.train.output}-scored").read_text().split()) == batches
    (summary,) = summarise(config.reference.store)
    pairs = sum(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert 0 < summary.pairs == noted(config) < pairs
    assert not list(Path(config.reference.store).glob("*/piece-*")) and not summary.users
    # the next one scores what its piece still lacked, and no more
    assert run_ranks(_stopped, 1, config, None)[0][0] == 0 and noted(config) == pairs


class Terminated(Reference):
    """A reference during whose loading a SIGTERM comes."""

    def __init__(self, *arguments: Any, **settings: Any):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def _loads(config: Config) -> None:
    work(config, Working(piece_tokens=PIECE), engine=Terminated)


def test_a_sigterm_while_the_model_loads_ends_the_worker_at_once_and_gives_its_piece_back(
    tmp_path, tiny_model, tiny_log
):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    with pytest.raises(RuntimeError, match=r"died without a result \(status -15\)"):
        run_ranks(_loads, 1, config)
    assert list(Path(config.reference.store).glob(f"*/{TERMS}"))
    assert not list(Path(config.reference.store).glob("*/piece-*"))


AS_PROCESS_1 = """
import os, time
from kto_dist.base.signals import before_sigterm, heed_sigterm_as_process_1

pid, kill = os.getpid(), os.kill
os.getpid = lambda: 1
os.kill = lambda pid, number: None  # the kernel sends it no signal that it does not handle
heed_sigterm_as_process_1()
if {busy}:
    with before_sigterm(lambda: print("last words", flush=True)):
        kill(pid, 15)
        time.sleep(10)
kill(pid, 15)
"""


@pytest.mark.parametrize(("busy", "said"), [(False, ""), (True, "last words\n")])
def test_a_sigterm_ends_process_1_of_a_container_too(busy, said):
    done = subprocess.run([sys.executable, "-c", AS_PROCESS_1.format(busy=busy)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, said)


def _hangs(config: Config, until: Path) -> list[str]:
    """The warnings of a worker that hangs after its second micro-batch, while its lease's thread lives."""

    def hang(done: int) -> None:
        while done == 2 and not until.exists():
            time.sleep(0.05)

    warned: list[str] = []
    Console.warn = lambda self, text: warned.append(text)
    notes = Noted(config, hang)
    work(config, Working(piece_tokens=PIECE, lease_seconds=4.0, patience=2.0), notes.watch, with_forward(notes.wrap))
    return warned


def _works(config: Config) -> int:
    return work(config, Working(piece_tokens=PIECE)).scored_once


def test_the_piece_of_a_worker_that_hangs_is_scored_by_another(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=96, train__max_steps=2)
    scored, until = Path(f"{config.train.output}-scored"), tmp_path / "go on"
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(run_ranks, _hangs, 1, config, until)
        try:
            while not hanging.done() and not (scored.exists() and len(scored.read_text().split()) == 2):
                time.sleep(0.01)
            others = run_ranks(_works, 1, config)[0]
        finally:
            until.touch()
        (warned,) = hanging.result()
    pairs = sum(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert others == pairs and noted(config) < pairs
    assert [text for text in warned if "no sign of work for more than 2 s" in text]
    assert [text for text in warned if "another worker may have its piece" in text]
    (verdict,) = verify(config.reference.store)
    assert verdict.good and (verdict.pairs, verdict.repeated) == (pairs, 0)

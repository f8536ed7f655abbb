"""Workers killed or stopped at any moment, as if on two machines, beside late ones, one of another model, and `gc`: the
store ends whole, and nothing is scored twice but what a killed or stopped worker had in hand."""

import hashlib
import os
import platform
import random
import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from reference_runs import logps_of_pairs, pieces_of, with_forward, work
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config

from kto_dist.base.errors import UserError
from kto_dist.base.processes import whereabouts
from kto_dist.reference.progress import Progress
from kto_dist.reference.worker import Working
from kto_dist.store.gc import collect, plan_gc
from kto_dist.store.leases import is_piece
from kto_dist.store.shards import NAME
from kto_dist.store.storage import LocalStorage
from kto_dist.store.tools import summarise, verify
from kto_dist.training.config import Config

PIECE, LEASE = 600, 6.0
"""Tokens, of about twenty pairs; and seconds of silence."""
SECONDS_A_BATCH = 0.25
MOMENTS = (
    *("loading", "loaded", "before creating a lease", "creating a lease", "after creating a lease"),
    *("before writing a shard", "writing a shard", "after writing a shard"),
    *("before writing a lease", "writing a lease", "after writing a lease"),
    *("before removing a lease", "after removing a lease"),
)
"""At which a worker kills itself; what is written between `before` and `after` has its temporary name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What becomes of a worker."""

    late: float = 0.0
    """Seconds until it starts."""
    moment: str = ""
    """At which it is killed; "": at none."""
    times: int = 1
    """That this moment comes."""
    after: float | None = None
    """Seconds from its start to a signal from outside."""
    stopped: float | None = None
    """Seconds that this signal stops it; None: it kills."""

    @property
    def struck(self) -> bool:
        return bool(self.moment) or self.after is not None


class Strikes:
    """Kills this process at the moment of its fate."""

    def __init__(self, fate: Fate, notes: Path):
        self._fate, self._left, self._notes = fate, fate.times, notes

    def __call__(self, moment: str) -> None:
        if moment == self._fate.moment:
            self._left -= 1
            if not self._left:
                (self._notes / f"killed-{os.getpid()}").write_text(moment)
                os.kill(os.getpid(), signal.SIGKILL)

    def watch_storage(self) -> None:
        for name, doing in (("create", "creating"), ("write", "writing"), ("remove", "removing")):
            setattr(LocalStorage, name, self._around(getattr(LocalStorage, name), doing))
        for name, doing in (("replace", "writing"), ("link", "creating")):
            setattr(os, name, self._ahead_of(getattr(os, name), doing))

    def _around(self, real: Callable[..., Any], doing: str) -> Callable[..., Any]:
        def method(storage: LocalStorage, name: str, *rest: Any) -> Any:
            self(f"before {doing} {_kind(name)}")
            result = real(storage, name, *rest)
            self(f"after {doing} {_kind(name)}")
            return result

        return method

    def _ahead_of(self, real: Callable[..., Any], doing: str) -> Callable[..., Any]:
        def function(source: Any, target: Any, *rest: Any, **more: Any) -> Any:
            self(f"{doing} {_kind(Path(target).name)}")
            return real(source, target, *rest, **more)

        return function


def _kind(name: str) -> str:
    return "a lease" if is_piece(name) else "a shard" if NAME.fullmatch(name) else "something"


class Scored:
    """Notes who has scored which row, in a file of all workers, and takes its time."""

    def __init__(self, file: Path, number: int):
        self._file, self._number = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number
        self._rows: list[str] = []

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(**batch: Any) -> Any:
            logps = forward(**batch)
            tokens = batch["input_ids"].reshape(-1).numpy()
            rows = [tokens[start:stop] for start, stop in pairwise(batch["bounds"].tolist())]
            # padding is a row of zeros; whoever looks at the model before the pass calls this, and never `watch`
            self._rows = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows if row.any()]
            return logps

        return noting

    def watch(self, progress: Progress) -> None:
        if self._rows:
            os.write(self._file, "".join(f"{self._number} {row}\n" for row in self._rows).encode())
            self._rows = []
            time.sleep(SECONDS_A_BATCH)


def _worker(config: Config, number: int, fate: Fate, notes: Path, host: str) -> int:
    """Its own number of pairs."""
    platform.node = lambda: host
    if host == "there":  # with a clock that is an hour ahead
        real = time.time
        time.time = lambda: real() + 3600
    assert whereabouts()["host"] == host
    time.sleep(fate.late)
    strikes = Strikes(fate, notes)
    strikes.watch_storage()
    if fate.after is not None:
        pid, number_of = os.getpid(), "KILL" if fate.stopped is None else "STOP"
        goes_on = "" if fate.stopped is None else f"; sleep {fate.stopped}; kill -CONT {pid}"
        said = notes / f"signalled-{pid}"
        subprocess.Popen(["sh", "-c", f"sleep {fate.after}; kill -{number_of} {pid} && echo > {said}{goes_on}"])
    scored = Scored(notes / f"scored-{config.train.output.rpartition('/')[2]}", number)
    plain = with_forward(scored.wrap)

    class Engine(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **settings: Any):
            strikes("loading")
            super().__init__(*arguments, **settings)
            strikes("loaded")

    return work(config, Working(piece_tokens=PIECE, lease_seconds=LEASE), scored.watch, Engine).scored_once


def _one(*arguments: Any) -> int | None:
    """None where it was killed."""
    try:
        return run_ranks(_worker, 1, *arguments)[0]
    except RuntimeError as error:
        assert "died without a result" in str(error)
        return None


@contextmanager
def _cleared_out_meanwhile(store: str) -> Iterator[None]:
    done = threading.Event()

    def clear() -> None:
        while not done.wait(0.3):
            try:
                for _ in collect(store, plan_gc(store, warn=lambda text: None)):
                    pass
            except UserError as error:  # there is no store yet
                assert "holds no reference store" in str(error)

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _fates(draw: random.Random, struck: int) -> list[Fate]:
    fates = []
    for number in range(struck):
        kind = ("moment", "moment", "killed", "moment", "stopped", "killed")[number % 6]
        if kind == "moment":
            fates.append(Fate(moment=draw.choice(MOMENTS), times=draw.randint(1, 3)))
        elif kind == "killed":
            fates.append(Fate(after=draw.uniform(0, 7)))
        else:
            fates.append(Fate(after=draw.uniform(0.5, 5), stopped=LEASE + draw.uniform(0.5, 4)))
    return fates


def fill(folder: Path, model: Path, seed: int, struck: int, late: int) -> str:
    """What befell whom."""
    draw, notes = random.Random(seed), folder / "notes"
    log = write_jsonl(folder / "thumbs.jsonl", thumbs(160, 40, seed=seed))
    notes.mkdir()
    alone = {"reference__packing": False, "reference__share_prefixes": False, "reference__tokens_per_batch": 96}
    plain = tiny_config(folder, model, log, reference__store=str(folder / "plain"), **alone)
    expected = run_ranks(logps_of_pairs, 1, plain)[0]
    (summary,) = summarise(plain.reference.store)
    config = tiny_config(folder, model, log, **alone)
    other = tiny_config(folder, save_tiny(folder / "other", seed=1), log, train__output=str(folder / "other-run"))
    fates = [*_fates(draw, struck), *(Fate(late=draw.uniform(0.5, 6)) for _ in range(late))]
    jobs = [(config, number, fate, notes, draw.choice(("here", "there"))) for number, fate in enumerate(fates)]
    jobs.append((other, len(fates), Fate(), notes, "here"))
    with ThreadPoolExecutor(len(jobs)) as pool, _cleared_out_meanwhile(config.reference.store):
        done = list(pool.map(lambda job: _one(*job), jobs))
    assert all(scored is not None for scored, (_, _, fate, *_) in zip(done, jobs, strict=True) if not fate.struck)

    models = {row.fingerprint: row for row in summarise(config.reference.store)}
    # pairs that were stored twice count twice
    assert len(models) == 2 and models[summary.fingerprint].pairs == summary.pairs, fates
    assert all(verdict.good for verdict in verify(config.reference.store))
    lines = [line.split() for line in (notes / "scored-run").read_text().splitlines()]
    scorers: dict[str, list[int]] = defaultdict(list)
    for number, row in lines:
        scorers[row].append(int(number))
    assert len(scorers) == summary.pairs
    blameless = {number for number, fate in enumerate(fates) if not fate.struck}
    again = {row: who for row, who in scorers.items() if len(who) > 1}
    assert all(len(blameless.intersection(who)) <= 1 and set(who) - blameless for who in again.values()), again
    # who was struck may lose what was in hand: a piece, and the micro-batch during which another has it already
    lost = Counter(number for who in again.values() for number in who[:-1])
    assert all(pairs <= max(run_ranks(pieces_of, 1, config, PIECE)[0]) + 4 for pairs in lost.values()), lost
    assert run_ranks(logps_of_pairs, 1, config)[0] == pytest.approx(expected, rel=1e-5)
    moments = sorted(file.read_text() for file in notes.glob("killed-*"))
    return (
        f"killed at {moments}, {len(list(notes.glob('signalled-*')))} signals, {done.count(None)} of {len(jobs)} died; "
        f"{summary.pairs} pairs, {len(lines)} scored, {len(again)} of them again"
    )


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_workers_struck_at_any_moment_leave_a_whole_store_and_score_again_only_what_was_in_hand(
    tmp_path, tiny_model, seed
):
    print(fill(tmp_path, tiny_model, seed, struck=6, late=2))

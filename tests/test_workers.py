"""Workers that come and go fill one store: whole, each pair once but for what the killed ones had in hand."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from reference_runs import Noted, logps_of_pairs, noted, pieces_of, score, scored_and_found, with_forward, work
from tiny import save_tiny
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.processes import whereabouts
from kto_dist.data import tokenise
from kto_dist.reference.worker import TERMS, Working
from kto_dist.store.gc import plan_gc
from kto_dist.store.leases import Leases, is_piece
from kto_dist.store.storage import LocalStorage
from kto_dist.store.store import Store
from kto_dist.store.tools import summarise, verify
from kto_dist.training import precompute
from kto_dist.training.config import Config
from kto_dist.training.prepare import find, prepare

PIECE = 300
"""Tokens, of about ten pairs."""


def _worker(config: Config, batches: int | None, after: float, late: float) -> int:
    """Scores what there is to take; its own number of pairs. Killed some time after its batch number `batches`."""
    time.sleep(late)

    def kill(done: int) -> None:
        if done == batches:
            subprocess.Popen(["sh", "-c", f"sleep {after}; kill -9 {os.getpid()}"])

    notes = Noted(config, kill)
    outcome = work(config, Working(piece_tokens=PIECE), notes.watch, with_forward(notes.wrap))
    return outcome.scored_once


def _one_of_them(config: Config, *arguments: object) -> int | None:
    """Pairs that it says it has scored; None where it was killed."""
    try:
        return run_ranks(_worker, 1, config, *arguments)[0]
    except RuntimeError as error:
        assert "died without a result" in str(error)
        return None


def fill_with_workers(folder: Path, model: Path, log: Path, seed: int, *, killed: int, late: int) -> None:
    draw = random.Random(seed)
    plain = tiny_config(folder, model, log, reference__store=str(folder / "plain"))
    expected = run_ranks(logps_of_pairs, 1, plain)[0]
    (summary,) = summarise(plain.reference.store)
    config = tiny_config(folder, model, log, reference__tokens_per_batch=96)
    other = tiny_config(folder, save_tiny(folder / "other", seed=1), log, train__output=str(folder / "other-run"))
    jobs = [(config, draw.randint(1, 4), draw.uniform(0, 0.05), 0.0) for _ in range(killed)]
    jobs += [(config, None, 0.0, draw.uniform(0, 3)) for _ in range(late)]
    jobs += [(other, None, 0.0, 0.0)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = list(pool.map(lambda job: _one_of_them(*job), jobs))
    # the last one alone has another model
    assert done[-1] and done[killed] is not None
    lost = done[:killed].count(None)
    models = {row.fingerprint: row for row in summarise(config.reference.store)}
    assert len(models) == 2 and models[summary.fingerprint].pairs >= summary.pairs
    assert all(verdict.good and not verdict.repeated for verdict in verify(config.reference.store))
    pairs = models[summary.fingerprint].pairs
    assert pairs == summary.pairs and models[summary.fingerprint].users == []
    assert pairs <= noted(config) <= pairs + lost * max(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert not list(Path(config.reference.store).glob("*/piece-*"))
    values = run_ranks(logps_of_pairs, 1, config)[0]
    assert values == pytest.approx(expected, rel=1e-5)


def test_workers_that_are_killed_or_come_late_fill_a_store_once_beside_one_of_another_model(
    tmp_path, tiny_model, tiny_log
):
    fill_with_workers(tmp_path, tiny_model, tiny_log, 0, killed=3, late=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_many_workers_fill_a_store_once(tmp_path, tiny_model, tiny_log, seed):
    fill_with_workers(tmp_path, tiny_model, tiny_log, seed, killed=5, late=2)


def _refused(config: Config) -> tuple[str, int]:
    """What a worker on another device is told, and what one that mixes has scored."""
    store = Path(config.reference.store)
    work(config, Working(piece_tokens=PIECE))
    (terms,) = store.glob(f"*/{TERMS}")
    terms.write_text(json.dumps({**json.loads(terms.read_text()), "device": "another"}))
    for shard in list(store.glob("*/*.parquet"))[1:]:
        shard.unlink()
    said = ""
    try:
        work(config, Working())
    except UserError as error:
        said = str(error)
    return said, work(config, Working(any_device=True)).scored_once


def test_a_worker_on_another_device_joins_only_where_it_is_asked_to(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    said, scored = run_ranks(_refused, 1, config)[0]
    assert "device is another there and" in said and "--any-device" in said and scored
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0


def _makes_tokens(config: Config) -> int:
    real = tokenise.over_chunks

    def slowly(*arguments: Any, **more: Any) -> Any:
        with open(f"{config.train.output}-tokenised", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1)
        return real(*arguments, **more)

    tokenise.over_chunks = slowly
    return precompute.work(config, Working(piece_tokens=PIECE)).scored_once


def test_workers_that_start_together_make_tokens_of_the_rows_once(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    with ThreadPoolExecutor(3) as pool:
        scored = [ranks[0] for ranks in pool.map(lambda _: run_ranks(_makes_tokens, 1, config), range(3))]
    assert len(Path(f"{config.train.output}-tokenised").read_text().split()) == 1
    assert sum(scored) == sum(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert not list(Path(config.data.cache).glob("piece-*"))


def _with_late_listings(config: Config) -> tuple[int, int]:
    """Pairs of all pieces, and what a worker has scored that sees no shard before it is two seconds old."""
    real = LocalStorage.files
    LocalStorage.files = lambda self: [
        file for file in real(self) if is_piece(file.name) or file.modified < time.time() - 2
    ]
    notes = Noted(config)
    work(config, Working(piece_tokens=PIECE), notes.watch, with_forward(notes.wrap))
    return sum(pieces_of(config, PIECE)), noted(config)


def test_a_worker_knows_what_it_has_stored_before_a_listing_does(tmp_path, tiny_model, tiny_log):
    pairs, scored = run_ranks(_with_late_listings, 1, tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2))[
        0
    ]
    assert pairs == scored


def _heldout_too(config: Config) -> tuple[int, int, tuple[int, int]]:
    first = work(config, Working(piece_tokens=PIECE))
    again = work(config, Working())
    return first.scored_once, again.scored_once, scored_and_found(config)


def test_a_worker_alone_scores_all_that_a_run_needs_and_a_second_one_nothing(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, data__heldout=0.3, train__max_steps=2)
    scored, again, (missing, found) = run_ranks(_heldout_too, 1, config)[0]
    assert scored and (again, missing) == (0, 0) and found >= scored


def _taken(config: Config, before: Callable[[], object], working: Working) -> tuple[int, int]:
    """Of a worker: the pieces among which it could choose at first, and what it has scored. `before` happens when it
    has looked what is missing, and has no piece yet."""
    real, seen = Leases.take, []

    def take(self: Leases, pieces: list[str]) -> Any:
        seen.append(len(pieces))
        if len(seen) == 1:
            before()
        return real(self, pieces)

    Leases.take = take
    scored = work(config, working).scored_once
    return seen[0], scored


def _overtaken(config: Config) -> int:
    return _taken(config, lambda: score(config), Working(piece_tokens=PIECE))[1]


def _at_work(config: Config) -> tuple[list[str], list[str], int]:
    """Who uses the store while a worker is at work, what `gc` would do to it, and the worker's process."""
    seen: list[list[str]] = []

    def look() -> None:
        (summary,) = summarise(config.reference.store)
        removals = plan_gc(config.reference.store, prefix=summary.fingerprint)
        seen.extend([summary.users, [removal.why for removal in removals]])

    _taken(config, look, Working(piece_tokens=PIECE))
    return seen[0], seen[1], os.getpid()


def test_who_works_is_named_and_gc_leaves_the_store_alone(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    users, removals, worker = run_ranks(_at_work, 1, config)[0]
    assert len(users) == 1 and users[0].startswith(f"process {worker} on ") and not removals


def test_a_worker_that_has_taken_a_piece_looks_again_what_it_lacks(tmp_path, tiny_model, tiny_log):
    assert run_ranks(_overtaken, 1, tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)) == [0]


def _with_other_batches(config: Config) -> int:
    work(config, Working(piece_tokens=PIECE))
    for shard in Path(config.reference.store).glob("*/*.parquet"):
        shard.unlink()
    return _taken(config, lambda: None, Working(piece_tokens=2 * PIECE))[0]


def test_all_workers_of_a_store_cut_the_pieces_of_the_first_one(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    pieces = len(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert run_ranks(_with_other_batches, 1, config) == [pieces] and pieces > 2


def _waits(config: Config) -> tuple[list[str], int]:
    """What a worker says of a piece that another has, which gives it back some looks later; and what it scores."""
    real, held, said, looks = Leases.take, [], [], []

    def take(self: Leases, pieces: list[str]) -> Any:
        if not held:
            (folder,) = Path(config.reference.store).iterdir()
            held.append(folder / f"piece-{pieces[0]}.0.json")
            held[0].write_text(json.dumps({**whereabouts(), "host": "elsewhere", "pid": 12, "seconds": 100.0}))
        looks.extend(said[:1])
        if len(looks) == 3:
            held[0].unlink()
        return real(self, pieces)

    def say(self: Console, text: str) -> None:
        if "waiting" in text:
            said.append(text)

    Leases.take, Console.say = take, say
    return said, work(config, Working(piece_tokens=PIECE, lease_seconds=1.0)).scored_once


def test_a_worker_that_waits_says_for_whom_and_does_the_rest(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    said, scored = run_ranks(_waits, 1, config)[0]
    assert len(said) == 1 and "waiting for 1 piece that other workers have (process 12 on elsewhere)" in said[0]
    assert scored == sum(run_ranks(pieces_of, 1, config, PIECE)[0])


def _said(config: Config, working: Working, **options: Any) -> tuple[int, list[str]]:
    """What a worker has scored, and all that it has said and warned of."""
    said: list[str] = []
    before = Console.say, Console.warn
    Console.say = Console.warn = lambda self, text: said.append(text)
    try:
        return work(config, working, **options).scored_once, said
    finally:
        Console.say, Console.warn = before


def _too_late(config: Config) -> tuple[int, list[str], list[str]]:
    work(config, Working(piece_tokens=PIECE))
    (terms,) = Path(config.reference.store).glob(f"*/{TERMS}")
    terms.write_text(json.dumps({**json.loads(terms.read_text()), "device": "another"}))
    files = sorted(terms.parent.iterdir())
    LocalStorage.write = LocalStorage.create = None  # whoever writes fails
    scored, said = _said(config, Working())
    return scored, said, [file.name for file in files if not file.exists()]


def test_a_worker_that_comes_when_all_is_done_says_so_on_any_device_and_writes_nothing(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    scored, said, gone = run_ranks(_too_late, 1, config)[0]
    assert scored == 0 and not gone
    assert any("pairs are stored, 0 scored here" in text for text in said), said
    assert not any("the store lacks" in text for text in said)


def _on_a_full_disk(config: Config) -> tuple[str, list[str], int]:
    """What a worker says whose second shard finds no room, the leases that it leaves, and what the next one scores."""
    real, shards = LocalStorage.write, []

    def write(self: LocalStorage, name: str, data: bytes) -> None:
        shards.extend([name] if name.endswith(".parquet") else [])
        if len(shards) == 2 and name == shards[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, data)

    LocalStorage.write = write
    refused = ""
    try:
        work(config, Working(piece_tokens=PIECE))
    except UserError as error:
        refused = str(error)
    left = [file.name for file in Path(config.reference.store).glob("*/piece-*")]
    return refused, left, work(config, Working()).scored_once


def test_a_worker_whose_disk_is_full_says_so_and_leaves_its_piece_to_others(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    refused, left, scored = run_ranks(_on_a_full_disk, 1, config)[0]
    assert "is full: make room; what has been scored so far is kept" in refused and not left
    pieces = run_ranks(pieces_of, 1, config, PIECE)[0]
    # only the first shard, of a piece or less, was kept
    assert sum(pieces) - max(pieces) <= scored < sum(pieces)
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0


def _loses_shards(config: Config) -> tuple[list[str], int]:
    store, removed = Path(config.reference.store), []

    def remove(done: int) -> None:
        if done == 12:
            removed.extend(store.glob("*/*.parquet"))
            shutil.rmtree(store)

    notes = Noted(config, remove)
    _, said = _said(config, Working(piece_tokens=PIECE), watch=notes.watch, engine=with_forward(notes.wrap))
    return said, len(removed)


def test_a_store_that_is_removed_meanwhile_is_filled_again(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=96)
    said, removed = run_ranks(_loses_shards, 1, config)[0]
    assert removed and sum("shards are gone from the reference store" in text for text in said) == 1
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0


def _beside_another_config(config: Config) -> list[str]:
    work(config, Working(piece_tokens=PIECE))
    (folder,) = Path(config.reference.store).iterdir()
    for shard in folder.glob("*.parquet"):
        shard.unlink()
    (folder / "piece-ab.0.json").write_text("{}")
    return _said(config, Working())[1]


def test_a_worker_says_that_those_of_another_config_are_at_work(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    said = run_ranks(_beside_another_config, 1, config)[0]
    lacking = sum(run_ranks(pieces_of, 1, config, PIECE)[0])
    assert sum(f"the store lacks {lacking} pairs" in text for text in said) == 1
    assert sum("1 pieces that other workers have, or were killed with, are none of this config's" in t for t in said)


def _beside_another_precision(config: Config) -> list[str]:
    _, fingerprint = find(prepare(config, Console()), Console())
    with Store(config.reference.store, replace(fingerprint, dtype="bfloat16")) as other:
        other.begin()
        return _said(config, Working(piece_tokens=PIECE))[1]


def test_a_worker_says_that_others_score_the_same_weights_in_another_precision(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    said = run_ranks(_beside_another_precision, 1, config)[0]
    assert sum("dtype bfloat16 there and float32 here" in text for text in said) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worker", "--ranks", "2"], "--ranks (2) is for a pass without --worker"),
        (["--any-device"], "is for --worker"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, tiny_model, tiny_log, words, message):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tmp_path, tiny_model, tiny_log)))
    command = [sys.executable, "-m", "kto_dist.commands.cli", "precompute", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def _on_s3(environment: dict[str, str], config: Config) -> tuple[int, int]:
    os.environ.update(environment)
    return work(config, Working(piece_tokens=PIECE)).scored_once, scored_and_found(config)[0]


def test_workers_share_a_store_on_s3(tmp_path, tiny_model, tiny_log, s3):
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__store="s3://bucket/workers", train__max_steps=2)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: run_ranks(_on_s3, 1, environment, config)[0], range(2)))
    assert [missing for _, missing in done] == [0, 0]
    assert sum(scored for scored, _ in done) == sum(run_ranks(pieces_of, 1, config, PIECE)[0])


class Stolen:
    """An engine during whose first batch of a piece another worker takes the piece."""

    def __init__(self, config: Config):
        self._store, self._done = Path(config.reference.store), False

    def wrap(self, forward):
        def stealing(**batch):
            for file in () if self._done else self._store.glob("*/piece-*"):
                self._done = True
                # until the holder has looked: then it renews nothing any more. It may write its own once more before
                while any(thread.name == "lease" for thread in threading.enumerate()):
                    file.write_text(json.dumps({"token": "another", "seconds": 0.1}))
                    time.sleep(0.01)
            return forward(**batch)

        return stealing


def _robbed(config: Config) -> tuple[int, list[str]]:
    working = Working(piece_tokens=PIECE, lease_seconds=0.2)
    scored, said = _said(config, working, engine=with_forward(Stolen(config).wrap))
    return scored, [text for text in said if "a lease was" in text]


def test_a_worker_that_has_lost_its_piece_gives_it_up_and_says_so(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    scored, said = run_ranks(_robbed, 1, config)[0]
    assert len(said) == 1 and "another worker may have its piece" in said[0]
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0 and scored

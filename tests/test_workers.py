"""Workers that come and go fill one store: whole, each pair once but for what the killed ones had in hand."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pair_key import keys_array, pair_key
from ranks import run_ranks
from reference_runs import Noted, logps_of_pairs, noted, pieces_of, score, scored_and_found, with_forward, work
from tiny import save_tiny
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.reference.pieces import Tally, cut_pieces
from kto_dist.reference.worker import TERMS, Terms, Working, join
from kto_dist.store.shards import Pairs, merge
from kto_dist.store.storage import LocalStorage
from kto_dist.store.tools import summarise, verify
from kto_dist.training.config import Config

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
@pytest.mark.parametrize("seed", range(10))
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


def _beside_workers(config: Config) -> tuple[list[str], list[str]]:
    """What a pass is told without a worker at work, and with one."""
    told: list[list[str]] = []
    for piece in (None, "ab"):
        said, console = [], Console()
        console.warn = said.append
        for shard in Path(config.reference.store).glob("*/*.parquet"):
            shard.unlink()
        if piece:
            (folder,) = Path(config.reference.store).iterdir()
            (folder / f"piece-{piece}.0.json").write_text("{}")
        score(config, console)
        told.append([text for text in said if "pieces" in text])
    return told[0], told[1]


def test_a_pass_without_leases_says_that_workers_are_at_work(tmp_path, tiny_model, tiny_log):
    before, after = run_ranks(_beside_workers, 1, tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1))[0]
    assert not before and len(after) == 1 and "workers have 1 pieces of this reference in hand" in after[0]


def _heldout_too(config: Config) -> tuple[int, int, tuple[int, int]]:
    first = work(config, Working(piece_tokens=PIECE))
    again = work(config, Working())
    return first.scored_once, again.scored_once, scored_and_found(config)


def test_a_worker_alone_scores_all_that_a_run_needs_and_a_second_one_nothing(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, data__heldout=0.3, train__max_steps=2)
    scored, again, (missing, found) = run_ranks(_heldout_too, 1, config)[0]
    assert scored and (again, missing) == (0, 0) and found >= scored


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
    assert worker.returncode in (-signal.SIGTERM, 0), said
    assert not list((tmp_path / "store").glob("*/piece-*"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "are stored" in done.stdout, done.stdout + done.stderr
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0


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


def _some_pairs(rng: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P,) keys, prompts, tokens."""
    prompts = rng.integers(0, pairs // 3, pairs)
    keys = keys_array([pair_key([int(prompt)], [place]) for place, prompt in enumerate(prompts)])
    return keys, prompts, rng.integers(1, 60, pairs)


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
                file.write_text(json.dumps({"token": "another", "seconds": 0.1}))
                self._done = True
                while any(thread.name == "lease" for thread in threading.enumerate()):
                    time.sleep(0.01)  # until the holder has looked: then it renews nothing any more
            return forward(**batch)

        return stealing


def _robbed(config: Config) -> tuple[int, list[str]]:
    said: list[str] = []
    before = Console.warn
    Console.warn = lambda self, text: said.append(text)
    try:
        outcome = work(config, Working(piece_tokens=PIECE, lease_seconds=0.2), engine=with_forward(Stolen(config).wrap))
    finally:
        Console.warn = before
    return outcome.scored_once, [text for text in said if "lease" in text]


def test_a_worker_that_has_lost_its_piece_gives_it_up_and_says_so(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2)
    scored, said = run_ranks(_robbed, 1, config)[0]
    assert len(said) == 1 and "another worker may have its piece" in said[0]
    assert run_ranks(scored_and_found, 1, config)[0][0] == 0 and scored


@pytest.mark.parametrize("most", (1, 40, 200, 10_000))
def test_pieces_are_the_same_in_whatever_order_the_rows_come(most):
    rng = np.random.default_rng(0)
    keys, prompts, tokens = _some_pairs(rng, 90)
    pieces = cut_pieces(keys, prompts, tokens, most=most)
    order = rng.permutation(90)
    other = cut_pieces(keys[order], rng.permutation(90)[prompts][order], tokens[order], most=most)
    assert pieces.names == other.names and len(set(pieces.names)) == len(pieces)
    for number in range(len(pieces)):
        assert set(keys[pieces[number]].tolist()) == set(keys[order][other[number]].tolist())
    assert sorted(pieces.places.tolist()) == list(range(90))
    assert (pieces.of_pair[pieces.places] == np.repeat(np.arange(len(pieces)), np.diff(pieces.starts))).all()


def test_a_prompt_is_cut_only_where_it_is_wider_than_a_piece():
    keys, prompts, tokens = _some_pairs(np.random.default_rng(1), 300)
    pieces = cut_pieces(keys, prompts, tokens, most=400)
    for prompt in np.unique(prompts):
        width = int(tokens[prompts == prompt].sum())
        assert len(set(pieces.of_pair[prompts == prompt].tolist())) <= 1 + (width - 1) // 400
    sizes = [int(tokens[pieces[number]].sum()) for number in range(len(pieces))]
    assert max(sizes) < 2 * 400 + 60 and len(sizes) > 10


def test_other_pairs_are_another_piece():
    keys, prompts, tokens = _some_pairs(np.random.default_rng(2), 30)
    names = cut_pieces(keys, prompts, tokens, most=10_000).names
    assert names != cut_pieces(keys[1:], prompts[1:], tokens[1:], most=10_000).names


def test_a_tally_knows_what_has_come():
    keys, _, _ = _some_pairs(np.random.default_rng(3), 40)
    tally = Tally(keys[:30])
    nothing = np.zeros(20)
    shard = merge([Pairs(high=keys["high"][20:], low=keys["low"][20:], logps=nothing, tokens=nothing)])
    tally.add([shard])
    assert tally.found.tolist() == [False] * 20 + [True] * 10


def test_the_first_workers_terms_are_everyones(tmp_path):
    folder = LocalStorage(tmp_path)
    own = Terms(device="a", torch="1", piece_tokens=100)
    assert join(folder, own, any_device=False) == own
    assert join(folder, replace(own, piece_tokens=7), any_device=False) == own
    assert join(folder, replace(own, torch="2"), any_device=True) == own
    with pytest.raises(UserError, match="torch is 1 there and 2 here"):
        join(folder, replace(own, torch="2"), any_device=False)
    folder.write(TERMS, b"{")
    with pytest.raises(UserError, match="damaged.*remove it"):
        join(folder, own, any_device=False)

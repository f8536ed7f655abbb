"""Workers and passes without leases on one store: each says what it sees of the other, and what they leave is whole."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from reference_runs import fixed, logps_of_pairs, pieces_of, score, scored_and_found, work
from tiny_runs import tiny_config

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.reference.worker import TERMS, Working
from kto_dist.store.tools import verify
from kto_dist.training.config import Config

PIECE = 300
"""Tokens, of about ten pairs."""


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


def _after_a_pass(config: Config) -> tuple[str, list[str]]:
    """What a worker on another device than an earlier pass is told, and a pass on another device than workers."""
    score(config)
    (terms,) = Path(config.reference.store).glob(f"*/{TERMS}")
    terms.write_text(json.dumps({**json.loads(terms.read_text()), "torch": "another"}))
    for shard in terms.parent.glob("*.parquet"):
        shard.unlink()
    refused, said, console = "", [], Console()
    try:
        work(config, Working())
    except UserError as error:
        refused = str(error)
    console.warn = said.append
    score(config, console)
    return refused, [text for text in said if "round otherwise" in text]


def test_a_pass_without_leases_says_what_it_computes_on_and_what_others_did(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    refused, said = run_ranks(_after_a_pass, 1, config)[0]
    assert "torch is another there and" in refused and "--any-device" in refused
    assert len(said) == 1 and "torch is another there and" in said[0]


def _works(config: Config) -> int:
    return work(config, Working(piece_tokens=PIECE)).scored_once


def test_a_pass_of_several_ranks_and_a_worker_fill_one_store_at_once(tmp_path, tiny_model, tiny_log):
    plain = tiny_config(tmp_path, tiny_model, tiny_log, reference__store=str(tmp_path / "plain"))
    expected = run_ranks(logps_of_pairs, 1, plain)[0]
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    with ThreadPoolExecutor(2) as pool:
        worker = pool.submit(run_ranks, _works, 1, config)
        ranks = pool.submit(run_ranks, scored_and_found, 2, config)
        scored, passed = worker.result()[0], ranks.result()
    pairs = sum(run_ranks(pieces_of, 1, config, PIECE)[0])
    (verdict,) = verify(config.reference.store)
    assert verdict.good and verdict.pairs == pairs <= scored + passed[0][0]
    assert verdict.difference < 1e-3 and not list(Path(config.reference.store).glob("*/piece-*"))
    assert run_ranks(logps_of_pairs, 1, config)[0] == pytest.approx(expected, rel=1e-5)


def _alone(config: Config, one_worker: bool) -> list[list[tuple[bytes, float]]]:
    """The shards: keys and log-probs of each."""
    if one_worker:
        work(config, Working(piece_tokens=10**9), shard=fixed(20))
    else:
        score(config, shard=fixed(20))
    tables = (pq.read_table(file).to_pydict() for file in Path(config.reference.store).glob("*/*.parquet"))
    return sorted(list(zip(table["key"], table["logp"], strict=True)) for table in tables)


def test_a_pass_without_workers_stores_to_the_last_bit_what_one_worker_with_one_piece_does(
    tmp_path, tiny_model, tiny_log
):
    shards = []
    for one_worker in (False, True):
        store = str(tmp_path / f"store-{one_worker}")
        options = {"data__heldout": 0.3, "reference__store": store, "reference__share_prefixes": False}
        config = tiny_config(tmp_path, tiny_model, tiny_log, **options)
        shards.append(run_ranks(_alone, 1, config, one_worker)[0])
    assert shards[0] == shards[1] and len(shards[0]) > 4

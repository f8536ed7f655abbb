"""What workers share without a word: the pieces that each cuts alike, and the terms that the first one notes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_key import keys_array, pair_key

from kto_dist.base.errors import UserError
from kto_dist.data.batch import Cutting
from kto_dist.model.devices import named_device
from kto_dist.reference.pieces import Tally, cut_pieces
from kto_dist.reference.scoring import PassSettings
from kto_dist.reference.worker import TERMS, Terms, join, note, own_terms, tokens_a_piece
from kto_dist.store.shards import Pairs, merge
from kto_dist.store.storage import LocalStorage


def _some_pairs(rng: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P,) keys, prompts, tokens."""
    prompts = rng.integers(0, pairs // 3, pairs)
    keys = keys_array([pair_key([int(prompt)], [place]) for place, prompt in enumerate(prompts)])
    return keys, prompts, rng.integers(1, 60, pairs)


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
    tally.add(shard)
    assert tally.found.tolist() == [False] * 20 + [True] * 10


def _settings(batch: int) -> PassSettings:
    """With micro-batches of so many tokens."""
    cutting = Cutting(max_length=64, prompt_limit=32, tokens=batch, packed=False)
    return PassSettings(cutting=cutting, logits_bytes=None, logits_dtype=None, t0=1.0, device=torch.device("cpu"))


@pytest.mark.parametrize(("tokens", "piece"), [(1000, 32 * 64), (2000 * 32 * 64 + 1, 32 * 64 + 1), (10**9, 500_000)])
def test_a_log_is_cut_into_pieces_of_32_micro_batches_and_no_more_than_2000(tokens, piece):
    own = own_terms(_settings(64))
    assert tokens_a_piece(own, tokens) == piece
    assert own_terms(_settings(64), 7).piece_tokens == 7


def test_a_long_log_is_cut_into_few_pieces_whoever_wrote_the_terms(tmp_path):
    """A pass without leases knows of no log, and another worker of a short one."""
    folder = LocalStorage(tmp_path)
    note(folder, own_terms(_settings(64)), print)
    terms = join(folder, own_terms(_settings(64)), any_device=False)
    assert 10**9 // tokens_a_piece(terms, 10**9) <= 2000


def test_a_processor_without_its_matrix_units_rounds_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True})
    with_both = named_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": True})
    assert with_both != named_device(torch.device("cpu"))


def test_another_processor_rounds_otherwise_whatever_its_units(monkeypatch):
    real, named = Path.read_text, set()
    for name in ("Xeon A", "Xeon B"):
        told = f"processor: 0\nmodel name\t: {name}\nflags: fpu\n"
        monkeypatch.setattr(Path, "read_text", lambda path, told=told: told if path.name == "cpuinfo" else real(path))
        named.add(named_device(torch.device("cpu")))
    assert len(named) == 2 and all("Xeon" in name for name in named)


def test_the_first_workers_terms_are_everyones(tmp_path):
    folder = LocalStorage(tmp_path)
    own = Terms(device="a", torch="1", piece_tokens=100)
    assert join(folder, own, any_device=False) == own
    assert join(folder, replace(own, piece_tokens=7), any_device=False) == own
    assert join(folder, replace(own, torch="2"), any_device=True) == own
    with pytest.raises(UserError, match="torch is 1 there and 2 here"):
        join(folder, replace(own, torch="2"), any_device=False)
    for any_device in (False, True):
        with pytest.raises(UserError, match=r"cuts the pairs of .* into other pieces \(1 there and 2 here\)"):
            join(folder, replace(own, cut=2), any_device=any_device)
    # those of an earlier version say less, those of a later one more
    folder.write(TERMS, b'{"device": "a", "torch": "1", "piece_tokens": 100, "more": 1}')
    assert join(folder, own, any_device=False) == own
    folder.write(TERMS, b"{")
    with pytest.raises(UserError, match="damaged.*remove it"):
        join(folder, own, any_device=False)

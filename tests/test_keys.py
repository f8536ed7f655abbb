"""A pair's key comes from its tokens and where the prompt ends, whoever computes it and however rows are stored."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_key import keys_array, pair_key
from ranks import run_ranks

from kto_dist.data.batch import pair_lengths, pair_tokens
from kto_dist.data.examples import ClassReport, DataReport, Examples
from kto_dist.reference import keys
from kto_dist.reference.keys import pair_keys

MAX_LENGTH, PROMPT_LIMIT = 9, 4


def make(rows: list[tuple[list[int], list[int]]], chunk: int = 1000) -> Examples:
    def column(side: int) -> pa.ChunkedArray:
        lists = [row[side] for row in rows]
        parts = [pa.array(lists[i : i + chunk], pa.list_(pa.int32())) for i in range(0, len(lists), chunk)]
        return pa.chunked_array(parts, pa.list_(pa.int32()))

    none = ClassReport(kept=0, prompts_cut=0, completions_cut=0, dropped=0, prompt_tokens=0, completion_tokens=0)
    report = DataReport(
        rows_read=len(rows),
        skipped={},
        skipped_examples=[],
        shortened_headers=0,
        duplicates=0,
        contradictions=0,
        desirable=none,
        undesirable=none,
        prompt_lengths={},
        completion_lengths={},
        unused={},
        notes={},
        first={},
        sources=[],
    )
    count = len(rows)
    table = pa.table(
        {
            "prompt_ids": column(0),
            "completion_ids": column(1),
            "desirable": pa.array([True] * count),
            "weight": pa.array([1.0] * count),
            "prompt_group": pa.array(range(count), pa.int64()),
        }
    )
    return Examples(table, fingerprint="f", report=report)


def keys_of(examples: Examples, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
    kept = pair_lengths(examples, prompts, completions, MAX_LENGTH, PROMPT_LIMIT)
    return pair_keys(examples, prompts, completions, *kept).keys


tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=MAX_LENGTH - 1)
some_rows = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=some_rows, chunk=st.integers(1, 5), seed=st.integers(0, 99), at_once=st.sampled_from((1, 7, keys.AT_ONCE)))
def test_keys_of_many_pairs_are_the_keys_of_each(rows, chunk, seed, at_once):
    examples = make(rows, chunk)
    prompts, completions = np.random.default_rng(seed).integers(len(rows), size=(2, 30))
    kept = pair_lengths(examples, prompts, completions, MAX_LENGTH, PROMPT_LIMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "AT_ONCE", at_once)
        found = pair_keys(examples, prompts, completions, *kept)
    expected = []
    for j, k, p, c in zip(prompts, completions, *kept, strict=True):
        expected.append(pair_key(*pair_tokens(examples, j, k, p, c)))
    assert found.keys.tobytes() == b"".join(expected)
    asked = found.prompts[np.arange(30)]
    for a in range(30):
        same = [
            examples.prompt(prompts[i])[-kept[0][i] :].tolist() == examples.prompt(prompts[a])[-kept[0][a] :].tolist()
            for i in range(30)
        ]
        assert (asked == found.prompts[np.array([a])]).tolist() == same


def _keys_with_other_ranks(rows: list[tuple[list[int], list[int]]]) -> bytes:
    every = np.arange(len(rows))
    return keys_of(make(rows), every, every[::-1].copy()).tobytes()


def test_every_world_size_has_the_same_keys():
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(99, size=p).tolist(), rng.integers(99, size=c).tolist()) for p, c in rng.integers(1, 9, (7, 2))
    ]
    assert len({found for world in (1, 2) for found in run_ranks(_keys_with_other_ranks, world, rows)}) == 1


def test_the_boundary_between_prompt_and_completion_is_part_of_the_key():
    ids = np.array([1, 2, 3, 4])
    assert pair_key(ids[:1], ids[1:]) != pair_key(ids[:2], ids[2:])


def test_a_pair_the_other_way_round_has_another_key():
    ids = np.array([5, 6])
    assert pair_key(ids[:1], ids[1:]) != pair_key(ids[1:], ids[:1])


@pytest.mark.parametrize("share", (0, 1))
def test_keys_of_pairs_that_share_a_side_differ(share):
    sides = [[np.array([i]), np.array([i])] for i in range(50)]
    for side in sides:
        side[share] = np.array([7, 7])
    assert len(set(keys_array([pair_key(*side) for side in sides]).tolist())) == 50

"""The largest micro-batch: no step of any choice of rows has a fuller one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_dist.data.batch import Cutting, cut
from kto_dist.training.largest import fullest

TOKENS = 60
SIZES = st.lists(st.integers(1, TOKENS), min_size=1, max_size=12)


def cutting(*, packed: bool, multiple: int = 1) -> Cutting:
    return Cutting(max_length=TOKENS, prompt_limit=TOKENS, tokens=TOKENS, packed=packed, multiple=multiple)


@given(sizes=SIZES, data=st.data(), ranks=st.integers(1, 3), multiple=st.integers(1, 20))
def test_no_padded_micro_batch_of_a_step_is_fuller(sizes, data, ranks, multiple):
    lengths, most = np.array(sizes), data.draw(st.integers(1, len(sizes)))

    def positions(rows: np.ndarray) -> int:
        return -(-int(rows.max(initial=0)) // multiple) * multiple * rows.size

    step = lengths[data.draw(st.permutations(range(len(sizes))))[:most]]
    chosen = fullest(lengths[:, None], cutting(packed=False, multiple=multiple), most=most)
    shares = cut(step, tokens=TOKENS, ranks=ranks, packed=False, multiple=multiple)
    fullest_of_step = max(positions(step[places]) for share in shares for places in share)
    # the widest, rounded up, may be more than a micro-batch has, alone in one
    assert min(fullest_of_step, TOKENS) <= positions(lengths[chosen])
    assert len(chosen) == 1 or positions(lengths[chosen]) <= TOKENS
    assert len(chosen) <= most


@given(sizes=SIZES, ranks=st.integers(1, 3), multiple=st.integers(1, 20))
def test_padded_rows_count_as_wide_as_they_are_run_but_for_one_that_would_not_fit_alone(sizes, ranks, multiple):
    lengths = np.array(sizes)
    shares = cut(lengths, tokens=TOKENS, ranks=ranks, packed=False, multiple=multiple)
    assert sorted(int(p) for rank in shares for share in rank for p in share) == list(range(lengths.size))
    for rank in shares:
        for share in rank:
            width = -(-int(lengths[share].max(initial=0)) // multiple) * multiple
            assert share.size <= 1 or width * share.size <= TOKENS


@given(sizes=SIZES, data=st.data())
def test_a_packed_one_holds_the_longest_and_leaves_room_for_none_that_it_may_have(sizes, data):
    lengths, most = np.array(sizes), data.draw(st.integers(1, len(sizes)))
    chosen = fullest(lengths[:, None], cutting(packed=True), most=most)
    total = lengths[chosen].sum()
    assert total <= TOKENS and lengths.max() in lengths[chosen] and len(set(chosen.tolist())) == len(chosen) <= most
    left = np.delete(lengths, chosen)
    assert len(chosen) == most or not left.size or total + left.min() > TOKENS


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_has_no_largest_micro_batch(packed):
    assert not fullest(np.zeros((0, 1), np.int64), cutting(packed=packed), most=4).size

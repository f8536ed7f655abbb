"""Steps and micro-batches of pairs: none is ever parted, and each is used once an epoch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kto_dist.data.batch import Plan, cut, step_rows


@given(
    pairs=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=20),
    tokens=st.integers(40, 100),
    ranks=st.integers(1, 3),
    packed=st.booleans(),
)
def test_a_pair_is_never_parted_and_fits_with_the_padding_that_it_needs(pairs, tokens, ranks, packed):
    lengths = np.array(pairs, dtype=np.int64).ravel()
    shares = cut(lengths, tokens=tokens, ranks=ranks, packed=packed, unit=2)
    assert len({len(own) for own in shares}) == 1
    places = [place for own in shares for share in own for place in share.tolist()]
    assert sorted(places) == list(range(len(lengths)))
    for share in (share for own in shares for share in own):
        assert [(int(place), int(place) + 1) for place in share[0::2]] == list(
            zip(share[0::2], share[1::2], strict=True)
        )
        assert all(place % 2 == 0 for place in share[0::2])
        own = lengths[share]
        assert (own.sum() if packed else own.max(initial=0) * own.size) <= tokens


def test_an_epoch_of_pairs_takes_each_pair_once_and_whole_ones_a_step():
    units = np.arange(38).reshape(-1, 2)[::-1]
    plan = Plan(
        seed=0,
        rows=50,
        global_batch=8,
        epochs=1.0,
        max_steps=None,
        kl_pairs_per_step=0,
        max_length=64,
        prompt_limit=32,
        units=units,
    )
    assert plan.steps_per_epoch == 5  # four of 4 pairs, and one of the 3 that are left
    steps = [step_rows(plan, step) for step in range(5)]
    assert [rows.size for rows in steps] == [8, 8, 8, 8, 6]
    taken = [tuple(pair) for rows in steps for pair in rows.reshape(-1, 2).tolist()]
    assert sorted(taken) == sorted(map(tuple, units.tolist()))

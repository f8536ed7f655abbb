"""Where rows are cut into chunks, and what lengths are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kto_kernels import sequence_lengths
from kto_kernels.chunks import cut, even_rows, evenly
from torch import Tensor


@given(lengths=st.lists(st.integers(0, 12), max_size=12), rows=st.integers(1, 15), unit=st.sampled_from((1, 2, 3)))
def test_chunks_cover_every_row_once_and_cut_only_units_that_do_not_fit(lengths, rows, unit):
    lengths = lengths[: len(lengths) // unit * unit]
    chunks = list(cut(lengths, rows, unit))
    edges = [chunk.start for chunk in chunks] + [sum(lengths)]
    assert all(chunk.stop == after for chunk, after in zip(chunks, edges[1:], strict=True))
    assert all(chunk.stop - chunk.start <= rows for chunk in chunks)
    assert [s for chunk in chunks if chunk.complete for s in range(chunk.first, chunk.last)] == list(
        range(len(lengths))
    )
    for chunk in chunks:
        assert chunk.first % unit == 0
        if chunk.piece:
            assert chunk.last == chunk.first + unit and sum(lengths[chunk.first : chunk.last]) > rows
        else:
            assert chunk.complete and sum(lengths[chunk.first : chunk.last]) == chunk.stop - chunk.start


@given(
    total=st.integers(0, 40_000),
    most=st.integers(1, 20_000),
    width=st.integers(1, 9000),
    processors=st.integers(1, 200),
)
def test_a_gpus_chunks_stay_within_the_budget_and_take_no_more_waves_than_full_ones(total, most, width, processors):
    def waves(rows):  # of tiles of 128 x 256
        return -(-(-(-rows // 128) * -(-width // 256)) // processors)

    def cost(rows):
        return -(-total // rows) * waves(rows)

    rows = even_rows(total, most, width, processors)
    assert 1 <= rows <= most
    fewest = -(-total // most)
    # a chunk costs something beside its waves: a tenth of one
    assert not total or cost(-(-total // -(-total // rows))) <= cost(-(-total // fewest)) + 0.1 * fewest
    assert even_rows(16384, 6000, 1024, 132) == 4224


@given(start=st.integers(0, 50), count=st.integers(0, 400), multiple=st.integers(1, 9), times=st.integers(1, 9))
def test_parts_of_a_chunk_are_as_few_as_can_be_and_all_but_the_last_are_multiples(start, count, multiple, times):
    most = multiple * times
    parts = list(evenly(start, start + count, most, multiple))
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(start, start + count))
    sizes = [end - begin for begin, end in parts]
    assert len(sizes) <= -(-count // most) and max(sizes, default=0) <= most
    assert multiple == 1 or all(size % multiple == 0 for size in sizes[:-1])


@given(lengths=st.lists(st.integers(0, 4), max_size=6))
def test_sequence_ids_become_lengths(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    assert sequence_lengths(ids, len(lengths)).tolist() == lengths


@pytest.mark.parametrize(("ids", "message"), [([1, 0], "must not decrease"), ([0, 3], "0 to 1"), ([-1, 0], "0 to 1")])
def test_sequence_ids_that_name_no_order_or_no_sequence_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        sequence_lengths(Tensor(ids).long(), 2)

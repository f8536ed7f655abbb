"""Steps, KL pairs, micro-batches: functions of their arguments alone, that use every row once and no row wrongly."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_dist.data.batch import (
    Cutting,
    Plan,
    collate,
    cut,
    kl_pairs,
    microbatches,
    pair_lengths,
    step_kl_pairs,
    step_rows,
)
from kto_dist.data.examples import Examples


def plan_of(rows=80, global_batch=16, seed=0, **changes):
    base = Plan(
        seed=seed,
        rows=rows,
        global_batch=global_batch,
        epochs=1.0,
        max_steps=None,
        kl_pairs_per_step=None,
        max_length=64,
        prompt_limit=32,
    )
    return replace(base, **changes)


def examples_of(lengths, groups=None):
    """Rows of the given (prompt, completion) lengths; token ids that no other row has."""
    ids = iter(range(1, 10**6))
    prompts, completions = [], []
    for prompt, completion in lengths:
        prompts.append([next(ids) for _ in range(prompt)])
        completions.append([next(ids) for _ in range(completion)])
    tokens = pa.list_(pa.int32())
    table = pa.table(
        {
            "prompt_ids": pa.array(prompts, tokens),
            "completion_ids": pa.array(completions, tokens),
            "desirable": pa.array([True] * len(lengths)),
            "weight": pa.array([1.0] * len(lengths)),
            "prompt_group": pa.array(range(len(lengths)) if groups is None else groups, pa.int64()),
            "prompt": pa.array([""] * len(lengths)),
            "completion": pa.array([""] * len(lengths)),
        }
    )
    return Examples(table, fingerprint="", report=None)


def epoch_rows(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [step_rows(plan, step).tolist() for step in steps]


plans = st.builds(plan_of, rows=st.integers(2, 90), global_batch=st.integers(1, 40), seed=st.integers(0, 2**31))


@given(plan=plans, epoch=st.integers(0, 3))
def test_every_row_appears_once_an_epoch(plan, epoch):
    assert sorted(row for rows in epoch_rows(plan, epoch) for row in rows) == list(range(plan.rows))


@given(plan=plans)
def test_all_steps_of_an_epoch_but_the_last_are_full(plan):
    assert all(len(rows) == plan.global_batch for rows in epoch_rows(plan, 0)[:-1])


@given(plan=plans)
def test_the_last_step_takes_what_is_left_and_a_single_row_joins_the_step_before(plan):
    full, rest = divmod(plan.rows, plan.global_batch)
    last = len(epoch_rows(plan, 0)[-1])
    if not full:
        assert last == plan.rows
    elif rest == 1:
        assert last == plan.global_batch + 1
    else:
        assert last == (rest or plan.global_batch)


def test_each_epoch_is_another_shuffle():
    plan = plan_of()
    assert epoch_rows(plan, 0) != epoch_rows(plan, 1)


def test_each_seed_is_another_shuffle():
    assert epoch_rows(plan_of(seed=0), 0) != epoch_rows(plan_of(seed=1), 0)


def test_a_steps_rows_depend_on_nothing_but_seed_epoch_and_step():
    plan = plan_of()
    other = replace(plan, epochs=7.0, max_steps=3, kl_pairs_per_step=2, max_length=9, prompt_limit=3)
    backwards = [step_rows(other, step).tolist() for step in reversed(range(10))][::-1]
    assert backwards == [step_rows(plan, step).tolist() for step in range(10)]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 5),
        ({"epochs": 2.0}, 10),
        ({"epochs": 0.5}, 2),
        ({"epochs": 0.01}, 1),
        ({"max_steps": 3}, 3),
        ({"rows": 81}, 5),
        ({"rows": 82}, 6),
    ],
)
def test_the_number_of_steps_follows_from_rows_epochs_and_max_steps(changes, steps):
    assert replace(plan_of(rows=80, global_batch=16), **changes).steps == steps


groups = st.lists(st.integers(0, 6), min_size=1, max_size=24).map(np.array)
seeds = st.tuples(st.integers(0, 2**31), st.just(1), st.integers(0, 5), st.integers(0, 99))


def pairs(seed, group, limit=None, rows=None):
    rows = np.arange(group.size) if rows is None else rows
    prompts, completions = kl_pairs(seed, rows, group, limit)
    return list(zip(prompts.tolist(), completions.tolist(), strict=True))


@given(seed=seeds, group=groups)
def test_no_prompt_meets_a_completion_of_its_own(seed, group):
    assert all(group[prompt] != group[completion] for prompt, completion in pairs(seed, group))


@given(seed=seeds, group=groups)
def test_prompts_and_completions_are_used_at_most_once(seed, group):
    found = pairs(seed, group)
    assert len({prompt for prompt, _ in found}) == len({completion for _, completion in found}) == len(found)


@given(seed=seeds, group=groups)
def test_as_many_rows_have_a_partner_as_can(seed, group):
    largest = max(Counter(group.tolist()).values())
    assert len(pairs(seed, group)) == min(group.size, 2 * (group.size - largest))


def test_rows_of_one_prompt_alone_have_no_partner():
    assert pairs((0,), np.full(7, 3)) == []


@given(seed=seeds, group=groups, limit=st.integers(1, 30))
def test_a_limit_takes_some_of_the_pairs_and_changes_none(seed, group, limit):
    everything = pairs(seed, group)
    limited = pairs(seed, group, limit)
    assert len(limited) == min(limit, len(everything)) and set(limited) <= set(everything)


@given(seed=seeds, group=groups)
def test_pairs_are_made_of_the_given_rows(seed, group):
    rows = 1000 + 7 * np.arange(group.size)
    assert pairs(seed, group, rows=rows) == [(1000 + 7 * j, 1000 + 7 * k) for j, k in pairs(seed, group)]


@given(seed=seeds, group=groups)
def test_the_same_seed_gives_the_same_pairs(seed, group):
    assert pairs(seed, group) == pairs(seed, group)


def test_another_seed_gives_other_pairs():
    assert len({tuple(pairs((seed,), np.arange(20))) for seed in range(50)}) == 50


def assert_even(counts, times, chance):
    """Every count lies within 4 standard deviations of what chance gives."""
    counts = np.array(counts)
    assert (np.abs(counts - times * chance) < 4 * np.sqrt(times * chance * (1 - chance))).all(), counts


@pytest.mark.parametrize("group", ([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]), ids=("alone", "in_groups"))
def test_every_row_of_another_prompt_is_an_equally_likely_partner(group):
    times, group = 4000, np.array(group)
    count = Counter(pair for seed in range(times) for pair in pairs((seed,), group))
    others = [(j, k) for j in range(6) for k in range(6) if group[j] != group[k]]
    assert set(count) == set(others)
    assert_even([count[pair] for pair in others], times, 6 / len(others))


@pytest.mark.parametrize("group", ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]), ids=("alone", "in_groups"))
def test_a_limited_choice_prefers_no_row(group):
    times = 3000
    count = Counter(prompt for seed in range(times) for prompt, _ in pairs((seed,), np.array(group), 2))
    assert_even([count[row] for row in range(6)], times, 2 / 6)


def test_a_steps_pairs_are_of_its_rows_and_differ_from_step_to_step():
    plan, group = plan_of(rows=16, global_batch=16), np.arange(16)
    seen = set()
    for step in range(6):  # an epoch each
        rows = np.sort(step_rows(plan, step))
        prompts, completions = step_kl_pairs(plan, step, rows, group)
        assert sorted(prompts.tolist()) == sorted(completions.tolist()) == rows.tolist()
        seen.add(tuple(completions[np.argsort(prompts)].tolist()))
    assert len(seen) == 6


def test_a_plan_without_kl_has_no_pairs():
    plan = plan_of(kl_pairs_per_step=0)
    prompts, completions = step_kl_pairs(plan, 0, step_rows(plan, 0), np.arange(80))
    assert prompts.size == completions.size == 0


TOKENS = 40
lengths_of_rows = st.lists(st.integers(1, TOKENS), max_size=40).map(lambda values: np.array(values, dtype=np.int64))
cuts = {"lengths": lengths_of_rows, "ranks": st.integers(1, 5), "packed": st.booleans()}


def cut_all(lengths, ranks, packed):
    return cut(lengths, tokens=TOKENS, ranks=ranks, packed=packed)


@given(**cuts)
def test_every_pair_is_in_one_micro_batch_of_one_rank(lengths, ranks, packed):
    places = [int(p) for rank in cut_all(lengths, ranks, packed) for share in rank for p in share]
    assert sorted(places) == list(range(lengths.size))


@given(**cuts, apart=st.integers(0, TOKENS))
def test_long_rows_that_stand_apart_share_no_micro_batch_with_others(lengths, ranks, packed, apart):
    shares = cut(lengths, tokens=TOKENS, ranks=ranks, packed=packed, apart=apart)
    assert sorted(int(p) for rank in shares for share in rank for p in share) == list(range(lengths.size))
    assert len({len(rank) for rank in shares}) == 1
    for rank in shares:
        for share in rank:
            assert len(set((lengths[share] > apart).tolist())) <= 1


@given(**cuts)
def test_no_micro_batch_exceeds_its_tokens_padding_included(lengths, ranks, packed):
    for rank in cut_all(lengths, ranks, packed):
        for share in rank:
            kept = lengths[share]
            assert (kept.sum() if packed else kept.max(initial=0) * kept.size) <= TOKENS


@given(**cuts)
def test_all_ranks_have_equally_many_micro_batches_and_at_least_one(lengths, ranks, packed):
    shares = cut_all(lengths, ranks, packed)
    assert len(shares) == ranks
    assert len({len(rank) for rank in shares}) == 1 and len(shares[0]) >= 1


@given(lengths=lengths_of_rows, ranks=st.integers(1, 5))
def test_packed_ranks_differ_by_one_row_at_most(lengths, ranks):
    tokens = [sum(int(lengths[share].sum()) for share in rank) for rank in cut_all(lengths, ranks, True)]
    assert max(tokens) - min(tokens) <= lengths.max(initial=0)


@given(lengths=lengths_of_rows, ranks=st.integers(1, 5))
def test_packed_micro_batches_of_one_turn_differ_by_one_row_at_most(lengths, ranks):
    for turn in zip(*cut_all(lengths, ranks, True), strict=True):
        tokens = [int(lengths[share].sum()) for share in turn]
        assert max(tokens) - min(tokens) <= lengths.max(initial=0)


@given(**cuts)
def test_micro_batches_of_like_cost_meet_at_the_same_turn(lengths, ranks, packed):
    """So that no rank waits long for another: a turn's cheapest is no cheaper than the next turn's costliest."""

    def cost(share):
        return lengths[share].sum() if packed else lengths[share].max(initial=0) * share.size

    turns = [[cost(share) for share in turn] for turn in zip(*cut_all(lengths, ranks, packed), strict=True)]
    assert all(min(turn) >= max(after) for turn, after in pairwise(turns))


@given(count=st.integers(1, 60), length=st.integers(1, TOKENS), ranks=st.integers(1, 4), packed=st.booleans())
def test_equal_rows_need_as_few_micro_batches_as_can_be(count, length, ranks, packed):
    needed = -(-count // (TOKENS // length))
    found = cut_all(np.full(count, length), ranks, packed)
    assert len(found[0]) == -(-needed // ranks)


def test_padded_rows_share_a_micro_batch_with_their_like():
    # sorted by length, a micro-batch of 40 holds four of 10 or twenty of 2; mixed they would need padding
    lengths = np.array([10, 2] * 4)
    shares = cut(lengths, tokens=40, ranks=1, packed=False)[0]
    assert sorted(tuple(lengths[share]) for share in shares) == [(2, 2, 2, 2), (10, 10, 10, 10)]


@pytest.mark.parametrize("packed", (False, True))
def test_no_pairs_give_every_rank_one_empty_micro_batch(packed):
    shares = cut_all(np.zeros(0, np.int64), 3, packed)
    assert [[share.size for share in rank] for rank in shares] == [[0], [0], [0]]


@pytest.mark.parametrize("packed", (False, True))
def test_a_row_longer_than_a_micro_batch_raises_with_both_numbers(packed):
    with pytest.raises(ValueError, match="41.*40"):
        cut_all(np.array([3, TOKENS + 1]), 1, packed)


sequences_of_ids = st.lists(
    st.tuples(
        st.lists(st.integers(1, 99), min_size=1, max_size=6), st.lists(st.integers(1, 99), min_size=1, max_size=6)
    ).map(lambda pair: (np.array(pair[0], dtype=np.int32), np.array(pair[1], dtype=np.int32))),
    min_size=1,
    max_size=6,
)


def collated(sequences, packed):
    return collate(sequences, np.arange(len(sequences)) + 100, packed=packed)


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_targets_are_the_completions_one_after_the_other(sequences, packed):
    batch = collated(sequences, packed)
    parts = batch.target.split(batch.lengths.tolist())
    assert [part.tolist() for part in parts] == [completion.tolist() for _, completion in sequences]


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_each_gathered_position_comes_right_before_its_target(sequences, packed):
    batch = collated(sequences, packed)
    assert batch.input_ids.reshape(-1)[batch.gather + 1].tolist() == batch.target.tolist()


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_a_gathered_position_knows_the_prompt_and_the_completion_so_far(sequences, packed):
    batch = collated(sequences, packed)
    ids, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    place = 0
    for prompt, completion in sequences:
        for seen in range(len(completion)):
            row = int(batch.gather[place])
            start = row - int(positions[row])
            assert ids[start : row + 1].tolist() == [*prompt.tolist(), *completion[:seen].tolist()]
            place += 1


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_positions_restart_with_every_sequence(sequences, packed):
    batch = collated(sequences, packed)
    counts = [len(prompt) + len(completion) for prompt, completion in sequences]
    if packed:
        assert batch.position_ids[0].tolist() == [place for count in counts for place in range(count)]
    else:
        assert [row[:count].tolist() for row, count in zip(batch.position_ids, counts, strict=True)] == [
            list(range(count)) for count in counts
        ]


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_there_is_a_mask_only_where_there_is_padding_and_it_hides_that_alone(sequences, packed):
    batch = collated(sequences, packed)
    counts = [len(prompt) + len(completion) for prompt, completion in sequences]
    if packed or len(set(counts)) == 1:
        assert batch.attention_mask is None
    else:
        widest = max(counts)
        assert batch.attention_mask.tolist() == [[1] * count + [0] * (widest - count) for count in counts]


@given(sequences=sequences_of_ids)
def test_a_packed_micro_batch_is_one_row_without_padding(sequences):
    batch = collated(sequences, True)
    assert batch.input_ids.shape == (1, batch.tokens)


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_tokens_count_everything_but_padding(sequences, packed):
    assert collated(sequences, packed).tokens == sum(len(p) + len(c) for p, c in sequences)


@pytest.mark.parametrize("packed", (False, True))
def test_an_empty_micro_batch_is_a_few_positions_and_no_completion(packed):
    batch = collate([], np.zeros(0, np.int64), packed=packed)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 8)
    assert batch.attention_mask is None and batch.tokens == 0
    assert batch.gather.numel() == batch.target.numel() == batch.lengths.numel() == batch.position.numel() == 0


@given(sequences=sequences_of_ids, packed=st.booleans())
def test_all_indices_are_int64(sequences, packed):
    batch = collated(sequences, packed)
    names = ("input_ids", "position_ids", "gather", "target", "lengths", "position")
    assert {getattr(batch, name).dtype for name in names} == {torch.int64}


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=20),
    ranks=st.integers(1, 3),
    packed=st.booleans(),
)
def test_the_ranks_micro_batches_hold_every_pair_under_its_place(lengths, ranks, packed):
    examples = examples_of(lengths)
    prompts = np.arange(len(lengths))
    completions = np.roll(prompts, 1)
    found = {}
    for rank in range(ranks):
        for batch in microbatches(
            examples,
            prompts,
            completions,
            Cutting(max_length=18, prompt_limit=9, tokens=30, packed=packed),
            rank=rank,
            ranks=ranks,
        ):
            for place, target in zip(batch.position.tolist(), batch.target.split(batch.lengths.tolist()), strict=True):
                assert place not in found
                found[place] = target.tolist()
    assert found == {place: examples.completion(int(row)).tolist() for place, row in enumerate(completions)}


def test_a_kl_pair_that_is_too_long_loses_the_prompts_start_and_then_the_completions_end():
    # rows fit alone (12 tokens at most); prompt 0 with completion 1 makes 8 + 10
    examples = examples_of([(8, 2), (2, 10), (3, 9)])
    (batch,) = microbatches(
        examples,
        np.array([0]),
        np.array([1]),
        Cutting(max_length=12, prompt_limit=5, tokens=12, packed=True),
        rank=0,
        ranks=1,
    )
    kept = [*examples.prompt(0)[-5:].tolist(), *examples.completion(1)[:7].tolist()]
    assert batch.input_ids[0].tolist() == kept and batch.lengths.tolist() == [7]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=2, max_size=2),
    max_length=st.integers(2, 40),
    data=st.data(),
)
def test_a_pair_keeps_a_prompt_token_and_a_completion_token_and_fits(lengths, max_length, data):
    limit = data.draw(st.integers(1, max_length - 1))
    prompt, completion = pair_lengths(examples_of(lengths), np.array([0]), np.array([1]), max_length, limit)
    assert prompt[0] >= 1 and completion[0] >= 1 and prompt[0] + completion[0] <= max_length

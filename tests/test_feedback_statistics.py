"""The audit's statistics: against their definitions, examples from the literature, and draws whose truth is known."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kto_dist.base.class_weights import class_weights
from kto_dist.feedback import agreement
from kto_dist.feedback.concentration import gini, heavy_downvoters, lorenz, top_shares
from kto_dist.feedback.content import auc
from kto_dist.feedback.drift import chi_square, drift_of


def units(votes: list[list[int]]) -> np.ndarray:
    """(M, 3) from each response's votes (1 up, 0 down)."""
    return np.array([(len(entry), sum(entry), 1) for entry in votes], dtype=np.int64)


def alpha_by_definition(votes: list[list[int]]) -> float:
    """1 - observed / expected disagreement, over pairs of votes (Krippendorff 2004, section 11.3)."""
    everything = list(itertools.chain.from_iterable(votes))
    observed = sum(
        sum(a != b for a, b in itertools.permutations(entry, 2)) / (len(entry) - 1) for entry in votes
    ) / len(everything)
    pairs = list(itertools.permutations(everything, 2))
    return 1 - observed / (sum(a != b for a, b in pairs) / len(pairs))


def test_alpha_is_that_of_krippendorffs_worked_example():
    # Computing Krippendorff's Alpha-Reliability (2011), part A: two observers, ten units, alpha = 0.095
    meg, owen = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    alpha, disagreement, _ = agreement.agreement_of(units([list(pair) for pair in zip(meg, owen, strict=True)]))
    assert alpha == pytest.approx(1 - 19 * 4 / (14 * 6))
    assert round(alpha, 3) == 0.095
    assert disagreement == pytest.approx(0.4)


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=6), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_alpha_is_its_definition_over_pairs_of_votes(votes):
    alpha, _, _ = agreement.agreement_of(units(votes))
    if len(set(itertools.chain.from_iterable(votes))) < 2:
        assert alpha is None
    else:
        assert alpha == pytest.approx(alpha_by_definition(votes))


def test_a_group_of_like_responses_counts_as_so_many():
    votes = [[1, 0]] * 3 + [[1, 1, 1]] * 4 + [[0, 0]] * 2
    assert agreement.agreement_of(np.array([(2, 1, 3), (3, 3, 4), (2, 0, 2)])) == agreement.agreement_of(units(votes))


def judged(rng: np.random.Generator, responses: int, noise: float, up: float = 0.7) -> np.ndarray:
    votes = rng.integers(2, 6, responses)
    wrong = rng.binomial(votes, noise)
    good = rng.random(responses) < up
    return np.stack([votes, np.where(good, votes - wrong, wrong), np.ones(responses, int)], 1)


def test_noise_is_recovered_and_its_interval_covers_the_truth():
    covered = []
    for seed in range(60):
        drawn = judged(np.random.default_rng(seed), 400, 0.12)
        _, _, noise = agreement.agreement_of(drawn)
        low, high = agreement.intervals(drawn, 400)[1]
        assert abs(noise - 0.12) < 0.05
        covered.append(low <= 0.12 <= high)
    # of 95 % intervals, 60 draws cover at least 51 with a chance of 0.9995
    assert sum(covered) >= 51


def test_the_interval_redraws_responses_and_narrows_with_their_number():
    rng = np.random.default_rng(0)
    drawn = judged(rng, 300, 0.1)
    by_hand = []
    for _ in range(400):
        by_hand.append(agreement.agreement_of(drawn[rng.integers(0, len(drawn), len(drawn))])[0])
    low, high = agreement.intervals(drawn, 2000)[0]
    assert (low, high) == pytest.approx(tuple(np.quantile(by_hand, (0.025, 0.975))), abs=0.02)
    wide, narrow = (np.diff(agreement.intervals(judged(rng, count, 0.1), 500)[0])[0] for count in (100, 10_000))
    assert narrow < wide / 5


def test_the_intervals_memory_is_bounded_however_many_votes_answers_have():
    rng = np.random.default_rng(3)
    votes = rng.integers(2, 5000, 12_000)
    drawn = np.stack([votes, rng.binomial(votes, rng.beta(2, 1, len(votes))), rng.integers(1, 4, len(votes))], 1)
    tracemalloc.start()
    try:
        alpha, noise = agreement.intervals(drawn, 1000)
        # all draws at once are 96 MB, and as much again as floats
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    # blocks draw what one draw would
    total = drawn[:, 2].sum()
    counts = np.random.default_rng(0).multinomial(total, drawn[:, 2] / total, size=1000).astype(float)
    pairs = counts @ (drawn[:, 1] * (votes - drawn[:, 1]) / (votes - 1))
    ballots, ups = counts @ votes, counts @ drawn[:, 1]
    whole = 1 - (ballots - 1) * pairs / (ups * (ballots - ups))
    assert alpha == pytest.approx(tuple(np.quantile(whole, (0.025, 0.975))), rel=1e-9)
    assert noise[0] < noise[1]


def test_wrong_labels_after_a_majority_are_what_the_votes_let_expect():
    rng = np.random.default_rng(1)
    count, noise = 20_000, 0.2
    good = rng.random(count) < 0.7
    votes = rng.integers(3, 6, count)
    wrong = rng.binomial(votes, noise)
    up = np.where(good, votes - wrong, wrong)
    decided = 2 * up != votes
    label = 2 * up > votes
    rows = np.stack([up, votes - up, label, np.ones(count)], 1)[decided]
    tallies = np.stack([up, votes - up, np.ones(count)], 1)
    expected = agreement.wrong_labels(rows, noise, agreement.share_of_good(tallies, noise))
    assert expected == pytest.approx(np.mean(label[decided] != good[decided]), abs=0.01)
    assert expected < noise / 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_wrong_labels_of_a_balanced_choice_are_those_that_the_whole_log_lets_expect(share):
    rng = np.random.default_rng(2)
    count, noise = 60_000, 0.1
    good = rng.random(count) < share
    votes = rng.choice([1, 1, 3], count)
    up = np.where(good, votes - (wrong := rng.binomial(votes, noise)), wrong)
    label = 2 * up > votes
    rarer = min(label.sum(), (~label).sum())
    chosen = np.concatenate([np.flatnonzero(label)[:rarer], np.flatnonzero(~label)[:rarer]])
    prior = agreement.share_of_good(np.stack([up, votes - up, np.ones(count)], 1), noise)
    assert prior == pytest.approx(share, abs=0.01)
    rows = np.stack([up, votes - up, label, np.ones(count)], 1)[chosen]
    truth = np.mean(label[chosen] != good[chosen])
    assert agreement.wrong_labels(rows, noise, prior) == pytest.approx(truth, abs=0.01)


def test_the_share_of_good_answers_stays_within_bounds_where_votes_say_nothing_or_everything():
    assert agreement.share_of_good(np.array([(3, 1, 5), (0, 2, 9)]), 0.5) == 0.5
    assert agreement.share_of_good(np.array([(2, 0, 7)]), 0.0) == pytest.approx(1, abs=2e-6)
    assert agreement.share_of_good(np.array([(0, 1, 7)]), 0.0) == pytest.approx(0, abs=2e-6)
    assert agreement.share_of_good(np.array([(1, 0, 3), (0, 1, 1)]), 0.0) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 5, 5, 5], 0.0),
        ([0, 0, 0, 10], 0.75),  # 1 - 1/n where one has everything
        ([1, 2, 3, 4], 0.25),
        ([0, 0], 0.0),
    ],
)
def test_gini_by_hand(values, expected):
    assert gini(np.array(values), np.ones(len(values), int)) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_gini_is_half_the_mean_difference_over_the_mean_however_users_are_grouped(groups):
    values, users = (np.array(column) for column in zip(*groups, strict=True))
    apart = np.repeat(values, users)
    if apart.sum():
        expected = np.abs(apart[:, None] - apart[None, :]).mean() / (2 * apart.mean())
        assert gini(values, users) == pytest.approx(expected, abs=1e-12)


def test_the_curve_and_the_top_users_tell_the_same_story():
    values, users = np.array([1, 9]), np.array([90, 10])
    curve = lorenz(values, users)
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    assert curve.y[90] == pytest.approx(0.5)  # 90 users with one vote each, 10 with nine
    shares = top_shares(values, users)
    assert shares["10%"] == pytest.approx(0.5) and shares["1"] == pytest.approx(9 / 180)


def drawn_users(seed: int, critics: int, users: int = 80, spread: tuple[int, int] = (14, 20)):
    rng = np.random.default_rng(seed)
    votes = np.maximum(1, rng.pareto(1.2, users) * 15).astype(int)
    rates = rng.beta(*spread, users)
    votes[:critics], rates[:critics] = rng.integers(60, 200, critics), 0.95
    return votes, rng.binomial(votes, rates)


def test_users_who_dislike_nearly_everything_are_named_and_honest_ones_are_not():
    found = wrong = 0
    for seed in range(30):
        votes, down = drawn_users(seed, critics=5)
        flags = heavy_downvoters(votes, down, np.ones(80, int), min_votes=10, level=0.01).flags
        found += flags[:5].sum()
        wrong += flags[5:].sum()
    assert found >= 145  # of 150
    assert wrong <= 6  # 30 * 5 named: the level allows 1.5 on average


def test_a_fifth_of_the_users_cannot_hide_behind_one_another():
    votes, down = drawn_users(0, critics=12)
    named = heavy_downvoters(votes, down, np.ones(80, int), min_votes=10, level=0.01)
    assert named.flags[:12].sum() >= 11 and named.flags[12:].sum() <= 1
    # what is usual is what the others do: 14 of 34
    assert named.rate == pytest.approx(14 / 34, abs=0.06)


def test_tastes_that_differ_honestly_get_nobody_named():
    # between users from 20 % to 80 % down: one rate for all would call many of them odd
    named = [
        heavy_downvoters(*drawn_users(seed, critics=0, spread=(3, 3)), np.ones(80, int), min_votes=10, level=0.01)
        for seed in range(30)
    ]
    assert sum(entry.flags.any() for entry in named) <= 2
    votes, down = drawn_users(0, critics=0, spread=(3, 3))
    binomial = stats.binom.sf(down - 1, votes, down.sum() / votes.sum())
    assert (stats.false_discovery_control(binomial) < 0.01).any()


def test_few_users_are_not_judged():
    votes, down = np.array([100] * 9), np.array([10] * 8 + [99])
    named = heavy_downvoters(votes, down, np.ones(9, int), min_votes=10, level=0.01)
    assert not named.flags.any() and named.spread is None
    named = heavy_downvoters(np.append(votes, 100), np.append(down, 10), np.ones(10, int), min_votes=10, level=0.01)
    assert named.flags.sum() == 1 and named.flags[8]


def test_the_recommended_weights_bring_the_ratio_into_the_papers_range():
    for up, down in ((100, 900), (500, 500), (600, 500), (900, 100)):
        down_weight, up_weight = class_weights(up, down)
        ratio = up_weight * up / (down_weight * down)
        assert 1 - 1e-12 <= ratio <= 1.5 + 1e-12 and min(up_weight, down_weight) == 1
    assert class_weights(100, 900) == (1.0, 9.0)


def test_the_drift_test_is_the_textbooks_chi_square():
    # 2 x 2 table with n = 100: n (ad - bc)^2 over the product of the margins
    result = chi_square([("a", 30, 20), ("b", 15, 35)], 0.001)
    assert result.statistic == pytest.approx(100 * (30 * 35 - 20 * 15) ** 2 / (50 * 50 * 45 * 55))
    assert result.degrees == 1 and result.cramers_v == pytest.approx((result.statistic / 100) ** 0.5)
    assert result.largest_gap == pytest.approx(0.3)
    # of two groups, either one against the rest is the whole table
    assert result.largest_gap_p == pytest.approx(2 * result.p_value)


def test_a_steady_ratio_is_no_drift_and_a_step_is():
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(200):
        up = rng.binomial(300, 0.6, size=8)
        small += (
            chi_square([(str(week), int(count), int(300 - count)) for week, count in enumerate(up)], 0.001).p_value
            < 0.05
        )
    assert 1 <= small <= 22  # 10 expected
    moved = [("early", 180, 120)] * 4 + [("late", 120, 180)] * 4
    assert chi_square(moved, 0.001).p_value < 1e-12


def test_the_gap_that_is_named_is_no_chance_of_a_small_group():
    # a version with 3,000 votes moved by ten points; one with 24 votes is thirty off, and may be so by chance
    moved = [("v1", 1800, 1200), ("v2", 2100, 900), ("v3", 2095, 905), ("rare", 9, 15)]
    result = chi_square(moved, 0.001)
    assert result.p_value < 1e-12
    assert result.largest_gap_in == "v1" and result.largest_gap_p < 1e-12
    assert abs(result.largest_gap) < 0.12
    # where no group differs by more than chance, the largest gap comes with the p-value that says so
    steady = chi_square([("v1", 600, 400), ("v2", 610, 390), ("rare", 9, 15)], 0.001)
    assert steady.largest_gap_in == "rare" and steady.largest_gap_p > 0.01


def test_weeks_begin_on_mondays_and_small_groups_are_left_out_of_the_test():
    from datetime import date, timedelta

    monday = date(2026, 1, 5)
    days = [(monday + timedelta(days=day), 30, 20) for day in range(14)] + [(monday + timedelta(days=14), 1, 0)]
    drift = drift_of([*days, (None, 7, 3)], [(None, 1, 1)], significance=0.001)
    assert drift.weeks.groups == 2 and drift.weeks.left_out == 1
    assert drift.without_time == 10 and drift.without_model == 2 and drift.by_model is None
    assert (drift.unit, drift.periods[0].name, len(drift.periods)) == ("day", "2026-01-05", 15)
    long = drift_of([(monday + timedelta(days=7 * week + 3), 30, 20) for week in range(8)], [], significance=0.001)
    assert long.unit == "week" and [period.name for period in long.periods][:2] == ["2026-01-05", "2026-01-12"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_the_length_figure_is_mann_whitneys(counts):
    up, down = (np.array(column) for column in zip(*counts, strict=True))
    if up.sum() and down.sum():
        places = np.arange(len(counts))
        expected = stats.mannwhitneyu(np.repeat(places, up), np.repeat(places, down)).statistic
        assert auc(up, down) == pytest.approx(expected / (up.sum() * down.sum()))
    else:
        assert auc(up, down) is None

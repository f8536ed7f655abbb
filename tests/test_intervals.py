"""Intervals hold the true value as often as they say, and know that rows of one prompt are alike."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from kto_dist.evaluation.intervals import FEW, Area, Difference, Mean, intervals, wilson


def mean(values, share=False, counted=None):
    values = np.asarray(values, float)
    return Mean(values=values, counted=np.ones(values.size, bool) if counted is None else counted, share=share)


def area(score, desirable):
    return Area(score=score, desirable=desirable, counted=np.ones(score.size, bool))


def thumbs(rng, prompts, rows_a_prompt, tilt=1.0):
    """Scores and labels of rows, some of what decides both shared by the rows of a prompt; and the prompts."""
    prompt = np.repeat(np.arange(prompts), rows_a_prompt)
    common = rng.normal(size=prompts)[prompt]
    desirable = rng.random(prompt.size) < 0.4 + 0.2 * (common > 0)
    score = 0.7 * common + rng.normal(size=prompt.size) + tilt * desirable
    return score, desirable, prompt


def test_the_area_of_a_sample_is_that_of_its_rows_repeated():
    rng = np.random.default_rng(0)
    score, desirable, _ = thumbs(rng, 30, 2)
    score = score.round(1)  # ties
    times = rng.integers(0, 4, (5, score.size))
    expected = [roc_auc_score(np.repeat(desirable, t), np.repeat(score, t)) for t in times]
    np.testing.assert_allclose(area(score, desirable).of(times.astype(float)), expected, rtol=1e-12)


def test_bca_is_scipys():
    values = np.random.default_rng(1).exponential(size=40)
    found = intervals({"mean": mean(values)}, np.arange(40), resamples=40_000)["mean"]
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=40_000, rng=np.random.default_rng(2))
    assert found.method == "bca"
    edges = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((edges.low, edges.high), abs=0.03)


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_rows_of_one_prompt_count_as_alike():
    """Four copies of each row say no more than one."""
    verdicts = np.random.default_rng(3).random(400) < 0.7
    once = intervals({"share": mean(verdicts, share=True)}, np.arange(400))["share"]
    copied = mean(np.repeat(verdicts, 4), share=True)
    prompts = np.repeat(np.arange(400), 4)
    assert intervals({"share": copied}, prompts)["share"].low == pytest.approx(once.low, abs=0.01)
    apart = intervals({"share": copied}, np.arange(1600))["share"]
    assert apart.high - apart.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize(
    ("prompts", "share", "method"),
    [(FEW, True, "bootstrap"), (FEW - 1, True, "wilson"), (FEW - 1, False, "bca"), (FEW, False, "bootstrap")],
)
def test_few_prompts_have_another_interval_and_it_is_said(prompts, share, method):
    values = np.random.default_rng(4).random(prompts) < 0.6
    assert intervals({"figure": mean(values, share)}, np.arange(prompts))["figure"].method == method


def test_what_never_failed_may_fail_yet():
    always = intervals({"share": mean(np.ones(100), share=True)}, np.arange(100))["share"]
    assert always.method == "wilson" and always.high == 1.0 and 0.95 < always.low < 0.97
    parted = area(np.arange(80.0), np.arange(80) >= 40)
    assert intervals({"auc": parted}, np.arange(80))["auc"].low < 0.95


@pytest.mark.parametrize("prompts", (20, 80))
def test_a_difference_without_spread_says_so_and_not_that_it_is_sure(prompts):
    score = np.random.default_rng(9).normal(size=prompts)
    first, second = mean(score + 0.1), mean(score)
    found = intervals({"apart": Difference(first=first, second=second)}, np.arange(prompts))["apart"]
    assert found.method == "constant" and found.low == found.value == found.high == pytest.approx(0.1)


def test_two_models_with_the_same_verdicts_may_differ_on_rows_to_come():
    verdicts = mean(np.random.default_rng(10).random(80) < 0.7, share=True)
    found = intervals({"apart": Difference(first=verdicts, second=verdicts)}, np.arange(80))["apart"]
    assert found.method == "wilson" and found.value == 0 and found.high == -found.low == wilson(0.0, 80)[1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_lies_within_its_interval_to_the_last_bit(share):
    for rows in range(1, 200):
        low, high = wilson(share, rows)
        assert low <= share <= high, rows


def test_wilson_of_few_prompts_counts_prompts_where_their_rows_agree():
    verdicts = np.random.default_rng(5).random(30) < 0.6
    found = intervals({"share": mean(np.repeat(verdicts, 5), share=True)}, np.repeat(np.arange(30), 5))["share"]
    assert (found.low, found.high) == pytest.approx(wilson(verdicts.mean(), 30), abs=0.01)


def test_one_prompt_has_no_interval_and_a_class_that_is_absent_no_figure():
    assert intervals({"mean": mean(np.arange(5.0))}, np.zeros(5)) == {}
    nobody = mean(np.arange(60.0), counted=np.zeros(60, bool))
    everybody = area(np.arange(60.0), np.ones(60, bool))
    assert intervals({"mean": nobody, "auc": everybody}, np.arange(60)) == {}


def test_a_figure_rests_on_the_prompts_of_its_own_rows():
    counted = np.arange(200) < 10
    found = intervals({"mean": mean(np.random.default_rng(6).random(200), counted=counted)}, np.arange(200))["mean"]
    assert (found.prompts, found.method) == (10, "bca")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting(Mean):
    """Notes how many samples it is asked for."""

    asked: list[int] = field(default_factory=list)

    def of(self, times: np.ndarray) -> np.ndarray:
        self.asked.append(len(times))
        # not `super()`, which slots take away
        return Mean.of(self, times)


def test_a_figure_of_few_prompts_among_many_leaves_out_its_own_alone():
    """As a small slice of a large set of rows: a look at every prompt of the set would take its square."""
    values, counted = np.random.default_rng(11).exponential(size=5000), np.arange(5000) < 30
    figure = Counting(values=values, counted=counted)
    found = intervals({"mean": figure}, np.arange(5000), resamples=300)["mean"]
    assert found.method == "bca" and sum(figure.asked) == 1 + 300 + 30
    alone = intervals({"mean": mean(values[:30])}, np.arange(30), resamples=20_000)["mean"]
    among = intervals({"mean": mean(values, counted=counted)}, np.arange(5000), resamples=20_000)["mean"]
    assert (among.low, among.high) == pytest.approx((alone.low, alone.high), abs=0.06)


def test_the_same_rows_give_the_same_interval():
    figures = {"mean": mean(np.random.default_rng(7).random(100))}
    assert intervals(figures, np.arange(100)) == intervals(figures, np.arange(100))


def test_a_paired_difference_is_surer_than_two_figures():
    """What is hard for one model is hard for the other, and that falls out of the difference."""
    rng = np.random.default_rng(8)
    hard = rng.normal(size=300)
    first, second = mean(hard + 0.1 * rng.normal(size=300) + 0.05), mean(hard + 0.1 * rng.normal(size=300))
    found = intervals(
        {"first": first, "second": second, "paired": Difference(first=first, second=second)}, np.arange(300)
    )
    assert found["paired"].low > 0
    assert found["first"].low < found["second"].value < found["first"].high


def coverage(simulations, prompts, rows_a_prompt, resamples, seed=0):
    """The share of simulations whose intervals hold the true value: of a share, an AUC, and a paired difference."""
    rng = np.random.default_rng(seed)
    score, desirable, _ = thumbs(rng, 100_000, rows_a_prompt)
    true = {
        "share": (score > 0.5).mean(),
        "auc": roc_auc_score(desirable, score),
        "better": 0.2,
    }
    hits = dict.fromkeys(true, 0)
    for number in range(simulations):
        score, desirable, prompt = thumbs(rng, prompts, rows_a_prompt)
        other = score - 0.2 + 0.5 * rng.normal(size=score.size)
        figures = {
            "share": mean(score > 0.5, share=True),
            "auc": area(score, desirable),
            "better": Difference(first=mean(score), second=mean(other)),
        }
        found = intervals(figures, prompt, seed=number, resamples=resamples)
        for name, value in true.items():
            hits[name] += found[name].low <= value <= found[name].high
    return {name: count / simulations for name, count in hits.items()}


def test_intervals_cover_about_as_often_as_they_say():
    # by chance alone a coverage of 0.95 shows as 0.91 or less in one of 500 tries
    found = coverage(simulations=200, prompts=200, rows_a_prompt=2, resamples=300)
    assert all(0.90 < share < 0.99 for share in found.values()), found


@pytest.mark.soak
@pytest.mark.parametrize(("prompts", "rows_a_prompt"), [(200, 1), (200, 3), (600, 2)])
def test_intervals_cover_93_to_97_percent_of_2000_simulations(prompts, rows_a_prompt):
    found = coverage(simulations=2000, prompts=prompts, rows_a_prompt=rows_a_prompt, resamples=1000)
    print(found)
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


@pytest.mark.soak
def test_intervals_of_few_prompts_cover_91_percent_at_least():
    found = coverage(simulations=2000, prompts=30, rows_a_prompt=2, resamples=1000)
    print(found)
    assert all(0.91 <= share <= 0.99 for share in found.values()), found

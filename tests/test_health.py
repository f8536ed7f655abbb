"""Each rule acts once, after `patience` steps beyond its limit, and says what to try."""

import math

import pytest

from kto_dist.training.config import HealthConfig
from kto_dist.training.health import CLAMPED_STEPS, Monitor
from kto_dist.training.trends import STRETCH

FINE = {"kl_raw": 1.0, "kl_clamped": 0.0}
RUNAWAY = {**FINE, "kl_raw": 300.0}
DEAD = {**FINE, "grad_norm": 0.0, "saturated/all": 1.0, "rewards/all": -4000.0}
CLAMPED = {**FINE, "kl_raw": -1.0, "kl_clamped": 1.0}


def acted(steps, **limits):
    """The steps (from 1) at which something was said."""
    monitor = Monitor(HealthConfig(**limits))
    return [step for step, metrics in enumerate(steps, 1) if monitor.check(step, metrics)]


def advice(metrics, repeat=1, **limits):
    monitor = Monitor(HealthConfig(**limits))
    return [monitor.check(step, metrics) for step in range(1, repeat + 1)][-1]


def test_a_healthy_run_hears_nothing():
    assert acted([FINE] * 200) == []


@pytest.mark.parametrize("kl", (300.0, -300.0))
def test_a_runaway_kl_acts_once_after_patience_in_either_direction(kl):
    assert acted([{**FINE, "kl_raw": kl}] * 10, max_kl=200, patience=3) == [3]


def test_a_step_within_the_limit_starts_the_count_again():
    assert acted([RUNAWAY, RUNAWAY, FINE, RUNAWAY, RUNAWAY, RUNAWAY], patience=3) == [6]


def test_a_rule_acts_again_after_it_was_over():
    assert acted([RUNAWAY, FINE, RUNAWAY], patience=1) == [1, 3]


def test_exactly_at_the_limit_is_within_it():
    assert acted([{**FINE, "kl_raw": 200.0}] * 5, max_kl=200.0, patience=1) == []


@pytest.mark.parametrize(("on_trouble", "stop"), [("stop", True), ("warn", False)])
def test_on_trouble_decides_whether_a_runaway_stops_the_run(on_trouble, stop):
    (item,) = advice(RUNAWAY, patience=1, on_trouble=on_trouble)
    assert item.stop is stop


def test_no_limit_means_no_rule():
    assert acted([RUNAWAY] * 10, max_kl=None) == []


def test_z0_stuck_at_zero_warns_once_and_never_stops():
    assert acted([CLAMPED] * (2 * CLAMPED_STEPS)) == [CLAMPED_STEPS]
    (item,) = advice(CLAMPED, repeat=CLAMPED_STEPS)
    assert item.stop is False


def test_one_positive_kl_starts_the_count_of_clamped_steps_again():
    assert acted([CLAMPED] * (CLAMPED_STEPS - 1) + [FINE] + [CLAMPED] * (CLAMPED_STEPS - 1)) == []


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("on_trouble", ("stop", "warn"))
def test_a_figure_that_is_not_finite_stops_at_once_whatever_is_set(value, on_trouble):
    (item,) = advice({**FINE, "grad_norm": value}, on_trouble=on_trouble, patience=99)
    assert item.stop and "grad_norm" in item.message


@pytest.mark.parametrize(("on_trouble", "stop"), [("stop", True), ("warn", False)])
def test_a_model_without_any_gradient_is_dead_and_not_exported(on_trouble, stop):
    assert acted([DEAD] * 10, patience=3) == [3]
    (item,) = advice(DEAD, repeat=3, on_trouble=on_trouble)
    assert item.stop is stop and "no longer learns" in item.message and "train.lr" in item.message


@pytest.mark.parametrize("alive", ({"grad_norm": 1e-9}, {"saturated/all": 0.99}))
def test_saturated_rows_or_a_gradient_of_nothing_alone_are_no_death(alive):
    assert acted([{**DEAD, **alive}] * 10) == []


def test_rules_count_apart_from_each_other():
    steps = [{**DEAD, **CLAMPED}] * CLAMPED_STEPS
    assert acted(steps, patience=2, on_trouble="warn") == [2, CLAMPED_STEPS]


def test_one_cause_is_told_once():
    """A policy that has run away downwards has z0 at 0 as well."""
    steps = [{**RUNAWAY, "kl_raw": -300.0, "kl_clamped": 1.0}] * CLAMPED_STEPS
    assert acted(steps, patience=2, on_trouble="warn") == [2]


def test_what_only_warns_warns_once_in_a_run_and_what_stops_stops_again():
    coming_and_going = [RUNAWAY, FINE] * 5
    assert acted(coming_and_going, patience=1, on_trouble="warn") == [1]
    assert acted(coming_and_going, patience=1) == [1, 3, 5, 7, 9]


def test_a_run_that_goes_on_is_not_told_again():
    monitor = Monitor(HealthConfig(patience=1, on_trouble="warn"), said={"max_kl"})
    assert monitor.check(7, RUNAWAY) == []


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ((40.0, 50.0, 70.0, 64.0), "60% longer than before training (64 tokens, 40 before)"),
        ((40.0, 15.0, 10.0), "75% shorter than before training (10 tokens, 40 before)"),
    ],
)
def test_sampled_answers_whose_length_drifts_are_told_once(lengths, words):
    monitor = Monitor(HealthConfig())
    told = [monitor.answered(10 * count, lengths[:count]) for count in range(1, len(lengths) + 1)]
    assert [len(each) for each in told] == [0] * (len(lengths) - 1) + [1]
    assert words in told[-1][0].message and not told[-1][0].stop
    assert monitor.answered(99, lengths) == []


@pytest.mark.parametrize("lengths", [(40.0, 90.0, 45.0, 90.0), (40.0, 58.0, 59.0), (40.0, 90.0), (0.0, 5.0, 9.0)])
def test_one_odd_draw_or_a_little_more_is_no_drift(lengths):
    monitor = Monitor(HealthConfig())
    assert not any(monitor.answered(count, lengths[:count]) for count in range(1, len(lengths) + 1))


CALM, HIGH = {**FINE, "grad_norm": 2.0}, {**FINE, "grad_norm": 100.0}


@pytest.mark.parametrize(("on_trouble", "stop"), [("stop", True), ("warn", False)])
def test_a_gradient_that_stays_far_beyond_its_median_stops_the_run(on_trouble, stop):
    steps = [CALM] * STRETCH + [HIGH] * 9
    assert acted(steps, patience=3, on_trouble=on_trouble) == [STRETCH + 3]
    monitor = Monitor(HealthConfig(on_trouble=on_trouble))
    ((item,),) = [found for number, step in enumerate(steps, 1) if (found := monitor.check(number, step))]
    assert (item.rule, item.stop) == ("spikes", stop) and "100" in item.message and "train.clip" in item.message


def test_a_model_that_has_learnt_most_rows_may_meet_one_that_it_has_not():
    learnt = [{**FINE, "grad_norm": 0.01}] * 400
    assert acted([CALM] * STRETCH + learnt + [CALM] * 9 + learnt) == []


def test_a_gradient_is_judged_by_the_steps_that_there_were():
    assert acted([CALM] * (STRETCH - 1) + [HIGH] * 3) == []
    # a run that was stopped for it and goes on has a few steps to come down
    monitor = Monitor(HealthConfig(patience=3), past=[CALM] * STRETCH + [HIGH] * 3)
    assert [bool(monitor.check(step, HIGH)) for step in (1, 2, 3)] == [False, False, True]


def test_a_loss_without_z0_has_no_kl_to_watch():
    assert acted([{"loss": 0.5}] * 90) == []


@pytest.mark.parametrize(
    ("metrics", "repeat", "parts"),
    [
        (RUNAWAY, 3, ("step 3", "300.0", "200.0", "health.max_kl", "train.lr")),
        (CLAMPED, CLAMPED_STEPS, (f"step {CLAMPED_STEPS}", "kl_raw", "apo_zero_unpaired")),
        ({"loss": math.nan}, 1, ("step 1", "loss", "train.lr")),
    ],
    ids=("runaway", "clamped", "not_finite"),
)
def test_advice_gives_the_step_the_value_the_rule_and_a_remedy(metrics, repeat, parts):
    (item,) = advice(metrics, repeat=repeat, max_kl=200.0, patience=3)
    assert all(part in item.message for part in parts), item.message

"""What a curve shows; tests/test_report.py has the pictures."""

import math

import pytest
from matplotlib.figure import Figure

from kto_dist.record.plots import PLOTS, curve, running_mean
from kto_dist.record.theme import LIGHT


def test_a_class_absent_from_a_step_leaves_a_gap_not_a_zero() -> None:
    records = [
        {"step": 1, "a": 0.5},
        {"step": 2},
        {"step": 3, "a": math.inf},
        {"step": 4, "a": None},
        {"step": 5, "a": 0},
    ]
    assert curve(records, "a") == ([1, 5], [0.5, 0.0])


def test_many_points_are_drawn_faint_under_their_running_mean_and_few_with_markers() -> None:
    (throughput,) = (plot for plot in PLOTS if plot.name == "throughput")

    def lines(count: int) -> list:
        figure = Figure()
        assert throughput.draw(figure, [{"step": i, "tokens_per_second": i % 2} for i in range(count)], [], LIGHT)
        return figure.axes[0].get_lines()

    (few,) = lines(10)
    assert few.get_marker() == "o" and list(few.get_ydata()) == [0, 1] * 5
    raw, mean = lines(200)
    assert raw.get_alpha() < 0.5 and set(raw.get_ydata()) == {0, 1}
    assert all(0.3 < value < 0.7 for value in mean.get_ydata()) and mean.get_marker() == ""


def test_the_running_mean_is_the_mean_of_the_window_around_each_value() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert running_mean([], 5) == []

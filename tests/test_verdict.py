"""The sentence at the head of a report: better, worse, or not sure, and what to watch."""

from typing import Any

import pytest

from kto_dist.record.verdict import FIRST, ordered, verdict

BEFORE = {"accuracy/all": 0.5, "auc": 0.5}


def after(low: float = 0.77, high: float = 0.86, prompts: int = 200, **changes: Any) -> dict[str, Any]:
    """`changes`: figures, with `__` for a slash; a tuple is (value, low, high)."""
    line: dict[str, Any] = {"accuracy/all": 0.82, "auc": (low + high) / 2}
    sure = {"accuracy/all": (0.77, 0.86), "auc": (low, high)}
    for name, value in changes.items():
        key = name.replace("__", "/")
        line[key] = value[0] if isinstance(value, tuple) else value
        if isinstance(value, tuple):
            sure[key] = value[1:]
    line["intervals"] = {
        name: {"value": line[name], "low": ends[0], "high": ends[1], "method": "bootstrap", "prompts": prompts}
        for name, ends in sure.items()
    }
    return line


def test_accuracy_goes_from_to_with_its_interval():
    found = verdict(BEFORE, after())
    assert found.tone == "good" and not found.watch
    assert "accuracy on held-out thumbs 0.50 → 0.82 (0.77 to 0.86), AUC 0.50 → 0.81" in found.sentence


def test_a_range_of_width_0_is_not_taken_for_certainty():
    line = after(0.9, 0.9)
    line["intervals"]["auc"]["method"] = "constant"
    found = verdict(BEFORE, line)
    assert found.tone == "unclear" and "AUC 0.50 → 0.90 (no spread)" in found.sentence


@pytest.mark.parametrize(
    ("low", "high", "tone", "words"),
    [(0.51, 0.6, "good", "Better"), (0.45, 0.6, "unclear", "Not surely"), (0.3, 0.49, "bad", "Worse")],
)
def test_only_what_chance_does_not_explain_is_better_or_worse(low, high, tone, words):
    found = verdict(BEFORE, after(low, high))
    assert (found.tone, found.sentence.startswith(words)) == (tone, True)


def test_the_bar_is_where_the_model_began():
    assert verdict({"accuracy/all": 0.8, "auc": 0.9}, after(0.77, 0.86)).tone == "bad"


def test_without_intervals_nothing_is_sure():
    assert verdict(BEFORE, {"accuracy/all": 0.9, "auc": 0.95}).tone == "unclear"


@pytest.mark.parametrize("line", (None, {}, {"loss": 0.4}))
def test_without_held_out_rows_nothing_is_claimed(line):
    assert verdict(None, line).sentence.startswith("No held-out rows")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy__desirable": (0.3, 0.2, 0.4)}, "liked answers are told worse than by chance (0.30)"),
        ({"accuracy__undesirable": (0.3, 0.2, 0.4)}, "disliked answers are told worse than by chance (0.30)"),
        ({"rewards__desirable": (-2.0, -3.0, -1.0)}, "liked answers became less likely as well (reward -2.00)"),
        ({"kl_raw": -80.0}, "far from the reference (kl_raw -80 nats)"),
        ({"saturated__all": 0.7}, "70% of the held-out rows are saturated"),
        ({"prompts": 31}, "only 31 held-out prompts"),
    ],
)
def test_each_worry_is_named(changes, words):
    assert verdict(BEFORE, after(**changes)).watch == (words,)


@pytest.mark.parametrize(
    "changes", ({"accuracy__desirable": (0.45, 0.3, 0.6)}, {"rewards__desirable": (-0.1, -0.3, 0.2)}, {"kl_raw": 20.0})
)
def test_what_chance_explains_is_no_worry(changes):
    assert not verdict(BEFORE, after(**changes)).watch


def test_rows_learnt_by_heart_are_named():
    steps = [{"step": step, "accuracy/all": 0.99} for step in range(1, 20)]
    assert verdict(BEFORE, after(), steps).watch == ("learnt by heart: accuracy 0.99 on training rows",)
    assert not verdict(BEFORE, after(), [{"step": 1, "accuracy/all": 0.9}]).watch


def test_figures_that_matter_come_first():
    assert ordered(["rows/all", "loss", "auc"]) == ["auc", "loss", "rows/all"] and "auc" in FIRST

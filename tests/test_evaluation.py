"""Figures of held-out rows: those of scikit-learn, the same as in training, sliced and compared row by row."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from kto_dist.evaluation.figures import Evaluated, compare, figures_of, findings, reliability
from kto_dist.evaluation.slices import LARGEST, OTHERS, by_length, by_value
from kto_dist.objective import metrics


def evaluated(rows=300, prompts=120, seed=0, tilt=6.0, beta=0.1, pairs=True, desirable=None):
    """Rows whose log-ratios are higher by `tilt` where they are desirable."""
    draw = torch.Generator().manual_seed(seed)
    sign = torch.where(torch.rand(rows, generator=draw) < 0.6, 1.0, -1.0).double()
    if desirable is not None:
        sign = torch.full_like(sign, 1.0 if desirable else -1.0)
    ref_logps = -50 * torch.rand(rows, generator=draw).double()
    ratio = 8 * torch.randn(rows, generator=draw).double() + tilt * sign
    kl = 3 + torch.randn(rows if pairs else 0, generator=draw).double()
    z0 = kl.mean() if pairs else torch.tensor(0.0)
    table = metrics.row_table(
        losses=torch.sigmoid(-beta * sign * (ratio - z0)),
        weight=1 + (sign > 0).double(),
        logps=ref_logps + ratio,
        ref_logps=ref_logps,
        sign=sign,
        z0=z0,
        beta=beta,
        tokens=torch.arange(rows),
    )
    return Evaluated(
        table=table,
        sign=sign,
        prompts=np.arange(rows) % prompts,
        kl=kl,
        kl_rows=np.arange(rows if pairs else 0),
        beta=beta,
    )


def test_auc_and_brier_score_are_scikit_learns():
    rows = evaluated()
    found = figures_of(rows)
    assert found["auc"] == pytest.approx(roc_auc_score(rows.desirable, rows.column("reward")), rel=1e-12)
    assert found["brier"] == pytest.approx(brier_score_loss(rows.desirable, rows.chance), rel=1e-12)


def test_the_reliability_plot_is_scikit_learns():
    rows = evaluated(rows=2000)
    found = reliability(rows.chance, rows.desirable)
    desirable, chance = calibration_curve(rows.desirable, rows.chance, n_bins=10, strategy="quantile")
    np.testing.assert_allclose([each.desirable for each in found], desirable, rtol=1e-12)
    np.testing.assert_allclose([each.chance for each in found], chance, rtol=1e-12)
    assert sum(each.rows for each in found) == 2000


def test_rewards_that_are_true_chances_lie_within_the_plots_intervals():
    rng = np.random.default_rng(0)
    chance = rng.random(20_000)
    found = reliability(chance, rng.random(20_000) < chance)
    assert sum(each.low <= each.chance <= each.high for each in found) >= 8


def test_rows_of_one_prompt_make_the_reliability_plot_no_surer():
    """Each row five times, as five answers to its prompt that were all liked, or not."""
    rng = np.random.default_rng(1)
    chance = rng.random(400)
    liked, prompts = rng.random(400) < chance, np.arange(400)
    once = reliability(chance, liked, prompts)
    repeated = reliability(chance.repeat(5), liked.repeat(5), prompts.repeat(5))
    for one, other in zip(once, repeated, strict=True):
        assert (one.desirable, 5 * one.rows) == (other.desirable, other.rows)
        assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=1e-3)
    alone = reliability(chance.repeat(5), liked.repeat(5))
    assert alone[4].high - alone[4].low < 0.6 * (repeated[4].high - repeated[4].low)


def test_rows_with_one_reward_are_one_bin():
    (only,) = reliability(np.full(40, 0.5), np.arange(40) < 30)
    assert (only.chance, only.desirable, only.rows) == (0.5, 0.75, 40)


def test_every_figure_of_a_step_has_the_same_value_here_and_an_interval_around_it():
    rows = evaluated()
    expected = metrics.step_metrics(metrics.by_class(rows.table, rows.sign).sum(1), rows.kl_sums)
    found = findings(rows)
    assert expected.items() <= found.figures.items()
    counts = {"kl", "kl_clamped", "kl_pairs", *(f"rows/{name}" for name in (*metrics.CLASSES, "all"))}
    assert found.intervals.keys() == found.figures.keys() - counts
    for name, interval in found.intervals.items():
        assert interval.value == pytest.approx(found.figures[name], rel=1e-9), name
        assert interval.low <= interval.value <= interval.high, name


def test_intervals_resample_prompts():
    """The same rows from three prompts or from 300: what three prompts say is far less sure."""
    many, few = (findings(evaluated(prompts=prompts)).intervals["rewards/all"] for prompts in (300, 60))
    assert many.value == few.value and (many.prompts, few.prompts) == (300, 60)


@pytest.mark.parametrize("desirable", (True, False))
def test_one_class_alone_has_neither_margin_nor_auc(desirable):
    found = findings(evaluated(desirable=desirable))
    absent = "undesirable" if desirable else "desirable"
    assert not [name for name in found.figures if name in ("auc", "rewards/margin") or name.endswith(f"/{absent}")]


def test_a_loss_without_z0_has_no_kl():
    assert not [name for name in findings(evaluated(pairs=False)).figures if name.startswith("kl")]


def test_a_named_set_has_the_figures_of_its_rows_alone():
    rows = evaluated(pairs=False)
    sets = np.where(np.arange(300) < 100, "hard", "fresh")
    found = findings(rows, sets=sets)
    here = rows.table[:100]
    assert found.figures["hard/rewards/all"] == pytest.approx(float(rows.column("reward")[:100].mean()))
    assert found.figures["hard/auc"] == pytest.approx(roc_auc_score(rows.desirable[:100], here[:, 3]))
    assert (found.figures["hard/rows"], found.figures["fresh/rows"]) == (100, 200)
    assert found.intervals["hard/auc"].prompts < found.intervals["auc"].prompts
    assert found.figures["auc"] == figures_of(rows)["auc"]


def test_slices_part_the_rows():
    rows = evaluated()
    model = np.where(np.arange(300) % 3 == 0, "v1", "v2")
    found = findings(rows, slices={"model": model}).slices["model"]
    assert {value: own["rows"] for value, own in found.items()} == {"v2": 200, "v1": 100}
    assert found["v1"]["accuracy/all"]["value"] == pytest.approx(float(rows.column("correct")[::3].mean()))


def test_rare_values_share_their_figures():
    values = np.array([f"v{number % 30}" for number in range(300)] + ["often"] * 50)
    found = by_value(values)
    assert len(found) == LARGEST + 1 and (found[0][0], found[-1][0]) == ("often", OTHERS)
    assert sum(chosen for _, chosen in found).tolist() == [1] * 350


def test_prompts_are_sliced_in_thirds_by_their_length():
    assert by_length(np.array([1, 2, 3, 4, 5, 600])).tolist() == (
        ["up to 2 tokens"] * 2 + ["up to 4 tokens"] * 2 + ["over 4 tokens"] * 2
    )
    assert set(by_length(np.full(5, 7))) == {"up to 7 tokens"}


def test_two_models_are_compared_row_by_row():
    """One is better by a little on every row: neither's own interval shows it, the paired one does."""
    first, second = evaluated(tilt=6.3), evaluated(tilt=6.0)
    paired = compare(first, second)["rewards/margin"]
    alone = findings(first).intervals["rewards/margin"]
    assert paired.value == pytest.approx(2 * 0.3 * 0.1, rel=1e-6)
    assert 0 < paired.low <= paired.high and alone.high - alone.low > 4 * paired.value


def test_findings_become_one_line_of_json():
    line = findings(evaluated(), slices={"model": np.array(["a", "b"] * 150)}).to_dict()
    assert line["intervals"]["auc"]["low"] < line["auc"] < line["intervals"]["auc"]["high"]
    assert len(line["reliability"]) == 10 and line["slices"]["model"]["a"]["rows"] == 150

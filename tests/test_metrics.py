"""Sums add up over any shards, and one division at the end gives the figures of all rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kto_kernels import LOSSES

from kto_dist.objective.metrics import (
    CLASSES,
    QUANTITIES,
    by_class,
    clamp_kl,
    part_metrics,
    row_table,
    source_metrics,
    step_metrics,
    unrounded,
)

NO_KL = torch.zeros(2, dtype=torch.float64)
NO_ROWS = torch.zeros(2, len(QUANTITIES), dtype=torch.float64)


def rows_of(count, seed=0, **columns):
    """Random rows; a column given by name replaces the random one."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    table = {
        "losses": uniform(0, 1),
        "weight": uniform(0.1, 3),
        "logps": uniform(-90, -1),
        "ref_logps": uniform(-90, -1),
        "sign": uniform(-1, 1).sign(),
        "tokens": uniform(1, 50).long(),
    }
    return table | {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def sums_of(rows, z0=0.0, beta=0.1):
    return by_class(row_table(z0=torch.tensor(z0), beta=beta, **rows), rows["sign"]).sum(1)


def figures(rows, kl=NO_KL, **options):
    return step_metrics(sums_of(rows, **options), kl)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_shards_of_rows_in_any_order_add_up_to_all_rows(sizes, seed, data):
    rows = rows_of(sum(sizes), seed)
    order = torch.tensor(data.draw(st.permutations(range(sum(sizes)))), dtype=torch.int64)
    total = NO_ROWS.clone()
    for shard in order.split(sizes):
        total += sums_of({name: column[shard] for name, column in rows.items()}, z0=1.5)
    torch.testing.assert_close(total, sums_of(rows, z0=1.5), rtol=1e-12, atol=1e-12)


def test_every_sum_is_of_its_own_class():
    rows = rows_of(5, sign=[1, -1, 1, 1, -1], logps=[1, 10, 2, 4, 20])
    sums = dict(zip(CLASSES, sums_of(rows)[:, QUANTITIES.index("logps")].tolist(), strict=True))
    assert sums == {"undesirable": 30, "desirable": 7}


@pytest.mark.parametrize(("sign", "present", "absent"), [(1, *CLASSES[::-1]), (-1, *CLASSES)])
def test_a_class_without_rows_is_absent(sign, present, absent):
    found = figures(rows_of(3, sign=[sign] * 3))
    assert f"rewards/{present}" in found
    assert not [name for name in found if name.endswith(f"/{absent}") or name == "rewards/margin"]


def test_no_figure_is_ever_nan():
    empty = step_metrics(NO_ROWS, NO_KL)
    assert all(math.isfinite(value) for value in empty.values())
    assert not [name for name in empty if "/" in name]


def test_the_loss_is_the_weighted_losses_over_the_number_of_rows():
    rows = rows_of(3, losses=[0.5, 0.2, 0.9], weight=[2.0, 1.0, 0.5], sign=[1, -1, 1])
    found = figures(rows)
    assert found["loss"] == pytest.approx((1.0 + 0.2 + 0.45) / 3)
    assert found["loss/desirable"] == pytest.approx((1.0 + 0.45) / 2)
    assert found["loss/undesirable"] == pytest.approx(0.2)


def test_rewards_are_beta_times_the_log_ratio_and_know_no_weights():
    rows = rows_of(3, logps=[-10, -20, -30], ref_logps=[-12, -15, -30], weight=[9, 9, 9], sign=[1, -1, 1])
    found = figures(rows, beta=0.5)
    assert found["rewards/desirable"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["rewards/undesirable"] == pytest.approx(-2.5)
    assert found["rewards/all"] == pytest.approx(-1.5 / 3)


def test_the_margin_is_the_difference_of_the_classes_rewards():
    found = figures(rows_of(20))
    assert found["rewards/margin"] == pytest.approx(found["rewards/desirable"] - found["rewards/undesirable"])


def test_a_row_is_correct_on_its_labels_side_of_z0_and_half_on_it():
    # log-ratios 3, 2, 1 against z0 = 2
    sides = {"logps": [3, 2, 1] * 2, "ref_logps": [0] * 6, "sign": [1, 1, 1, -1, -1, -1]}
    rows = rows_of(6, **sides)
    correct = [sums_of({name: column[[row]] for name, column in rows.items()}, z0=2.0) for row in range(6)]
    assert [float(sums[:, QUANTITIES.index("correct")].sum()) for sums in correct] == [1, 0.5, 0, 0, 0.5, 1]


def test_rows_that_differ_from_z0_by_rounding_alone_are_ties():
    # 0.1 nats per square root of a token: rows of 4 and 100 tokens
    rows = rows_of(4, logps=[0.15, -0.15, 0.25, 0.9], ref_logps=[0] * 4, sign=[1, 1, 1, -1], tokens=[4, 4, 4, 100])
    table = row_table(z0=torch.tensor(0.0), beta=0.1, rounding=0.1, **rows)
    assert table[:, QUANTITIES.index("correct")].tolist() == [0.5, 0.5, 1.0, 0.5]
    apart = unrounded(rows["logps"] - rows["ref_logps"], rows["tokens"], 0.1)
    assert apart.tolist() == [0.0, 0.0, 0.25, 0.0]


def test_accuracy_is_the_mean_of_correct_over_a_classs_rows():
    rows = rows_of(4, logps=[3, 2, 1, 1], ref_logps=[0] * 4, sign=[1, 1, 1, -1])
    found = figures(rows, z0=2.0)
    assert (found["accuracy/desirable"], found["accuracy/undesirable"]) == (0.5, 1.0)
    assert found["accuracy/all"] == pytest.approx(2.5 / 4)


def test_saturated_is_the_share_of_rows_that_the_losss_own_curve_names():
    rows = rows_of(4, losses=[0.5, 0.01, 0.95, 1.0], sign=[1] * 4)
    for loss in LOSSES.values():
        flat = loss.saturated(rows["losses"])
        assert figures(rows | {"saturated": flat})["saturated/desirable"] == flat.double().mean()


def test_counts_and_tokens_are_sums():
    rows = rows_of(5, sign=[1, -1, 1, 1, -1], tokens=[1, 2, 3, 4, 5])
    found = figures(rows)
    assert (found["rows/desirable"], found["rows/undesirable"], found["rows/all"]) == (3, 2, 5)
    assert float(sums_of(rows)[:, QUANTITIES.index("tokens")].sum()) == 15


def test_kl_is_the_mean_over_all_pairs_clamped_after_it():
    # shards with means +3 and -1: clamped one by one they would give 3 * 2 / 4
    kl = torch.tensor([6.0, 2.0]) + torch.tensor([-2.0, 2.0])
    found = step_metrics(NO_ROWS, kl)
    assert (found["kl"], found["kl_raw"], found["kl_clamped"], found["kl_pairs"]) == (1.0, 1.0, 0.0, 4.0)
    assert clamp_kl(kl) == 1.0


def test_a_negative_kl_is_clamped_and_says_so():
    kl = torch.tensor([-6.0, 4.0])
    found = step_metrics(NO_ROWS, kl)
    assert (found["kl"], found["kl_raw"], found["kl_clamped"]) == (0.0, -1.5, 1.0)
    assert clamp_kl(kl) == 0.0


def test_without_pairs_z0_is_zero_and_kl_is_absent():
    assert clamp_kl(NO_KL) == 0.0
    assert not [name for name in step_metrics(NO_ROWS, NO_KL) if name.startswith("kl")]


def test_a_kl_that_is_not_a_number_stays_one():
    kl = torch.tensor([math.nan, 4.0])
    assert math.isnan(clamp_kl(kl))
    assert math.isnan(step_metrics(NO_ROWS, kl)["kl"])


def test_metrics_keep_no_graph():
    rows = rows_of(3)
    rows["logps"].requires_grad_()
    assert not sums_of(rows).requires_grad


def test_figures_by_source_leave_out_sources_without_rows_and_single_ones():
    table = torch.arange(3.0 * len(QUANTITIES), dtype=torch.float64).reshape(3, -1)
    table[:, QUANTITIES.index("rows")] = 1
    loss, reward = table[:, QUANTITIES.index("loss")], table[:, QUANTITIES.index("reward")]
    source = np.array([2, 0, 2], np.int16)
    assert source_metrics(table, source, ["a", "b", "c"]) == {
        "loss/source/a": loss[1],
        "rewards/source/a": reward[1],
        "rows/source/a": 1,
        "loss/source/c": (loss[0] + loss[2]) / 2,
        "rewards/source/c": (reward[0] + reward[2]) / 2,
        "rows/source/c": 2,
    }
    assert source_metrics(table, source * 0, ["a"]) == {}


def test_figures_of_a_part_are_means_over_its_rows():
    table = torch.arange(3.0 * len(QUANTITIES), dtype=torch.float64).reshape(3, -1)
    table[:, QUANTITIES.index("rows")] = 1
    loss, reward = table[:, QUANTITIES.index("loss")], table[:, QUANTITIES.index("reward")]
    assert part_metrics(table, np.array([True, False, True]), "odd") == {
        "loss/odd": (loss[0] + loss[2]) / 2,
        "rewards/odd": (reward[0] + reward[2]) / 2,
        "rows/odd": 2,
    }
    assert part_metrics(table, np.zeros(3, bool), "odd") == {}

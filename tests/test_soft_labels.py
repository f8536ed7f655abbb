"""Labels that are probabilities: p of one class's loss and 1 - p of the other's, from the file to the figures."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mining import COLUMNS, config_of, vote, write_log
from ranks import run_ranks
from step_cases import (
    MAX_LENGTH,
    examples_of,
    logp,
    perturbed,
    relative_error,
    some_examples,
    through_the_trainer,
)
from thumbs_logs import GOOD, read, write
from tiny import thumbs, tiny_llama, write_jsonl
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, weights_of

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.evaluation.figures import Evaluated, figures_of, findings
from kto_dist.evaluation.heldout import evaluate_rows
from kto_dist.feedback import mine
from kto_dist.objective.losses import LOSSES
from kto_dist.objective.objective import Goal, labels_of
from kto_dist.training.prepare import class_weights, counts, prepare
from kto_dist.training.preview import preview
from kto_dist.training.usable import usable_pairs

WEIGHTS = (0.7, 1.3)
BETA = 0.3


@pytest.fixture(scope="module")
def models():
    """Policy and reference in fp64."""
    reference = tiny_llama().double().eval()
    return perturbed(reference, 0.02), reference


@pytest.fixture(scope="module")
def soft():
    return some_examples(soft=True)


# ---- the loss ----


def in_plain_torch(models, examples, rows, kl_pairs, loss):
    """The step's loss, raw KL and gradients, and the figures of one class and the other."""
    policy, reference = models

    def ratio(prompt, completion):
        with torch.no_grad():
            ref = logp(reference, examples.prompt(prompt), examples.completion(completion))
        return logp(policy, examples.prompt(prompt), examples.completion(completion)) - ref

    with torch.no_grad():
        ratios = [ratio(j, k) for j, k in kl_pairs]
    kl_raw = torch.stack(ratios).mean() if ratios else torch.zeros(())
    z0 = kl_raw.clamp(min=0) if loss == "kto" else 0.0
    policy.zero_grad()
    total, rewards, shares = 0.0, [], []
    for row in rows:
        p = float(examples.probability[row])
        if loss == "sft":
            each = -logp(policy, examples.prompt(row), examples.completion(row)) * p
            value = each / len(examples.completion(row))
        else:
            own = ratio(row, row)
            up, down = (1 - torch.sigmoid(BETA * sign * (own - z0)) for sign in (1, -1))
            value = p * WEIGHTS[1] * up + (1 - p) * WEIGHTS[0] * down
            rewards.append(BETA * float(own.detach()))
            shares.append(p)
        total = total + examples.weights[row] * value / len(rows)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return float(total.detach()), float(kl_raw), gradients, np.array(rewards), np.array(shares)


@pytest.mark.parametrize("step", (0, 1))
@pytest.mark.parametrize(("packed", "tokens"), [(False, MAX_LENGTH), (True, 60), (True, 1000)])
@pytest.mark.parametrize("loss", ("kto", "apo_zero_unpaired", "sft"))
def test_a_step_takes_each_labels_loss_by_its_probability(models, soft, loss, packed, tokens, step):
    weights = WEIGHTS if loss != "sft" else (1.0, 1.0)
    found, gradients, rows, pairs = through_the_trainer(
        models, soft, loss=loss, packed=packed, tokens=tokens, class_weights=weights, beta=BETA, step=step
    )
    wanted, kl_raw, gradients_there, rewards, shares = in_plain_torch(models, soft, rows, pairs, loss)
    assert {-1, 1} <= {*np.sign(soft.probability[rows] - 0.5)[~np.isin(soft.probability[rows], (0, 1))]}  # as it should
    assert found["loss"] == pytest.approx(wanted, rel=1e-12)
    assert found.get("kl_raw", 0.0) == pytest.approx(kl_raw, rel=1e-12)
    assert relative_error(gradients, gradients_there) < 1e-12
    if loss == "sft":
        return
    z0 = BETA * max(0.0, kl_raw) if loss == "kto" else 0.0
    for name, share, sign in (("desirable", shares, 1), ("undesirable", 1 - shares, -1)):
        assert found[f"rows/{name}"] == pytest.approx(share.sum())
        assert found[f"rewards/{name}"] == pytest.approx((share * rewards).sum() / share.sum())
        correct = (sign * (rewards - z0) > 0).astype(float)
        assert found[f"accuracy/{name}"] == pytest.approx((share * correct).sum() / share.sum())
    assert found["rows/all"] == len(rows)
    parts = [found[f"loss/{name}"] * found[f"rows/{name}"] for name in ("desirable", "undesirable")]
    assert sum(parts) / len(rows) == pytest.approx(found["loss"])


def test_the_sft_term_is_the_mean_over_the_rows_that_are_expected_to_be_desirable(models, soft):
    options = {"loss": "kto", "packed": True, "tokens": 60, "class_weights": WEIGHTS, "beta": BETA}
    plain, _, rows, _ = through_the_trainer(models, soft, **options)
    found, _, _, _ = through_the_trainer(models, soft, **options, sft_weight=0.5)
    p, own = soft.probability[rows], soft.weights[rows]
    with torch.no_grad():
        per_token = [
            float(-logp(models[0], soft.prompt(row), soft.completion(row))) / len(soft.completion(row)) for row in rows
        ]
    assert found["loss"] - plain["loss"] == pytest.approx(0.5 * (p * own * per_token).sum() / p.sum(), rel=1e-9)


def test_certain_rows_among_probabilities_weigh_what_they_weigh_alone(soft):
    rows, refs = np.arange(len(soft)), np.zeros(len(soft))
    goal = Goal(loss=LOSSES["kto"], beta=BETA, sft_weight=0.0)
    certain = np.isin(soft.probability, (0, 1))
    assert 2 <= certain.sum() < len(soft)
    found = labels_of(soft, rows, refs, WEIGHTS, goal)
    hard = labels_of(some_hard(soft), rows, refs, WEIGHTS, goal)
    for name in ("sign", "weight"):
        assert getattr(found, name)[certain].equal(getattr(hard, name)[certain])
    assert not found.other[certain].any() and found.other[~certain].all()
    assert hard.other is None and hard.share is None


def some_hard(examples):
    rows = range(len(examples))
    return examples_of(
        [examples.prompt(row) for row in rows],
        [examples.completion(row) for row in rows],
        examples.desirable,
        examples.weights,
        examples.prompt_group,
    )


def test_class_weights_are_of_expected_counts():
    examples = examples_of([[2]] * 4, [[3]] * 4, [True] * 4, [1.0, 1.0, 1.0, 2.0], range(4), [0.9, 0.8, 0.7, 0.5])
    objective = SimpleNamespace(loss="kto", desirable_weight="auto", undesirable_weight="auto")
    down, up = class_weights(examples, SimpleNamespace(objective=objective), print)
    # 3.4 desirable and 1.6 undesirable ones: the ratio is lowered to 3 / 2
    assert (down, up) == (pytest.approx(3.4 / 1.6 / 1.5), 1.0)


# ---- whole runs ----


def soft_log(path, rows=60):
    found = thumbs(rows, prompts=12, seed=2)
    draw = np.random.default_rng(0)
    for row in found:
        row["label"] = round(float(np.clip(draw.normal(0.75 if row["label"] else 0.25, 0.2), 0, 1)), 3)
    return write_jsonl(path, found)


def test_the_batch_decides_and_not_the_cluster(tmp_path, tiny_model):
    log = soft_log(tmp_path / "log.jsonl")
    settings = {"data__soft_labels": True, "train__max_steps": 3, "data__heldout": 0.2}
    plain = tiny_config(tmp_path, tiny_model, log, train__packing=False, train__tokens_per_microbatch=4096, **settings)
    other = tiny_config(
        tmp_path,
        tiny_model,
        log,
        train__output=str(tmp_path / "other"),
        train__packing=True,
        train__tokens_per_microbatch=96,
        deepspeed__zero_stage=3,
        **settings,
    )
    run_ranks(train_all, 1, [plain])
    run_ranks(train_all, 2, [other])
    for expected, found in zip(metrics_of(plain), metrics_of(other), strict=True):
        assert found.keys() == expected.keys()
        for name in ("loss", "kl_raw", "grad_norm", "rewards/desirable", "rewards/undesirable", "rows/desirable"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (expected["step"], name)
    first = metrics_of(plain)[0]
    assert first["rows/desirable"] % 1 and first["rows/all"] == pytest.approx(16)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    weights, data = summary["data"]["class_weights"], summary["data"]
    # at step 0 every loss is one half
    expected = sum(weights[name] * 0.5 * first[f"rows/{name}"] for name in weights) / first["rows/all"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert data["train"]["soft"] > 0 and 0 < data["train"]["expected_desirable"] < data["train"]["rows"]
    assert summary["heldout"]["before"]["accuracy/desirable"] == 0.5


def test_thumbs_train_the_same_in_every_bit_where_probabilities_are_allowed(tmp_path, tiny_model, tiny_log):
    rows = [json.loads(line) for line in tiny_log.read_text().splitlines()]
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [row | {"label": float(row["label"])} for row in rows])
    settings = {"train__max_steps": 2, "data__heldout": 0.2}
    hard = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
    soft = tiny_config(
        tmp_path, tiny_model, numbers, train__output=str(tmp_path / "soft"), data__soft_labels=True, **settings
    )
    run_ranks(train_all, 1, [hard, soft])
    without = [[{k: v for k, v in line.items() if k not in TIMED} for line in metrics_of(run)] for run in (hard, soft)]
    assert without[0] == without[1]
    ours, theirs = weights_of(hard), weights_of(soft)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


# ---- reading ----


@pytest.mark.parametrize(
    ("label", "desirable", "probability"),
    [(0.7, True, 0.7), (0.2, False, 0.2), (0.5, True, 0.5), (1, True, None), (0.0, False, None), (True, True, None),
     ("down", False, None), ("0.25", False, 0.25)],
)  # fmt: skip
def test_a_number_is_the_probability_that_the_answer_is_good(tmp_path, label, desirable, probability):
    (row,) = read(write(tmp_path / "log.jsonl", GOOD | {"label": label}), soft=True)
    assert (row.desirable, row.probability) == (desirable, probability)


def test_of_two_answers_the_second_is_good_by_the_rest(tmp_path):
    record = {"prompt": "hi", "output_A": "hello", "output_B": "what", "label": 0.75}
    first, second = read(write(tmp_path / "log.jsonl", record), soft=True)
    assert (first.probability, second.probability) == (0.75, 0.25)


@pytest.mark.parametrize("label", (1.3, -1, 5))
def test_a_number_outside_of_0_to_1_is_no_probability(tmp_path, label):
    with pytest.raises(UserError, match=r"label .*must be a probability, from 0 to 1.*data.soft_labels"):
        read(write(tmp_path / "log.jsonl", GOOD, GOOD | {"label": label}), soft=True)


@pytest.mark.parametrize("others", ([], [GOOD | {"label": 1}]), ids=("alone", "beside a thumb"))
def test_a_fraction_is_an_error_that_names_the_setting_where_it_is_off(tmp_path, others):
    with pytest.raises(UserError, match=r"label.*0\.7.*data\.soft_labels"):
        read(write(tmp_path / "log.jsonl", *others, GOOD | {"label": 0.7}))


def test_two_label_columns_that_differ_are_refused(tmp_path):
    with pytest.raises(UserError, match="say different things"):
        read(write(tmp_path / "log.jsonl", GOOD | {"label": 0.7, "preference": 0.6}), soft=True)


def test_what_is_read_is_said_and_told_apart_from_other_probabilities(tmp_path, tiny_model):
    rows = [GOOD | {"prompt": f"{n}", "label": label} for n, label in enumerate((0.9, 0.8, 1, 0.2))]

    def prepared(name, rows):
        log = write(tmp_path / f"{name}.jsonl", *rows)
        return prepare(tiny_config(tmp_path, tiny_model, log, data__soft_labels=True), Console())

    found = prepared("log", rows)
    assert (found.train.report.soft, found.train.report.expected) == (3, pytest.approx(2.9))
    assert counts(found.train) == {
        "rows": 4, "desirable": 3, "undesirable": 1, "soft": 3, "expected_desirable": pytest.approx(2.9)
    }  # fmt: skip
    assert "3 labels are probabilities, by which 2.9 of 4 rows" in "\n".join(found.train.report.lines())
    said = "\n".join(preview(found, (0.5, 2.0)))
    assert "desirable by 0.9, weight 1 (times 1.85 of its class)" in said and "desirable by 0.2," in said
    other = prepared("other", [*rows[:3], rows[3] | {"label": 0.24}])
    assert other.train.fingerprint != found.train.fingerprint


# ---- who takes them ----


def test_a_loss_on_pairs_refuses_them(tmp_path):
    with pytest.raises(UserError, match=r"data.soft_labels \(true\).*dpo takes pairs"):
        tiny_config(tmp_path, tmp_path, tmp_path / "log", objective__loss="dpo", data__soft_labels=True)
    with pytest.raises(UserError, match=r"data.soft_labels \(true\).*a pair is of"):
        usable_pairs(tiny_config(tmp_path, tmp_path, tmp_path / "log", data__soft_labels=True))


def test_a_comparison_refuses_them():
    tree = {"model": {"path": "m"}, "data": {"train": "t", "heldout": 0.2, "soft_labels": True}}
    with pytest.raises(UserError, match=r"data.soft_labels \(true\) must be false: a comparison"):
        ComparisonConfig.build(tree)


def judged(probability, desirable, copies=1, loss="kto"):
    """Six rows, each so many times, under a model and a reference that are made up."""
    rows = np.repeat(np.arange(6), copies)
    examples = examples_of(
        [[2 + row] for row in rows], [[3] * (1 + row) for row in rows], desirable, [1.0] * len(rows), rows, probability
    )
    ratios = np.array([3.0, -1.0, 0.5, 2.0, -2.0, 0.1])[rows]
    units = np.flatnonzero(examples.probability > 0)[:, None] if loss == "sft" else None
    return evaluate_rows(
        lambda prompts, completions: -9 + ratios[completions] * (prompts == completions),
        lambda prompts, completions: np.full(len(prompts), -9.0),
        examples,
        seed=0,
        loss=LOSSES[loss],
        beta=BETA,
        units=units,
        class_weights=WEIGHTS,
    )


@pytest.mark.parametrize("loss", ("kto", "apo_zero_unpaired", "sft"))
def test_figures_are_those_of_rows_that_stand_there_as_often_as_their_labels_are_probable(loss):
    quarters = np.array([4, 3, 1, 2, 1, 0])
    found: Evaluated = judged(quarters / 4, quarters >= 2, loss=loss)
    rows = [[place < up for place in range(4)] for up in quarters]
    copies: Evaluated = judged(None, np.array(rows).ravel(), copies=4, loss=loss)
    ours, theirs = figures_of(found), figures_of(copies)
    # an sft loss counts the rows that it takes
    apart = {"rows/all", "rows/desirable", "rows/undesirable", "kl_pairs"} | ({"loss"} if loss == "sft" else set())
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - apart:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name
    assert (ours["rows/desirable"], ours["rows/undesirable"], ours["rows/all"]) == (2.75, 3.25, 6)
    told = findings(found)
    assert told.rewards is not None and sum(told.rewards.desirable) == pytest.approx(2.75)
    assert all(interval.low <= told.figures[name] <= interval.high for name, interval in told.intervals.items())


def test_mining_writes_them_and_training_reads_them(tmp_path):
    log = [vote("q", "a", f=f, u=f"u{n}") for n, f in enumerate(("up", "up", "up", "down"))]
    log += [vote(f"other {n}", "b", f=("up", "down")[n % 2], u="v") for n in range(4)]
    config = config_of(
        tmp_path,
        write_log(tmp_path / "log.jsonl", log),
        COLUMNS | {"user": "u"},
        agreement__conflicts="soft",
        users__bias=0,
        users__volume=0,
    )
    audit = mine(config)
    path = tmp_path / "mined" / "train.parquet"
    assert sorted(pq.read_table(path)["label"].to_pylist()) == [0.0, 0.0, 0.75, 1.0, 1.0]
    assert audit["conflicts"]["samples"][0]["outcome"] == "both"
    assert sum(step["up_removed"] + step["down_removed"] for step in audit["steps"]) == 0
    with pytest.raises(UserError, match=r"data\.soft_labels"):
        read(path)
    rows = read(path, soft=True)
    assert [row.probability for row in rows if row.probability is not None] == [0.75]

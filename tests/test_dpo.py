"""Losses on pairs and on good rows alone: against TRL, against the formulas, and through whole runs."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ranks import run_ranks
from tiny import tiny_llama, tiny_tokenizer
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.data.batch import Cutting, microbatches
from kto_dist.data.examples import Examples
from kto_dist.evaluation.figures import figures_of
from kto_dist.evaluation.heldout import evaluate_rows
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.objective import metrics
from kto_dist.objective.losses import LOSSES
from kto_dist.objective.objective import Objective, batch_loss, labels_of, table_of

BETA = 0.3
TOLERANCE = 1e-4


def examples_of(rows):
    """Of (prompt tokens, completion tokens, desirable, weight)."""
    tokens = pa.list_(pa.int32())
    prompts, completions, desirable, weights = zip(*rows, strict=True)
    table = pa.table(
        {
            "prompt_ids": pa.array(prompts, tokens),
            "completion_ids": pa.array(completions, tokens),
            "desirable": pa.array(desirable, pa.bool_()),
            "weight": pa.array(weights, pa.float64()),
            "prompt_group": pa.array([sum(prompt) for prompt in prompts], pa.int64()),
        }
    )
    return Examples(table, fingerprint="", report=None)


def logp(model, prompt, completion):
    """Differentiable, without any of our code."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logits[places].gather(-1, torch.tensor(completion)[:, None]).sum().double()


def moved(model, size=0.02):
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=parameter.dtype))
    return other


def ours(policy, reference, examples, units, loss, tokens=80, **settings):
    """Loss, gradients and the table of rows, in packed micro-batches of few tokens."""
    model = ScoringModel(copy.deepcopy(policy))
    objective = Objective(
        loss=LOSSES[loss], beta=BETA, transform=model.transform, logits_bytes=2**20, logits_dtype=None, **settings
    )
    rows = units.ravel()
    with torch.no_grad():
        of_row = [logp(reference, examples.prompt(r).tolist(), examples.completion(r).tolist()) for r in rows]
    refs = torch.stack(of_row).double().numpy()
    labels = labels_of(examples, rows, refs, (1.0, 1.0), objective)
    cutting = Cutting(max_length=256, prompt_limit=128, tokens=tokens, packed=True)
    found = torch.zeros(rows.size, 2, dtype=torch.float64)
    z0 = torch.zeros((), dtype=torch.float64)
    for batch in microbatches(examples, rows, rows, cutting, rank=0, ranks=1, unit=units.shape[1]):
        own = batch_loss(model, batch, labels, z0, objective)
        (own.loss / rows.size).backward()
        found[batch.position] = own.rows
    losses, logps = found.unbind(1)
    table = table_of(objective, labels, logps, z0, torch.from_numpy(examples.completion_lengths[rows]), losses)
    # what an evaluation makes of the log-probs alone is the same
    torch.testing.assert_close(
        table_of(objective, labels, logps, z0, torch.from_numpy(examples.completion_lengths[rows])), table
    )
    figures = metrics.step_metrics(metrics.by_class(table, labels.sign).sum(1), torch.zeros(2))
    if units.shape[1] == 2:
        figures |= metrics.pair_metrics(table)
    return figures, {name: parameter.grad for name, parameter in model.lm.named_parameters()}


def relative_error(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


# ---- TRL ----


@pytest.mark.parametrize(("loss", "theirs_is"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_trl_has_the_same_loss_gradients_and_rewards_on_the_same_pairs(tmp_path, loss, theirs_is):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    reference = tiny_llama().eval()
    policy = moved(reference)
    pairs = [
        {"prompt": "what is up?", "chosen": " not much", "rejected": " I do not want to say"},
        {"prompt": "2 + 2 =", "chosen": " four, as far as I know", "rejected": " 5"},
        {"prompt": "bye", "chosen": " see you", "rejected": " no"},
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(pairs),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        beta=BETA,
        loss_type=[theirs_is],
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    )
    tokenised = list(trainer.train_dataset)
    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, trainer.data_collator(tokenised))
    wanted.backward()

    rows = [
        (row["prompt_ids"], row[f"{side}_ids"], side == "chosen", 1.0)
        for row in tokenised
        for side in ("chosen", "rejected")
    ]
    figures, gradients = ours(policy, reference, examples_of(rows), np.arange(2 * len(pairs)).reshape(-1, 2), loss)
    assert figures["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_error(gradients, {name: p.grad for name, p in trainer.model.named_parameters()}) < 1e-5
    theirs = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    for name, own in (
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("rewards/margins", "rewards/margins"),
        ("rewards/accuracies", "accuracy/pairs"),
    ):
        assert figures[own] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


# ---- the formulas ----


@pytest.fixture(scope="module")
def case():
    """Policy and reference in fp64, and 8 rows: pairs 0-1, 2-3, ... of chosen and rejected, weights that differ."""
    reference = tiny_llama().double().eval()
    draw = np.random.default_rng(1)

    def tokens():
        return draw.integers(2, 258, draw.integers(1, 14)).tolist()

    prompts = [tokens() for _ in range(4)]
    rows = [(prompts[row // 2], tokens(), row % 2 == 0, float(draw.uniform(0.3, 2.0))) for row in range(8)]
    return moved(reference), reference, rows


def by_hand(policy, reference, rows, value):
    """`value(log-ratios, logps, lengths, weights)` with gradients."""
    logps = torch.stack([logp(policy, prompt, completion) for prompt, completion, _, _ in rows])
    with torch.no_grad():
        refs = torch.stack([logp(reference, prompt, completion) for prompt, completion, _, _ in rows])
    lengths = torch.tensor([len(completion) for _, completion, _, _ in rows], dtype=torch.float64)
    weights = torch.tensor([weight for *_, weight in rows], dtype=torch.float64)
    policy.zero_grad()
    total = value(logps - refs, logps, lengths, weights)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return float(total.detach()), gradients


def pair_loss(ratios, weights, smoothing=0.0):
    margin = BETA * (ratios[0::2] - ratios[1::2])
    both = (1 - smoothing) * torch.nn.functional.logsigmoid(margin) + smoothing * torch.nn.functional.logsigmoid(
        -margin
    )
    return -(torch.minimum(weights[0::2], weights[1::2]) * both).mean()


def nll_a_token(logps, lengths, weights):
    return -(weights * logps / lengths)


@pytest.mark.parametrize("tokens", (60, 1000))
@pytest.mark.parametrize(("smoothing", "sft_weight"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.7), (0.1, 0.4)])
def test_dpo_is_its_formula_with_a_pairs_weight_the_smaller_of_its_rows(case, smoothing, sft_weight, tokens):
    policy, reference, rows = case

    def value(ratios, logps, lengths, weights):
        good = nll_a_token(logps, lengths, weights)[0::2].mean()
        return pair_loss(ratios, weights, smoothing) + sft_weight * good

    wanted, gradients_by_hand = by_hand(policy, reference, rows, value)
    settings = {"label_smoothing": smoothing, "sft_weight": sft_weight, "tokens": tokens}
    figures, gradients = ours(policy, reference, examples_of(rows), np.arange(8).reshape(-1, 2), "dpo", **settings)
    assert figures["loss"] == pytest.approx(wanted, rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-11


@pytest.mark.parametrize("tokens", (60, 1000))
@pytest.mark.parametrize("sft_weight", (0.0, 0.7))
def test_ipo_is_its_formula_over_means_a_token(case, sft_weight, tokens):
    policy, reference, rows = case

    def value(ratios, logps, lengths, weights):
        means = ratios / lengths
        off = means[0::2] - means[1::2] - 1 / (2 * BETA)
        good = nll_a_token(logps, lengths, weights)[0::2].mean()
        return (torch.minimum(weights[0::2], weights[1::2]) * off**2).mean() + sft_weight * good

    wanted, gradients_by_hand = by_hand(policy, reference, rows, value)
    settings = {"sft_weight": sft_weight, "tokens": tokens}
    figures, gradients = ours(policy, reference, examples_of(rows), np.arange(8).reshape(-1, 2), "ipo", **settings)
    assert figures["loss"] == pytest.approx(wanted, rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-11


@pytest.mark.parametrize("tokens", (30, 1000))
def test_sft_is_the_mean_over_good_rows_of_the_negative_log_prob_a_token(case, tokens):
    policy, reference, rows = case
    good = np.arange(0, 8, 2)

    def value(ratios, logps, lengths, weights):
        return nll_a_token(logps, lengths, weights)[0::2].mean()

    wanted, gradients_by_hand = by_hand(policy, reference, rows, value)
    figures, gradients = ours(policy, reference, examples_of(rows), good[:, None], "sft", tokens=tokens)
    assert figures["loss"] == pytest.approx(wanted, rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-11


@pytest.mark.parametrize("loss", ("kto", "apo_zero_unpaired"))
def test_an_sft_term_beside_a_loss_on_thumbs_is_a_mean_over_good_rows(case, loss):
    policy, reference, rows = case
    sign = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def value(ratios, logps, lengths, weights):
        main = (weights * torch.sigmoid(-BETA * sign * ratios)).mean()
        return main + 0.6 * nll_a_token(logps, lengths, weights)[0::2].mean()

    wanted, gradients_by_hand = by_hand(policy, reference, rows, value)
    figures, gradients = ours(policy, reference, examples_of(rows), np.arange(8)[:, None], loss, sft_weight=0.6)
    assert figures["loss"] == pytest.approx(wanted, rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-11


@pytest.mark.parametrize(
    ("loss", "settings"), [("dpo", {"label_smoothing": 0.1, "sft_weight": 0.7}), ("ipo", {"sft_weight": 0.7})]
)
def test_the_held_out_loss_of_pairs_is_the_one_that_is_minimised(case, loss, settings):
    policy, reference, rows = case
    examples, units = examples_of(rows), np.arange(8).reshape(-1, 2)
    figures, _ = ours(policy, reference, examples, units, loss, **settings)

    def under(model):
        with torch.no_grad():
            logps = np.array([float(logp(model, prompt, completion)) for prompt, completion, *_ in rows])
        return lambda prompts, completions: logps[completions]

    found = evaluate_rows(
        under(policy),
        under(reference),
        examples,
        seed=0,
        loss=LOSSES[loss],
        beta=BETA,
        units=units,
        class_weights=(1.0, 1.0),
        **settings,
    )
    assert figures_of(found)["loss"] == pytest.approx(figures["loss"], rel=1e-9)


# ---- whole runs ----


def summary_of(config):
    return json.loads((Path(config.train.output) / "summary.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_log):
    """Three steps of dpo by world size, token budget and packing, after one of kto on the same store."""
    folder = tmp_path_factory.mktemp("dpo")
    shared = {"data__heldout": 0.25, "train__max_steps": 3}
    first = tiny_config(folder, tiny_model, tiny_log, **shared, train__output=str(folder / "kto"), train__epochs=1.0)
    first = first.model_copy(update={"train": first.train.model_copy(update={"max_steps": None})})
    run_ranks(train_all, 1, [first])
    configs = {}
    for world, budget, packing in itertools.product((1, 2), (192, 4096), (False, True)):
        configs[world, budget, packing] = tiny_config(
            folder,
            tiny_model,
            tiny_log,
            **shared,
            objective__loss="dpo",
            train__output=str(folder / f"{world}-{budget}-{packing}"),
            train__tokens_per_microbatch=budget,
            train__packing=packing,
        )
    for world in (1, 2):
        run_ranks(train_all, world, [config for key, config in configs.items() if key[0] == world])
    return configs


@pytest.mark.parametrize("packing", (False, True))
@pytest.mark.parametrize("budget", (192, 4096))
@pytest.mark.parametrize("world", (1, 2))
def test_the_batch_decides_for_pairs_as_well(runs, world, budget, packing):
    plain, config = runs[1, 4096, False], runs[world, budget, packing]
    for expected, found in zip(metrics_of(plain), metrics_of(config), strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "accuracy/pairs"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), (expected["step"], name)
    expected, found = weights_of(plain), weights_of(config)
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= TOLERANCE * torch.norm(tensor), name


def test_dpo_starts_at_ln_2_has_no_kl_and_its_rows_are_in_the_store_already(runs):
    lines, summary = metrics_of(runs[1, 4096, True]), summary_of(runs[1, 4096, True])
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["rows/all"] == 16
    assert lines[0]["pairs"] == 8
    assert not [name for name in lines[0] if name.startswith("kl")]
    assert summary["reference"]["scored"] == 0
    assert summary["reference"]["pairs"] > 0
    after = summary["heldout"]["after"]
    assert after["rows/all"] == summary["data"]["heldout"]["rows"]  # rows without a partner are asked about as well
    assert after["accuracy/pairs"] > 0.5
    assert "loss" in after["intervals"]
    assert after["loss"] < summary["heldout"]["before"]["loss"]


def test_ipo_starts_at_a_quarter_of_one_over_beta_squared_and_falls(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, objective__loss="ipo", objective__beta=0.5, data__heldout=0.25)
    run_ranks(train_all, 1, [config])
    lines, summary = metrics_of(config), summary_of(config)
    assert lines[0]["loss"] == pytest.approx(1.0, rel=1e-6)
    assert lines[-1]["rewards/margins"] > 0
    assert summary["heldout"]["before"]["loss"] == pytest.approx(1.0, rel=1e-6)
    assert summary["heldout"]["after"]["accuracy/pairs"] > 0.5


def test_sft_learns_from_good_rows_alone_and_is_asked_about_all(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, objective__loss="sft", data__heldout=0.25)
    run_ranks(train_all, 1, [config])
    lines, summary = metrics_of(config), summary_of(config)
    assert "rows/undesirable" not in lines[0]
    assert lines[0]["logps/desirable"] == pytest.approx(lines[0]["ref_logps/desirable"], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert summary["heldout"]["after"]["loss"] < summary["heldout"]["before"]["loss"]
    assert summary["heldout"]["after"]["rows/undesirable"] > 0

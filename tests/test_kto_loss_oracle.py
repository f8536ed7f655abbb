"""A whole step against two others: the formulas of the design written out in loops, and TRL's own KTO."""

import copy
import math

import numpy as np
import pytest
import torch
from kto_kernels import LOSSES as KERNELS
from kto_kernels import kto_loss, sequence_logps, token_logps
from kto_kernels import reference as definition
from step_cases import MAX_LENGTH, examples_of, logp, perturbed, relative_error, some_examples, through_the_trainer
from tiny import tiny_llama, tiny_tokenizer

from kto_dist.base import comm
from kto_dist.data.batch import Cutting, microbatches
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.objective import metrics
from kto_dist.objective.losses import LOSSES as TABLE
from kto_dist.objective.objective import Labels, Objective, batch_loss, survey

STEPS = (0, 3)  # one whose kl_raw is clamped and one whose is not
LOSSES = ("kto", "apo_zero_unpaired")


@pytest.fixture(scope="module")
def examples():
    return some_examples()


@pytest.fixture(scope="module")
def models():
    """Policy and reference in fp64, where training would run; z0 is above 0 in one step and clamped in the other."""
    reference = tiny_llama().double().eval().to(comm.device())
    return perturbed(reference, 0.02), reference


# ---- the formulas, one row at a time ----


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(models, examples, rows, kl_pairs, class_weights, beta, loss):
    """The step's loss, raw KL and the policy's gradients by parameter name."""
    policy, reference = models
    with torch.no_grad():
        ratios = [
            float(logp(policy, examples.prompt(j), examples.completion(k)))
            - float(logp(reference, examples.prompt(j), examples.completion(k)))
            for j, k in kl_pairs
        ]
    kl_raw = math.fsum(ratios) / len(ratios) if ratios else 0.0
    z0 = max(0.0, kl_raw) if loss == "kto" else 0.0
    policy.zero_grad()
    total = 0.0
    for row in rows:
        log_pi = logp(policy, examples.prompt(row), examples.completion(row))
        with torch.no_grad():
            log_ref = float(logp(reference, examples.prompt(row), examples.completion(row)))
        label = 1 if examples.desirable[row] else -1
        weight = class_weights[int(examples.desirable[row])] * examples.weights[row]
        value = sigmoid(beta * label * (float(log_pi.detach()) - log_ref - z0))
        total += weight * (1 - value) / len(rows)
        # d(1 - value) / d(log pi) = -beta * label * value * (1 - value)
        (log_pi * (-weight * beta * label * value * (1 - value) / len(rows))).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return total, kl_raw, gradients


# ---- the same through the trainer ----


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("tokens", (MAX_LENGTH, 60, 1000))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_design_written_out_in_loops(models, examples, loss, tokens, packed, step):
    options = {"class_weights": (0.7, 1.3), "beta": 0.3, "loss": loss}
    found, gradients, rows, pairs = through_the_trainer(
        models, examples, packed=packed, tokens=tokens, step=step, **options
    )
    loss_by_hand, kl_raw, gradients_by_hand = by_hand(models, examples, rows, pairs, **options)
    assert found["loss"] == pytest.approx(loss_by_hand, rel=1e-12)
    assert found.get("kl_raw", 0.0) == pytest.approx(kl_raw, rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-12


def test_the_case_has_long_kl_pairs_and_both_signs_of_kl(models, examples):
    """What the test above would not notice if it were absent."""
    seen = []
    for step in STEPS:
        found, _, _, pairs = through_the_trainer(
            models, examples, loss="kto", packed=True, tokens=60, class_weights=(1.0, 1.0), beta=0.3, step=step
        )
        lengths = [examples.prompt_lengths[j] + examples.completion_lengths[k] for j, k in pairs]
        assert max(lengths) > MAX_LENGTH
        seen.append(found["kl_raw"])
    assert min(seen) < 0 < max(seen)


def test_fewer_kl_pairs_estimate_z0_from_those_alone(models, examples):
    options = {"class_weights": (1.0, 1.0), "beta": 0.3, "loss": "kto"}
    found, gradients, rows, pairs = through_the_trainer(models, examples, packed=True, tokens=60, kl_pairs=2, **options)
    loss_by_hand, kl_raw, gradients_by_hand = by_hand(models, examples, rows, pairs, **options)
    assert len(pairs) == found["kl_pairs"] == 2
    assert (found["loss"], found["kl_raw"]) == pytest.approx((loss_by_hand, kl_raw), rel=1e-12)
    assert relative_error(gradients, gradients_by_hand) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_start_rewards_are_zero_and_the_loss_is_half_the_mean_weight(models, examples, loss):
    _, reference = models
    found, _, rows, _ = through_the_trainer(
        (reference, reference), examples, loss=loss, packed=True, tokens=60, class_weights=(0.7, 1.3), beta=0.3
    )
    weights = np.where(examples.desirable[rows], 1.3, 0.7) * examples.weights[rows]
    assert found["loss"] == pytest.approx(0.5 * weights.mean(), rel=1e-12)
    assert found["rewards/desirable"] == pytest.approx(0, abs=1e-12)
    assert found["rewards/undesirable"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", TABLE)
def test_the_kernels_table_of_losses_says_the_same(loss):
    known, row = TABLE[loss], KERNELS[loss]
    assert (row.unit, row.has_z0) == (known.unit, known.has_z0)
    zeros = torch.zeros(known.unit)
    sign = torch.tensor([1.0, -1.0])[: known.unit]
    start = kto_loss(zeros, zeros, sign, z0=torch.zeros(()), beta=0.3, loss=loss, lengths=torch.ones(known.unit))
    # without a start of its own: minus the log-prob
    assert start.tolist() == pytest.approx([0.0 if known.start is None else known.start(0.3)] * known.unit)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_three_ops_in_a_row_are_the_definition_of_the_whole_head(loss):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(31, 6, dtype=torch.float64)
    target, lengths = torch.randint(31, (9,)), torch.tensor([4, 0, 5])
    ref_logps = torch.tensor([-9.0, 0.0, -14.0], dtype=torch.float64)
    sign, row_weight = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options = {"z0": torch.tensor(0.4), "beta": 0.2, "loss": loss}
    wanted = definition.kto_head(
        hidden, weight, target, lengths, ref_logps=ref_logps, sign=sign, row_weight=row_weight, **options
    )
    found = sequence_logps(token_logps(hidden, weight, target, budget=1), lengths)
    torch.testing.assert_close(found, wanted.logps, rtol=1e-12, atol=1e-12)
    losses = kto_loss(found, ref_logps, sign, **options)
    torch.testing.assert_close((row_weight * losses).sum(), wanted.loss, rtol=1e-12, atol=1e-12)


# ---- TRL ----


@pytest.fixture(scope="module")
def trl_case():
    """Reference, and a direction in which the mean log-prob of TRL's mismatched pairs rises."""
    pytest.importorskip("trl")
    rows = [
        ("what is up?", " not much", True),
        ("say something nice", " you are great", True),
        ("2 + 2 =", " five", False),
        ("name a colour", " blue, or so they say", True),
        ("bye", " see you", False),
    ]
    return tiny_llama().eval(), [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in rows]


def trl_trainer(policy, reference, rows, folder, **settings):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        **settings,
    )
    return KTOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def ours_on_trls_rows(policy, reference, rows, loss):
    """Loss, raw KL and gradients on TRL's tokens and TRL's pairs, in several packed micro-batches."""
    size = len(rows)
    examples = examples_of(
        [row["prompt_ids"] for row in rows],
        [row["completion_ids"] for row in rows],
        [row["label"] for row in rows],
        [1.0] * size,
        range(size),
    )
    model = ScoringModel(copy.deepcopy(policy))
    other = ScoringModel(copy.deepcopy(reference))
    objective = Objective(loss=TABLE[loss], beta=0.3, transform=model.transform, logits_bytes=2**20, logits_dtype=None)
    own = np.arange(size)

    def batches(prompts, completions):
        return microbatches(
            examples,
            prompts,
            completions,
            Cutting(max_length=256, prompt_limit=128, tokens=80, packed=True),
            rank=0,
            ranks=1,
        )

    def reference_of(pairs):
        zeros, found = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for batch in pairs:
            labels = Labels(ref_logps=zeros, sign=zeros + 1, weight=zeros + 1)
            with torch.no_grad():
                found[batch.position] = batch_loss(other, batch, labels, zeros[0], objective).rows[:, 1]
        return found

    kl = torch.zeros(2, dtype=torch.float64)
    if loss == "kto":
        kl_batches = batches(own, np.roll(own, 1))
        kl, _ = survey(model, kl_batches, reference_of(kl_batches), [], objective)
    sign = torch.from_numpy(np.where(examples.desirable, 1.0, -1.0))
    main = batches(own, own)
    labels = Labels(ref_logps=reference_of(main), sign=sign, weight=torch.where(sign > 0, 1.3, 0.7).double())
    total = 0.0
    for batch in main:
        part = batch_loss(model, batch, labels, metrics.clamp_kl(kl), objective).loss
        (part / size).backward()
        total += float(part.detach()) / size
    gradients = {name: parameter.grad for name, parameter in model.lm.named_parameters()}
    return total, float(kl[0] / kl[1]) if kl[1] else 0.0, gradients


@pytest.mark.parametrize("direction", (1, -1), ids=("kl_above_0", "kl_clamped"))
@pytest.mark.parametrize("loss", LOSSES)
def test_trl_has_the_same_loss_and_gradients_on_the_same_pairs(trl_case, tmp_path, loss, direction):
    reference, rows = trl_case
    trainer = trl_trainer(copy.deepcopy(reference), copy.deepcopy(reference), rows, tmp_path, loss_type=loss)
    tokenised = list(trainer.train_dataset)
    policy = trainer.model
    # Up (or down) in the log-probs of the mismatched pairs, and a little at random: z0 is above 0 (or clamped).
    mismatched = zip(tokenised, np.roll(np.arange(len(rows)), 1), strict=True)
    sum(logp_uncut(policy, row["prompt_ids"], tokenised[k]["completion_ids"]) for row, k in mismatched).backward()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += direction * 0.02 * parameter.grad / parameter.grad.std() / len(rows)
            parameter += 0.002 * torch.randn_like(parameter)
    policy.zero_grad()

    found, kl_raw, gradients = ours_on_trls_rows(policy, reference, tokenised, loss)
    if loss == "kto":
        assert kl_raw * direction > 0.1
    wanted = trainer.compute_loss(policy, trainer.data_collator(tokenised))
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_error(gradients, {name: p.grad for name, p in policy.named_parameters()}) < 1e-5


def logp_uncut(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(completion)[:, None]).sum()

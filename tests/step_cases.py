"""What tests of a whole step share: rows, log-probs in plain PyTorch, and the trainer's step without an engine."""

import copy
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch

from kto_dist.data.batch import Cutting, Plan, step_kl_pairs, step_rows
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.objective import metrics
from kto_dist.objective.losses import LOSSES as TABLE
from kto_dist.objective.objective import Objective
from kto_dist.objective.taken import taken
from kto_dist.reference.pairs import RefLogps
from kto_dist.training.step import run_step, step_work

MAX_LENGTH, PROMPT_LIMIT = 24, 12
BUDGET_OF_LOGITS = 5 * 258 * 8  # five rows of fp64 logits


def examples_of(prompts, completions, desirable, weights, groups, probability=None):
    tokens = pa.list_(pa.int32())
    columns = {} if probability is None else {"probability": pa.array(probability, pa.float64())}
    table = pa.table(
        {
            "prompt_ids": pa.array(prompts, tokens),
            "completion_ids": pa.array(completions, tokens),
            "desirable": pa.array(desirable, pa.bool_()),
            "weight": pa.array(weights, pa.float64()),
            "prompt_group": pa.array(groups, pa.int64()),
            "prompt": pa.array([""] * len(prompts)),
            "completion": pa.array([""] * len(prompts)),
            **columns,
        }
    )
    return Examples(table, fingerprint="", report=None)


def some_examples(soft=False):
    """14 rows of 5 prompts; lengths such that some KL pairs are too long and lose tokens of both sides."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, 258, length).tolist() for length in (1, 4, 9, 15, 20)]
    groups = [row % 5 for row in range(14)]
    room = [MAX_LENGTH - len(prompts[group]) for group in groups]
    completions = [draw.integers(2, 258, draw.integers(1, size + 1)).tolist() for size in room]
    desirable = draw.permutation(14) % 3 > 0
    weights = draw.uniform(0.2, 3.0, 14)
    probability = None
    if soft:  # some of them are certain
        probability = np.where(np.arange(14) % 4 == 3, desirable, draw.uniform(0, 1, 14).round(2))
        desirable = probability >= 0.5
    return examples_of([prompts[group] for group in groups], completions, desirable, weights, groups, probability)


def perturbed(model, size, seed=5):
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device))
    return other


def cut_pair(prompt, completion):
    prompt, completion = list(prompt), list(completion)
    while len(prompt) + len(completion) > MAX_LENGTH:
        if len(prompt) > PROMPT_LIMIT:
            del prompt[0]
        else:
            del completion[-1]
    return prompt, completion


def logp(model, prompt, completion):
    """Sum over the completion's tokens of log pi(token | all before it)."""
    prompt, completion = cut_pair(prompt, completion)
    logits = model(input_ids=torch.tensor([prompt + completion], device=model.device)).logits[0].double()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for place, token in enumerate(completion, start=len(prompt)):
        row = logits[place - 1]
        total = total + row[token] - torch.log(torch.exp(row).sum())
    return total


class PlainPolicy:
    """What `run_step` asks of a policy, without an engine: gradients add up in the model."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("varlen")
        self.forward = ScoringModel(self.model)

    waits_in_forward = waits_in_backward = False

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr):
        return 0.0

    def gradients(self):
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


@lru_cache(maxsize=1)
def reference_logps(reference, examples):
    """Of every prompt with every completion."""
    prompts, completions = np.divmod(np.arange(len(examples) ** 2), len(examples))
    with torch.no_grad():
        values = [
            float(logp(reference, examples.prompt(j), examples.completion(k)))
            for j, k in zip(prompts, completions, strict=True)
        ]
    return RefLogps(examples, prompts, completions, np.array(values))


def through_the_trainer(models, examples, **options):
    """The step's metrics, the gradients, its rows and its KL pairs."""
    result, policy, rows, pairs = run_one(models, examples, **options)
    return metrics.step_metrics(result.sums, result.kl), policy.gradients(), rows, pairs


def run_one(models, examples, *, loss, packed, tokens, class_weights, beta, step=0, kl_pairs=None, **more):
    """The step's result, the policy, its rows and its KL pairs; `more` of the objective."""
    policy = PlainPolicy(models[0])
    plan = Plan(
        seed=3,
        rows=len(examples),
        global_batch=7,
        epochs=1.0,
        max_steps=None,
        kl_pairs_per_step=kl_pairs if loss == "kto" else 0,
        max_length=MAX_LENGTH,
        prompt_limit=PROMPT_LIMIT,
        units=taken(TABLE[loss], examples, "all")[0],
    )
    prepared = SimpleNamespace(
        plan=plan,
        objective=Objective(
            loss=TABLE[loss],
            beta=beta,
            transform=policy.forward.transform,
            logits_bytes=BUDGET_OF_LOGITS,
            logits_dtype=None,
            **more,
        ),
        train=examples,
        cutting=Cutting(max_length=MAX_LENGTH, prompt_limit=PROMPT_LIMIT, tokens=tokens, packed=packed),
        class_weights=class_weights,
    )
    refs = reference_logps(models[1], examples)
    result = run_step(step_work(prepared, refs, step, prepared.cutting), policy, prepared.objective, lr=1e-3)
    rows = step_rows(plan, step)
    pairs = list(zip(*step_kl_pairs(plan, step, rows, examples.prompt_group), strict=True))
    return result, policy, rows, pairs


def relative_error(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)

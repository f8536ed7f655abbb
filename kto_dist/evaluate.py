"""Held-out rows under the current policy: the training metrics without an update, and the AUC of the reward.

z0 is estimated over the held-out rows' own KL pairs, which depend on the seed alone, so every evaluation of a run, and
of any run on these rows, asks about the same pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kto_dist import comm, metrics
from kto_dist.batch import kl_pairs, microbatches
from kto_dist.causal_lm import Forward
from kto_dist.examples import Examples
from kto_dist.objective import Labels, Objective, kl_sums, loss_and_sums
from kto_dist.reference import RefLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """How pairs become micro-batches, for every pass of a run."""

    max_length: int
    prompt_limit: int
    budget: int
    # tokens of one micro-batch
    packed: bool


def cut_pairs(examples: Examples, prompts: np.ndarray, completions: np.ndarray, cutting: Cutting):
    """This rank's micro-batches of a list of pairs."""
    return microbatches(
        examples,
        prompts,
        completions,
        max_length=cutting.max_length,
        prompt_limit=cutting.prompt_limit,
        budget=cutting.budget,
        packed=cutting.packed,
        rank=comm.rank(),
        ranks=comm.world_size(),
    )


def labels_of(
    examples: Examples, rows: np.ndarray, ref_logps: np.ndarray, class_weights: tuple[float, float]
) -> Labels:
    """`class_weights`: (undesirable, desirable)."""
    desirable = examples.desirable[rows]
    weight = np.asarray(class_weights)[desirable.astype(int)] * examples.weights[rows]
    device = comm.device()
    return Labels(
        ref_logps=torch.from_numpy(ref_logps).to(device),
        sign=torch.from_numpy(np.where(desirable, 1.0, -1.0)).to(device),
        weight=torch.from_numpy(weight).to(device),
    )


def heldout_pairs(seed: int, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    return kl_pairs((seed, 2), np.arange(len(examples)), examples.prompt_group)


@torch.no_grad()
def evaluate_rows(
    forward: Forward,
    examples: Examples,
    refs: RefLogps,
    *,
    seed: int,
    objective: Objective,
    cutting: Cutting,
    class_weights: tuple[float, float],
) -> dict[str, float]:
    """Collective. `loss`, `kl`, `rewards/*`, `accuracy/*` and the like over all rows, and `auc`."""
    rows = np.arange(len(examples))
    prompts, completions = heldout_pairs(seed, examples)
    kl = torch.zeros(2, dtype=torch.float64, device=comm.device())
    if objective.loss == "kto":
        batches = cut_pairs(examples, prompts, completions, cutting)
        pair_refs = torch.from_numpy(refs(prompts, completions)).to(comm.device())
        kl = comm.sum_(kl_sums(forward, batches, pair_refs, objective))
    z0 = metrics.clamp_kl(kl)

    labels = labels_of(examples, rows, refs(rows, rows), class_weights)
    sums = metrics.empty_sums(comm.device())
    ratios = torch.zeros(rows.size, dtype=torch.float64, device=comm.device())
    for batch in cut_pairs(examples, rows, rows, cutting):
        batch = batch.to(comm.device())
        _, batch_sums, ratio = loss_and_sums(forward, batch, labels, z0, objective)
        sums += batch_sums
        ratios[batch.position] = ratio
    result = metrics.step_metrics(comm.sum_(sums), kl)
    area = metrics.auc(comm.sum_(ratios), labels.sign > 0)
    return result if area is None else result | {"auc": area}

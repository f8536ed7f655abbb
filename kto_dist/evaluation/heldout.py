"""Held-out rows under the current policy: the training metrics without an update, and the AUC of the reward.

z0 is estimated over the held-out rows' own KL pairs, which depend on the seed alone, so every evaluation of a run, and
of any run on these rows, asks about the same pairs.
"""

import numpy as np
import torch

from kto_dist.base import comm
from kto_dist.data.batch import Cutting, heldout_pairs, microbatches
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import Forward
from kto_dist.objective import metrics
from kto_dist.objective.objective import Objective, kl_sums, labels_of, loss_and_sums
from kto_dist.reference.scoring import RefLogps


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
        batches = microbatches(examples, prompts, completions, cutting, rank=comm.rank(), ranks=comm.world_size())
        pair_refs = torch.from_numpy(refs(prompts, completions)).to(comm.device())
        kl = comm.sum_(kl_sums(forward, batches, pair_refs, objective))
    z0 = metrics.clamp_kl(kl)

    labels = labels_of(examples, rows, refs(rows, rows), class_weights, comm.device())
    sums = metrics.empty_sums(comm.device())
    ratios = torch.zeros(rows.size, dtype=torch.float64, device=comm.device())
    for batch in microbatches(examples, rows, rows, cutting, rank=comm.rank(), ranks=comm.world_size()):
        batch = batch.to(comm.device())
        _, batch_sums, ratio = loss_and_sums(forward, batch, labels, z0, objective)
        sums += batch_sums
        ratios[batch.position] = ratio
    result = metrics.step_metrics(comm.sum_(sums), kl)
    area = metrics.auc(comm.sum_(ratios), labels.sign > 0)
    return result if area is None else result | {"auc": area}

"""Held-out rows under the current policy: the training metrics without an update, and the AUC of the reward.

z0 is estimated over the held-out rows' own KL pairs, which depend on the seed alone, so every evaluation of a run, and
of any run on these rows, asks about the same pairs.
"""

import numpy as np
import torch

from kto_dist.base import comm
from kto_dist.data.batch import Cutting, heldout_pairs, microbatches, pair_lengths
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import Forward
from kto_dist.model.memory import attempt
from kto_dist.objective import metrics
from kto_dist.objective.objective import Objective, kl_sums, labels_of, loss_and_rows
from kto_dist.reference.pairs import RefLogps


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
    again: bool = True,
) -> dict[str, float]:
    """Collective. `loss`, `kl`, `rewards/*`, `accuracy/*` and the like over all rows, and `auc`.

    Raises `OutOfMemory` on all ranks where one of them ran out of it, unless `again` is false: where ranks wait for
    each other in a forward.
    """
    device, rank, ranks = comm.device(), comm.rank(comm.DATA), comm.size(comm.DATA)
    rows = np.arange(len(examples))
    prompts, completions = heldout_pairs(seed, examples)
    kl = torch.zeros(2, dtype=torch.float64, device=device)
    if objective.loss.has_z0:
        batches = microbatches(examples, prompts, completions, cutting, rank=rank, ranks=ranks)
        pair_refs = torch.from_numpy(refs(prompts, completions)).to(device)
        own = attempt(lambda: kl_sums(forward, batches, pair_refs, objective), "the evaluation's KL pairs", again=again)
        kl = comm.sum_(own, comm.DATA)
    z0 = metrics.clamp_kl(kl)

    labels = labels_of(examples, rows, refs(rows, rows), class_weights)

    def score_rows() -> torch.Tensor:
        found, on_device = torch.zeros(rows.size, 2, dtype=torch.float64, device=device), labels.to(device)
        for batch in microbatches(examples, rows, rows, cutting, rank=rank, ranks=ranks):
            batch = batch.to(device)
            found.index_copy_(0, batch.position, loss_and_rows(forward, batch, on_device, z0, objective)[1])
        return found

    found = comm.sum_(attempt(score_rows, "the evaluation's forwards", again=again), comm.DATA)
    losses, logps = found.cpu().unbind(1)
    kept = pair_lengths(examples, rows, rows, cutting.max_length, cutting.prompt_limit)[1]
    table = metrics.row_table(
        losses=losses,
        logps=logps,
        ref_logps=labels.ref_logps,
        sign=labels.sign,
        weight=labels.weight,
        z0=z0.cpu(),
        beta=objective.beta,
        tokens=torch.from_numpy(kept),
    )
    result = metrics.step_metrics(metrics.class_sums(table, labels.sign), kl)
    area = metrics.auc(logps - labels.ref_logps, labels.sign > 0)
    return result if area is None else result | {"auc": area}

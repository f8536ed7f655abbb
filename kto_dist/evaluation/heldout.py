"""Held-out rows under a model: their log-probs, and what the objective makes of them. `figures.py` sums that up.

In:  log-probs of the model and of the reference by pair, each scored now (`under`) or ahead (`reference.RefLogps`).
Out: `Evaluated`.

z0 is estimated over the held-out rows' own KL pairs, which depend on the seed alone, so every evaluation of a run, and
of any run on these rows, asks about the same pairs.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kto_dist.base import comm
from kto_dist.base.signals import Interrupted
from kto_dist.data.batch import Cutting, heldout_pairs, microbatches
from kto_dist.data.examples import Examples
from kto_dist.evaluation.figures import Evaluated
from kto_dist.model.causal_lm import Forward, completion_logps
from kto_dist.model.memory import attempt
from kto_dist.objective import metrics
from kto_dist.objective.losses import Loss
from kto_dist.objective.objective import Goal, Objective, labels_of, tables_of

Logps = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(P,) rows that give the prompt, (P,) rows that give the completion -> (P,) fp64 log-probs."""


def evaluate_rows(
    model: Logps,
    reference: Logps,
    examples: Examples,
    *,
    seed: int,
    loss: Loss,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    units: np.ndarray | None = None,  # (U, unit) rows that the loss takes, as in `data.batch.Plan`; None: all
    class_weights: tuple[float, float],
    among: np.ndarray | None = None,  # (S,) rows, in order, that are looked at; None: all
) -> Evaluated:
    """What the objective makes of the rows: no model is run but by `model` and `reference`."""
    rows = np.arange(len(examples)) if among is None else among
    prompts, completions = heldout_pairs(seed, examples) if loss.has_z0 else (rows[:0], rows[:0])
    here = np.isin(prompts, rows)
    prompts, completions = prompts[here], completions[here]
    if units is not None:
        units = np.searchsorted(rows, units[np.isin(units, rows).all(1)])
    tokens = torch.tensor(examples.completion_lengths)
    ratios = model(prompts, completions) - reference(prompts, completions) if prompts.size else np.zeros(0)
    kl = torch.from_numpy(ratios)
    z0 = metrics.clamp_kl(torch.stack([kl.sum(), torch.tensor(float(kl.numel()), dtype=torch.float64)]))

    goal = Goal(loss=loss, beta=beta, label_smoothing=label_smoothing, sft_weight=sft_weight)
    logps, refs = torch.from_numpy(model(rows, rows)), reference(rows, rows)
    tokens = tokens[rows]
    taken = np.arange(rows.size) if units is None else units.ravel()
    labels = labels_of(examples, rows[taken], refs[taken], class_weights, goal)
    tables = tables_of(goal, labels, logps[taken], z0, tokens[taken])
    of_loss, sign, counted = tables.sum(0), labels.sign, None
    if units is not None:
        sign = torch.from_numpy(np.where(examples.desirable[rows], 1.0, -1.0))
        tables = _whatever_the_loss(examples, rows, logps, torch.from_numpy(refs), z0, beta)
        counted = np.zeros(rows.size, bool)
        if loss.unit == 1:
            counted[taken] = True
            for quantity in map(metrics.QUANTITIES.index, ("weight", "loss", "saturated")):
                tables[1, taken, quantity] = of_loss[:, quantity]
    return Evaluated(
        table=tables.sum(0),
        sign=sign,
        soft=tables if examples.is_soft else None,
        prompts=examples.prompt_group[rows],
        kl=kl,
        kl_rows=np.searchsorted(rows, prompts),
        beta=beta,
        counted=counted,
        pairs=units if units is not None and loss.unit > 1 else np.zeros((0, 2), np.int64),
        pair_losses=_of_units(of_loss, loss.unit) if loss.unit > 1 else torch.zeros(0),
    )


def _of_units(table: Tensor, unit: int) -> Tensor:  # (U * unit, Q) -> (U,)
    """The loss of each unit: what its rows have of it by themselves, as an SFT term, counts as in a step's mean."""
    return table[:, metrics.QUANTITIES.index("loss")].view(-1, unit).mean(1)


def _whatever_the_loss(
    examples: Examples,
    rows: np.ndarray,  # (S,)
    logps: Tensor,  # (S,)
    refs: Tensor,  # (S,)
    z0: Tensor,
    beta: float,
) -> Tensor:
    """(2, S, Q) what every model can be asked about rows that its loss does not take: all but the loss."""

    def as_class(desirable: bool) -> Tensor:
        share = torch.tensor(examples.probability[rows] if desirable else 1 - examples.probability[rows])
        return metrics.row_table(
            losses=torch.zeros_like(logps),
            weight=share,
            logps=logps,
            ref_logps=refs,
            sign=torch.full_like(logps, 1.0 if desirable else -1.0),
            z0=z0,
            beta=beta,
            tokens=torch.tensor(examples.completion_lengths[rows]),
            share=share,
        )

    return torch.stack([as_class(False), as_class(True)])


def under(
    forward: Forward,
    examples: Examples,
    objective: Objective,
    cutting: Cutting,
    *,
    again: bool = True,
    stop: Callable[[], bool] | None = None,
) -> Logps:
    """The policy's log-probs as it is, divided among the ranks; what it returns is collective.

    It raises `OutOfMemory` on all ranks where one of them ran out of it, unless `again` is false: where ranks wait for
    each other in a forward. `stop`: is asked before each forward, and where it is true on one rank, all of them raise
    `Interrupted`.
    """
    device = comm.device()

    def stopped() -> bool:
        if stop is None:
            return False
        # a rank that waits for nobody may stop before the others
        return stop() if again else comm.any_(stop())

    @torch.no_grad()
    def logps(prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
        def own() -> torch.Tensor:
            found = torch.zeros(prompts.size, dtype=torch.float64, device=device)
            parts = microbatches(
                examples, prompts, completions, cutting, rank=comm.rank(comm.DATA), ranks=comm.size(comm.DATA)
            )
            for batch in parts:
                if stopped():
                    break
                batch = batch.to(device)
                values = completion_logps(
                    forward, batch, objective.transform, objective.logits_bytes, objective.logits_dtype
                )
                found.index_copy_(0, batch.position, values)
            return found

        found = attempt(own, "the evaluation's forwards", again=again)
        if stop is not None and comm.any_(stop()):
            raise Interrupted
        return comm.sum_(found, comm.DATA).cpu().numpy()

    return logps

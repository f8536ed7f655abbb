"""From a step's micro-batches to z0 and to the loss, with the sums that the metrics need.

Knows a model only as something to call, and nothing of ranks: what is summed here is this rank's share. The caller
adds up over ranks and divides.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from kto_kernels import LOSSES as KERNELS
from kto_kernels import LogitTransform, kto_head, kto_loss
from torch import Tensor

from kto_dist.data.batch import MicroBatch
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import Forward, logps_head, score
from kto_dist.model.profile import part
from kto_dist.model.router import Routing, counting, weighing
from kto_dist.objective import metrics
from kto_dist.objective.losses import Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is minimised, as a function of log-probs."""

    loss: Loss
    beta: float
    label_smoothing: float = 0.0
    """The chance that a pair is the other way round."""
    sft_weight: float = 0.0
    """Of the mean over desirable rows of -log-prob a token, beside the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective(Goal):
    """And how it is computed."""

    transform: LogitTransform
    logits_bytes: int | None
    """Memory that the LM head's logits may take at a time; None: by the device."""
    logits_dtype: torch.dtype | None
    """None: fp32 where the device's matmul gives it."""
    routing: Routing | None = None
    """Of a mixture of experts whose load is balanced; None: there is nothing to add."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is known of P pairs ahead of the forward; `MicroBatch.position` points into it."""

    ref_logps: Tensor
    """(P,) fp64"""
    sign: Tensor
    """(P,) fp64, +1 desirable, -1 undesirable"""
    weight: Tensor
    """(P,) fp64, class weight times row weight; a pair's rows have one. Over the tokens where the loss is per token."""
    sft: Tensor | None = None
    """(P,) fp64, weight of a row's -logp beside the loss; None: nothing"""
    share: Tensor | None = None
    """(P,) fp64, 0.5 to 1: the probability of `sign`, where labels are probabilities; `weight` has it in it. None: 1"""
    other: Tensor | None = None
    """(P,) fp64, weight of a row's loss with the other sign: of the other class, times 1 - `share`. None: nothing"""

    def to(self, device: torch.device) -> "Labels":
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in given.items()}
        return Labels(**moved)

    def flipped(self) -> "Labels":
        """The same rows with the other of their two labels, where labels are probabilities."""
        assert self.share is not None and self.other is not None
        return replace(self, sign=-self.sign, weight=self.other, share=1 - self.share, other=self.weight)


def labels_of(
    examples: Examples,
    rows: np.ndarray,  # (P,) all rows over which the loss is a mean, of each unit one after the other
    ref_logps: np.ndarray,  # (P,)
    class_weights: tuple[float, float],  # (undesirable, desirable)
    goal: Goal,
) -> Labels:
    desirable, own = examples.desirable[rows], examples.weights[rows]
    tokens = np.maximum(examples.completion_lengths[rows], 1)
    by_class = np.asarray(class_weights)
    weight, share, other = by_class[desirable.astype(int)] * own, None, None
    probability = examples.probability[rows]
    if examples.is_soft and goal.loss.takes == "desirable":
        # what is learned of an answer that may be a bad one is as much less
        desirable, weight = np.ones(rows.size, bool), probability * (by_class[1] * own)
    elif examples.is_soft:
        share = np.where(desirable, probability, 1 - probability)
        weight, other = share * weight, (1 - share) * (by_class[1 - desirable.astype(int)] * own)
    if (unit := goal.loss.unit) > 1:  # a pair is worth what the weaker of its labels is
        weight = np.repeat(weight.reshape(-1, unit).min(1), unit)
    if goal.loss.per_token:
        weight = weight / tokens
    sft = None
    if goal.sft_weight:
        # the mean is over desirable rows, where the step's is over all
        each = goal.sft_weight * rows.size / (probability.sum() or 1.0)
        sft = torch.from_numpy(probability * (each * own / tokens))
    return Labels(
        ref_logps=torch.from_numpy(ref_logps),
        sign=torch.from_numpy(np.where(desirable, 1.0, -1.0)),
        weight=torch.from_numpy(weight),
        sft=sft,
        share=None if share is None else torch.from_numpy(share),
        other=None if other is None else torch.from_numpy(other),
    )


@torch.no_grad()
def survey(
    forward: Forward,
    kl_batches: Iterable[MicroBatch],
    kl_refs: Tensor,  # (K,) of all KL pairs
    batches: Iterable[MicroBatch],  # of the rows, which are run where there are no KL pairs to count experts' load on
    objective: Objective,
) -> tuple[Tensor, Tensor | None]:
    """What the whole step depends on, this rank's share: sum and count of log pi - log pi_ref over its KL pairs, (2,)
    fp64; and with a mixture of experts the routings of its tokens, (L, E) fp64."""
    total = torch.zeros(2, dtype=torch.float64, device=kl_refs.device)
    count = None if objective.routing is None else counting(objective.routing.top_k)
    counts = None
    for batch in kl_batches:
        batch = batch.to(kl_refs.device)
        head = logps_head(batch, objective.transform, objective.logits_bytes, objective.logits_dtype)
        logps = score(forward, batch, head, count)
        if count is not None:
            logps, own = logps
            counts = own if counts is None else counts + own
        total[0] += (logps - kl_refs[batch.position]).sum()
        total[1] += logps.numel()
    for batch in batches if count is not None and counts is None else ():
        _, own = score(forward, batch.to(kl_refs.device), lambda hidden, weight, bias: hidden.new_zeros(()), count)
        counts = own if counts is None else counts + own
    return total, counts


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """What one micro-batch of S sequences adds to a step."""

    loss: Tensor
    """() sum of weighted losses: divide the sum over all micro-batches by the rows of the step"""
    rows: Tensor
    """(S, 2) fp64 loss and log-prob of each, without gradient"""
    router: Tensor | None
    """() sum over routers and tokens of load times probability (`router.weighing`)"""


def batch_loss(
    forward: Forward,
    batch: MicroBatch,  # on the device
    labels: Labels,
    z0: Tensor,  # () fp64
    objective: Objective,
    load: Tensor | None = None,  # (E,) of a mixture of experts; None: even
) -> BatchLoss:
    """Forward and head of a micro-batch, with the gradient to come."""
    ref_logps, sign, weight = (getattr(labels, name)[batch.position] for name in ("ref_logps", "sign", "weight"))
    nll_weight, other_weight = (
        None if values is None else values[batch.position] for values in (labels.sft, labels.other)
    )
    if objective.label_smoothing:
        # (1 - e) f(m) + e f(-m) = f(m) + e beta m for f = -log sigmoid, and m is a sum of log-probs; both rows of a
        # pair carry its loss
        tilt = -objective.loss.unit * objective.label_smoothing * objective.beta * weight * sign
        nll_weight = tilt if nll_weight is None else nll_weight + tilt

    def head(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with part("the head (within the forwards)"):
            result = kto_head(
                hidden,
                lm_head,
                batch.target,
                batch.lengths,
                ref_logps=ref_logps,
                sign=sign,
                row_weight=weight,
                z0=z0,
                beta=objective.beta,
                loss=objective.loss.name,
                nll_weight=nll_weight,
                other_weight=other_weight,
                bias=bias,
                transform=objective.transform,
                budget=objective.logits_bytes,
                logits_dtype=objective.logits_dtype,
            )
        # plain tensors: ZeRO-3 hooks into whatever a module returns
        return result.loss, result.logps, result.losses

    router = None
    if objective.routing is None:
        loss, logps, losses = score(forward, batch, head)
    else:
        (loss, logps, losses), router = score(forward, batch, head, weighing(load))
    rows = torch.stack([losses.detach(), logps.detach()], dim=1).double()
    return BatchLoss(loss=loss, rows=rows, router=router)


def table_of(
    goal: Goal,
    labels: Labels,  # (S,) on the CPU, of whole units
    logps: Tensor,  # (S,) fp64
    z0: Tensor,  # () fp64
    tokens: Tensor,  # (S,) completion tokens
    losses: Tensor | None = None,  # (S,) fp64, unweighted, as the head gave them; None: made of the log-probs
    rounding: float = 0.0,
) -> Tensor:  # (S, Q) fp64, `metrics.QUANTITIES` of each row
    """What is known of rows once their log-probs are, as what `labels.sign` says they are; `rounding` as in
    `metrics.row_table`. Where labels are probabilities, the share of each row that belongs to its sign."""
    kind, beta = KERNELS[goal.loss.name], goal.beta
    if losses is None:
        losses = kto_loss(logps, labels.ref_logps, labels.sign, z0=z0, beta=beta, loss=kind.name, lengths=tokens)
    saturated = kind.saturated(losses)
    if goal.label_smoothing:
        margin = kind.by_sequence(kind.by_unit(labels.sign * (logps - labels.ref_logps)))
        losses = losses + goal.label_smoothing * beta * margin
    return metrics.row_table(
        losses=losses,
        weight=labels.weight,
        logps=logps,
        ref_logps=labels.ref_logps,
        sign=labels.sign,
        z0=z0,
        beta=beta,
        tokens=tokens,
        saturated=saturated,
        # it is the desirable rows'
        beside=None if labels.sft is None else torch.where(labels.sign > 0, -labels.sft * logps, 0.0),
        rounding=rounding,
        share=labels.share,
    )


def tables_of(
    goal: Goal,
    labels: Labels,  # (S,) on the CPU, of whole units
    logps: Tensor,  # (S,) fp64
    z0: Tensor,  # () fp64
    tokens: Tensor,  # (S,)
    losses: Tensor | None = None,  # as in `table_of`
    rounding: float = 0.0,
) -> Tensor:  # (2, S, Q) fp64
    """`table_of` by class, undesirable and desirable: a row whose label is a probability counts to both by it."""
    tables = metrics.by_class(table_of(goal, labels, logps, z0, tokens, losses, rounding), labels.sign)
    if labels.other is None:
        return tables
    other = table_of(goal, labels.flipped(), logps, z0, tokens, rounding=rounding)
    return tables + metrics.by_class(other, -labels.sign)

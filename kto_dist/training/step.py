"""One optimizer step: survey, then descend.

1. `step_work`   which rows and KL pairs the step takes, cut into this rank's micro-batches, with their reference
                 log-probs: a function of its arguments alone, so that a thread can make the next step's ahead
2. survey        all KL forwards of all ranks, one reduction, one clamp: z0 is a constant from here on, and so is the
                 load of a mixture's experts
3. descend       forward, fused head and backward of every micro-batch, then one update
4. `StepResult`  read back from the device once
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.data.batch import Cutting, MicroBatch, microbatches, pair_lengths, step_kl_pairs, step_rows
from kto_dist.model.causal_lm import Forward
from kto_dist.model.memory import attempt, is_out_of_memory, more_room
from kto_dist.model.profile import part
from kto_dist.model.router import load_of
from kto_dist.objective import metrics
from kto_dist.objective.objective import Labels, Objective, batch_loss, labels_of, survey, tables_of
from kto_dist.reference.pairs import RefLogps
from kto_dist.training.prepare import PreparedTraining


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What a step takes, on the host. B rows and K KL pairs of all ranks; micro-batches of this rank."""

    step: int
    """From 0."""
    cutting: Cutting
    """How the micro-batches were cut."""
    rows: np.ndarray
    """(B,) rows of the training set."""
    labels: Labels
    """Of the rows."""
    lengths: np.ndarray
    """(B,) tokens of each row."""
    answers: np.ndarray
    """(B,) completion tokens of each row."""
    batches: Sequence[MicroBatch]
    kl_refs: Tensor
    """(K,) fp64"""
    kl_lengths: np.ndarray
    """(K,) tokens of each KL pair."""
    kl_answers: np.ndarray
    """(K,) completion tokens of each KL pair."""
    kl_batches: Sequence[MicroBatch]


def step_work(prepared: PreparedTraining, refs: RefLogps, step: int, cutting: Cutting) -> StepWork:
    """Pure: no collectives, no device."""
    plan, examples = prepared.plan, prepared.train
    rows = step_rows(plan, step)
    prompts, completions = step_kl_pairs(plan, step, rows, examples.prompt_group)

    def cut(left: np.ndarray, right: np.ndarray, unit: int) -> Sequence[MicroBatch]:
        rank, ranks = comm.rank(comm.DATA), comm.size(comm.DATA)
        batches = microbatches(examples, left, right, cutting, rank=rank, ranks=ranks, unit=unit)
        return [batch.pinned() for batch in batches]

    prompt_kept, kept = pair_lengths(examples, rows, rows, cutting.max_length, cutting.prompt_limit)
    kl_prompt_kept, kl_kept = pair_lengths(examples, prompts, completions, cutting.max_length, cutting.prompt_limit)
    return StepWork(
        step=step,
        cutting=cutting,
        rows=rows,
        labels=labels_of(examples, rows, refs(rows, rows), prepared.class_weights, prepared.objective),
        lengths=prompt_kept + kept,
        answers=kept,
        batches=cut(rows, rows, plan.unit),
        kl_refs=torch.from_numpy(refs(prompts, completions)),
        kl_lengths=kl_prompt_kept + kl_kept,
        kl_answers=kl_kept,
        kl_batches=cut(prompts, completions, 1) if prompts.size else [],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did, over all ranks; the same on each of them."""

    step: int
    """Updates done: the first step's result says 1."""
    rows: np.ndarray
    """(B,) rows of the training set."""
    table: Tensor
    """(B, Q) fp64 on the CPU: `metrics.QUANTITIES` of each row."""
    sums: Tensor
    """(2, Q) fp64: the table's sums by class."""
    kl: Tensor
    """(2,) fp64: sum and count of log-ratios over the KL pairs."""
    tokens: int
    """Of the rows; KL pairs apart."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    routed: "Routed | None" = None
    """Of a mixture of experts whose load is balanced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """How a step's tokens were divided among experts."""

    loss: float
    """The loss that balances them, without its coefficient."""
    counts: Tensor
    """(L, E) fp64 on the CPU: routings to each expert by each router, where they were counted."""


class Engine(Protocol):
    """What a step needs of `model.engines.Policy`."""

    forward: Forward

    @property
    def waits_in_forward(self) -> bool: ...

    @property
    def waits_in_backward(self) -> bool: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, lr: float) -> Tensor | float: ...


class Start(Protocol):
    """What is asked before the first update: `training.start.StartCheck`."""

    @property
    def limit(self) -> float:
        """Nats per square root of a row's tokens, of what is rounding."""

    def check(self, work: StepWork, objective: Objective, losses: Tensor, logps: Tensor) -> None:
        """Collective. `losses`, `logps`: (B,) of the step's rows."""


def run_step(
    work: StepWork,
    policy: Engine,
    objective: Objective,
    *,
    lr: float,
    start: Start | None = None,
) -> StepResult:
    """Collective. One update, after `start` was given the rows' log-probs, (B,), and had nothing against it.

    Raises `OutOfMemory` on all ranks where one of them ran out of it and the step can be done again.
    """
    device = comm.device()
    kl, counts = attempt(
        lambda: _survey(work, policy, objective, device), "the KL forwards", again=not policy.waits_in_forward
    )
    kl = comm.sum_(kl, comm.DATA)
    counts = comm.sum_(counts, comm.DATA) if counts is not None and counts.numel() else None
    z0 = metrics.clamp_kl(kl)
    found, router = attempt(
        lambda: _descend(work, policy, objective, z0, counts, device),
        "the forwards and backwards",
        again=not policy.waits_in_backward,
    )
    found = comm.sum_(found, comm.DATA)
    if start is not None:
        start.check(work, objective, *found.cpu().unbind(1))
    norm = torch.as_tensor(_update(policy, lr), dtype=torch.float64)
    parts = [found.flatten(), kl, norm.to(device).reshape(1)]
    if counts is not None:
        parts += [comm.sum_(router, comm.DATA).reshape(1), counts.flatten()]
    # the step's one wait for the device
    read = torch.cat(parts).cpu()
    read, (kl_sum, kl_count, grad_norm), more = read.tensor_split((found.numel(), found.numel() + 3))
    losses, logps = read.reshape(-1, 2).unbind(1)
    kl = torch.stack([kl_sum, kl_count])
    tokens = torch.from_numpy(work.answers)
    rounding = 0.0 if start is None else start.limit
    tables = tables_of(objective, work.labels, logps, metrics.clamp_kl(kl), tokens, losses, rounding)
    return StepResult(
        step=work.step + 1,
        rows=work.rows,
        table=tables.sum(0),
        sums=tables.sum(1),
        kl=kl,
        tokens=int(work.lengths.sum()),
        grad_norm=float(grad_norm),
        learning_rate=lr,
        routed=None if counts is None else Routed(loss=float(more[0]), counts=more[1:].reshape(counts.shape)),
    )


def _survey(work: StepWork, policy: Engine, objective: Objective, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(2,) sum and count over this rank's KL pairs: z0 belongs to the whole step, so this comes first. And (L, E)
    routings of a mixture of experts."""
    with part("KL forwards"):
        return survey(policy.forward, work.kl_batches, work.kl_refs.to(device), work.batches, objective)


def _descend(
    work: StepWork,
    policy: Engine,
    objective: Objective,
    z0: Tensor,
    counts: Tensor | None,  # (L, E) routings of the whole step
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(B, 2) loss and log-prob of this rank's rows, 0 elsewhere, and () its share of the loss that balances experts;
    the gradients wait in the engine for the update."""
    labels = work.labels.to(device)
    found = torch.zeros(work.rows.size, 2, dtype=torch.float64, device=device)
    router = torch.zeros((), dtype=torch.float64, device=device)
    load, each = None, 0.0
    if objective.routing is not None and counts is not None:
        load = load_of(counts, objective.routing.top_k)
        routers, experts = counts.shape
        each = experts / (routers * int(work.lengths.sum()))
    for number, batch in enumerate(work.batches):
        batch = batch.to(device)
        with part("forwards"):
            own = batch_loss(policy.forward, batch, labels, z0, objective, load)
        loss = own.loss / work.rows.size
        if objective.routing is not None and own.router is not None and load is not None:
            share = own.router * each
            loss = loss + objective.routing.coefficient * share
            router += share.detach()
        with part("backwards"):
            policy.backward(loss, last=number == len(work.batches) - 1)
        found.index_copy_(0, batch.position, own.rows)
    return found, router


def _update(policy: Engine, lr: float) -> Tensor | float:
    """Raises `UserError` where there is no memory for it, which fewer tokens would not mend."""
    try:
        with part("optimizer"):
            return policy.step(lr)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory in the optimizer's step, whose states (8 bytes a parameter) are sharded from "
            f"deepspeed.zero_stage 1 on: use more devices, a higher stage, or {more_room()}"
        ) from None

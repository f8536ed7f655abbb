"""What a run has to do, as lengths: of rows that are there, or of rows that are told by their means.

In:  a config and its rows, or means. Out: `Workload`, and `StepLoad`: the micro-batches of one step on the rank that
has most, cut by the very function that cuts them in training.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from kto_dist.base.errors import UserError
from kto_dist.data.batch import Plan, cut, pair_lengths
from kto_dist.data.examples import fit
from kto_dist.objective.losses import LOSSES
from kto_dist.training.config import Config
from kto_dist.training.prepare import Prepared

_SPREAD = 0.7
"""Of the lengths' logarithms, where their means alone are known: that of chats."""
_SAMPLE = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Lengths of R rows, of all or of a sample, and how many steps take how many."""

    prompts: np.ndarray
    """(R,) tokens, cut as in training."""
    answers: np.ndarray
    """(R,) tokens."""
    rows: int
    """That the run takes: of an epoch, a row of two pairs twice."""
    different: int
    """Of these, those that are no repeats."""
    global_batch: int
    steps: int
    epochs: float
    kl_pairs: int
    """Of a step."""
    unit: int
    """Rows that stay together."""
    max_length: int
    cut: float = 0.0
    """Share of rows above `max_length`, where only their mean lengths were given."""

    @property
    def longest(self) -> int:
        """Tokens of what a micro-batch must hold at the least."""
        return int(min(self.max_length, (self.prompts + self.answers).max())) * self.unit

    @property
    def reference_pairs(self) -> int:
        """Different ones, at the most: each row, and its KL pair of every epoch."""
        kl = min(self.kl_pairs, self.global_batch) * self.steps
        return min(self.different, self.global_batch * self.steps) + kl


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """Micro-batches of the rank that has most at each turn, and what all ranks have together."""

    batches: list[tuple[np.ndarray, int]]
    """(S,) tokens of each sequence, padding included, and the completion rows of all."""
    kl_batches: list[tuple[np.ndarray, int]]
    whole: tuple[np.ndarray, int]
    """Of the step, over all ranks, without padding."""
    kl_whole: tuple[np.ndarray, int]

    @property
    def tokens(self) -> int:
        """Of the rows, over all ranks."""
        return int(self.whole[0].sum())

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch that keeps something for a backward."""
        return max((int(lengths.sum()) for lengths, _ in self.batches), default=0)

    @property
    def most_rows(self) -> int:
        """Completion rows of a micro-batch, at the most."""
        return max((rows for _, rows in (*self.batches, *self.kl_batches)), default=0)


def of_rows(prepared: Prepared) -> Workload:
    """Of tokenised rows."""
    examples, plan = prepared.train, prepared.plan
    # desirable rows alone, or the rows of pairs, where the loss takes no others
    rows = np.arange(len(examples)) if plan.units is None else plan.units.ravel()
    if rows.size > _SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, _SAMPLE, replace=False))
    kept = pair_lengths(examples, rows, rows, plan.max_length, plan.prompt_limit)
    different = len(examples) if plan.units is None else int(np.unique(plan.units).size)
    return _workload(prepared.config, kept[0], kept[1], plan, different)


def of_means(config: Config, rows: int, prompt: float, completion: float) -> Workload:
    """Of rows of which the number and the mean lengths in tokens are known. Raises `UserError`."""
    for name, value in (("--rows", rows), ("--prompt-tokens", prompt), ("--completion-tokens", completion)):
        if not 1 <= value < math.inf:
            raise UserError(f"{name} ({value:g}) must be a number of 1 at least")
    draw = np.random.default_rng(0)
    count = min(rows, _SAMPLE)

    def lengths(mean: float) -> np.ndarray:
        drawn = draw.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
        # what is longer than any context is cut anyway
        return np.clip(np.rint(drawn), 1, 2**40).astype(np.int64)

    drawn = lengths(prompt), lengths(completion)
    prompts, answers = fit(*drawn, config.data.max_length, config.data.prompt_limit)
    shortened = float(np.mean(drawn[0] + drawn[1] > config.data.max_length))
    unit = LOSSES[config.objective.loss].unit
    if rows < unit:
        raise UserError(
            f"--rows ({rows}) must be at least {unit}, as objective.loss {config.objective.loss} takes pairs"
        )
    plan = Plan(
        seed=config.train.seed,
        rows=rows,
        global_batch=config.train.global_batch,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        kl_pairs_per_step=config.objective.kl_pairs_per_step,
        max_length=config.data.max_length,
        prompt_limit=config.data.prompt_limit,
    )
    return replace(_workload(config, prompts, answers, plan, rows), cut=shortened)


def _workload(config: Config, prompts: np.ndarray, answers: np.ndarray, plan: Plan, different: int) -> Workload:
    loss, batch = LOSSES[config.objective.loss], config.train.global_batch
    wanted = config.objective.kl_pairs_per_step
    return Workload(
        prompts=prompts,
        answers=answers,
        rows=plan.taken,
        different=different,
        global_batch=min(batch, plan.taken),
        steps=plan.steps,
        epochs=config.train.epochs,
        kl_pairs=(batch if wanted is None else wanted) if loss.has_z0 else 0,
        unit=loss.unit,
        max_length=config.data.max_length,
    )


def step_load(workload: Workload, ranks: int, tokens: int, *, packed: bool = True, multiple: int = 1) -> StepLoad:
    """Of a step of average rows. Of more ranks than `_CUT` so many are looked at, with their part of the rows.
    `multiple`: as `cut` has it."""
    cut_ranks = min(ranks, _CUT)
    # rounded up: of 4,100 rows on 4,096 ranks some have two, and the others wait
    units = -(-(workload.global_batch // workload.unit) * cut_ranks // ranks)
    rows, answers, kl, kl_answers = _rows(workload, workload.unit * max(1, units))
    whole, whole_answers, kl_whole, kl_whole_answers = _rows(workload, workload.global_batch)

    def fullest(lengths: np.ndarray, answers: np.ndarray, unit: int) -> list[tuple[np.ndarray, int]]:
        shares = cut(lengths, tokens=tokens, ranks=cut_ranks, packed=packed, unit=unit, multiple=multiple)
        # of each turn the first rank's is the largest
        return [(_run(lengths[batch], packed, multiple), int(answers[batch].sum())) for batch in shares[0]]

    return StepLoad(
        batches=fullest(rows, answers, workload.unit),
        kl_batches=fullest(kl, kl_answers, 1) if kl.size else [],
        whole=(whole, int(whole_answers.sum())),
        kl_whole=(kl_whole, int(kl_whole_answers.sum())),
    )


_CUT = 64


def _rows(workload: Workload, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and completion tokens of so many rows, (B,) each, and of their KL pairs, (K,) each."""
    size -= size % workload.unit
    chosen = _typical(workload, size)
    prompts, answers = workload.prompts[chosen], workload.answers[chosen]
    partners = np.roll(np.arange(size), 1)[: -(-workload.kl_pairs * size // workload.global_batch)]
    kl = np.minimum(prompts[: partners.size] + answers[partners], workload.max_length)
    return prompts + answers, answers, kl, np.minimum(answers[partners], kl)


def _typical(workload: Workload, size: int) -> np.ndarray:
    """(B,) rows at even quantiles of the lengths: a step of few drawn rows may be far from the mean."""
    lengths = workload.prompts + workload.answers
    order = np.argsort(lengths, kind="stable")
    places = ((np.arange(size) + 0.5) / size * order.size).astype(np.int64)
    return np.random.default_rng(0).permutation(order[places])


def _run(lengths: np.ndarray, packed: bool, multiple: int) -> np.ndarray:  # (S,) tokens
    """(S,) positions of each sequence of a micro-batch, as a forward has them."""
    if packed or not lengths.size:
        return lengths
    return np.full_like(lengths, -(-lengths.max() // multiple) * multiple)

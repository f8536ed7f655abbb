"""Which pairs' log-probs a run needs, and the log-probs found by pair.

In:  the plan and the rows. Out: `PairList`, what has to be known; `RefLogps`, what is known, for steps and evaluations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kto_dist.base import comm
from kto_dist.data.batch import Plan, heldout_pairs, step_kl_pairs, step_rows
from kto_dist.data.examples import Examples


def wanted_pairs(
    plan: Plan, train: Examples, say: Callable[[str], None] = lambda text: None
) -> tuple[np.ndarray, np.ndarray]:
    """Collective. (P,) rows that give the prompt, (P,) rows that give the completion, sorted, without repeats.

    A million rows are a second or two of drawing KL pairs, so every rank draws those of its share of the steps.
    """
    seen = np.zeros(plan.rows, dtype=bool)
    codes, waiting = [np.zeros(0, np.int64)], 0
    started = time.monotonic()
    for step in range(plan.steps):
        rows = step_rows(plan, step)
        seen[rows] = True
        if step % comm.world_size() == comm.rank():
            prompts, completions = step_kl_pairs(plan, step, rows, train.prompt_group)
            codes.append(prompts * plan.rows + completions)
            waiting += prompts.size
        if waiting > _MANY:  # a run of many epochs meets the same pairs again
            codes, waiting = [_distinct(np.concatenate(codes))], 0
        if step == _FEW:
            minutes = (time.monotonic() - started) / _FEW * plan.steps / 60
            if minutes > 1:
                say(f"drawing the KL pairs of {plan.steps:,} steps takes about {minutes:,.0f} minutes")
    own = np.flatnonzero(seen)
    code = _distinct(np.concatenate([own * plan.rows + own, *comm.gather(np.concatenate(codes))]))
    return code // plan.rows, code % plan.rows


# Pairs that are kept with repeats, and steps whose time tells that of all.
_MANY, _FEW = 2**22, 1000


def _distinct(code: np.ndarray) -> np.ndarray:
    """Sorted."""
    code.sort()
    return code[np.insert(code[1:] != code[:-1], 0, True)] if code.size else code


@dataclass(frozen=True, kw_only=True, slots=True)
class PairList:
    """Pairs of one data set that have to be known."""

    title: str
    """What the progress bar says."""
    examples: Examples
    prompts: np.ndarray
    """(P,) rows that give the prompt."""
    completions: np.ndarray
    """(P,) rows that give the completion."""


def training_pairs(plan: Plan, train: Examples, say: Callable[[str], None] = lambda text: None) -> PairList:
    """Collective. Every row that a step takes, and the KL pairs of the steps."""
    prompts, completions = wanted_pairs(plan, train, say)
    return PairList(title="training pairs", examples=train, prompts=prompts, completions=completions)


def evaluation_pairs(seed: int, heldout: Examples, *, with_z0: bool) -> PairList:
    """Every held-out row, and, for a loss with z0, their KL pairs."""
    rows = np.arange(len(heldout))
    prompts, completions = heldout_pairs(seed, heldout) if with_z0 else (rows[:0], rows[:0])
    return PairList(
        title="held-out pairs",
        examples=heldout,
        prompts=np.concatenate([rows, prompts]),
        completions=np.concatenate([rows, completions]),
    )


class RefLogps:
    """(prompt row, completion row) -> log-prob of the completion under the reference."""

    def __init__(self, examples: Examples, prompts: np.ndarray, completions: np.ndarray, logps: np.ndarray):
        code = prompts.astype(np.int64) * len(examples) + completions
        if not (code[1:] >= code[:-1]).all():  # those of `wanted_pairs` are sorted
            order = np.argsort(code, kind="stable")
            code, logps = code[order], logps[order]
        self._rows, self._code, self._logps = len(examples), code, logps

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) rows that give the prompt, (P,) rows that give the completion, of all that are known."""
        return self._code // self._rows, self._code % self._rows

    def __call__(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:  # (P,) fp64
        code = prompts.astype(np.int64) * self._rows + completions
        place = np.minimum(np.searchsorted(self._code, code), self._code.size - 1)
        assert (self._code[place] == code).all(), "a pair was not scored ahead"
        return self._logps[place]

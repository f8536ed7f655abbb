"""Held-out prompts that fit a budget of tokens: what is asked of a model while it trains.

In:  the rows, a seed and a budget. Out: the rows of some prompts, the same in every evaluation of a run.
"""

from dataclasses import dataclass, field

import numpy as np

from kto_dist.data.batch import heldout_pairs
from kto_dist.data.examples import Examples
from kto_dist.evaluation.heldout import Logps


def sample_of(examples: Examples, *, seed: int, tokens: int | None, with_z0: bool) -> np.ndarray | None:  # (S,)
    """Rows, in order; None where all of them fit. Prompts come with all of their rows, and their KL pairs count.

    Two prompts at the least, among them one of each class, so that the figures exist.
    """
    if tokens is None:
        return None
    names, group = np.unique(examples.prompt_group, return_inverse=True)
    group = group.ravel()
    cost = np.bincount(group, examples.prompt_lengths + examples.completion_lengths, names.size)
    if with_z0:
        prompts, completions = heldout_pairs(seed, examples)
        pairs = examples.prompt_lengths[prompts] + examples.completion_lengths[completions]
        cost += np.bincount(group[prompts], pairs, names.size)
    if cost.sum() <= tokens:
        return None
    order = np.random.default_rng([seed, 3]).permutation(names.size)
    up, down = (np.bincount(group, examples.desirable == wanted, names.size) > 0 for wanted in (True, False))
    first = [int(order[has[order].argmax()]) for has in (up, down) if has.any()]
    order = np.array([*dict.fromkeys([*first, *order.tolist()])])
    taken = max(2, int(np.searchsorted(cost[order].cumsum(), tokens, side="right")))
    return np.flatnonzero(np.isin(group, order[:taken]))


@dataclass
class Remembering:
    """Log-probs as `model` gives them, which can be had again without it."""

    model: Logps
    _seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __call__(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
        values = self.model(prompts, completions)
        self._seen.append((prompts, completions, values))
        return values

    def seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(P,) rows that give the prompt, rows that give the completion, log-probs."""
        prompts, completions, values = (np.concatenate(parts) for parts in zip(*self._seen, strict=True))
        return prompts, completions, values

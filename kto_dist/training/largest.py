"""The largest micro-batches that the steps of a plan can have: they are tried before the first one.

In:  the plan, the lengths of its rows or of its KL pairs, a `Cutting`. Out: those that fill one micro-batch the most.
"""

import numpy as np

from kto_dist.data.batch import Cutting, pair_lengths, unit_sizes
from kto_dist.reference.pairs import RefLogps
from kto_dist.training.prepare import PreparedTraining


def largest_rows(prepared: PreparedTraining, cutting: Cutting) -> np.ndarray:  # (S,)
    """Rows, of whole units."""
    plan, train = prepared.plan, prepared.train
    lengths = np.minimum(train.prompt_lengths + train.completion_lengths, cutting.max_length)
    units = np.arange(lengths.size)[:, None] if plan.units is None else plan.units
    return units[fullest(lengths[units], cutting, most=max(1, plan.global_batch // plan.unit))].ravel()


def largest_kl_pairs(
    prepared: PreparedTraining, refs: RefLogps, cutting: Cutting
) -> tuple[np.ndarray, np.ndarray]:  # (S,) rows that give the prompt, (S,) rows that give the completion
    """KL pairs of any steps, which may be longer than all rows; none for a loss without z0. `refs`: of the plan."""
    plan, (prompts, completions) = prepared.plan, refs.pairs()
    is_kl = prompts != completions
    prompts, completions = prompts[is_kl], completions[is_kl]
    kept = pair_lengths(prepared.train, prompts, completions, cutting.max_length, cutting.prompt_limit)
    most = plan.global_batch if plan.kl_pairs_per_step is None else plan.kl_pairs_per_step
    chosen = fullest((kept[0] + kept[1])[:, None], cutting, most=most)
    return prompts[chosen], completions[chosen]


def fullest(
    lengths: np.ndarray,  # (U, unit) tokens of each pair, of pairs that stay together
    cutting: Cutting,
    *,
    most: int,  # units of a step
) -> np.ndarray:  # places among the units
    """One micro-batch with as many tokens, padding counted, as any has; of equal ones that with the longest row."""
    if not lengths.size:
        return np.zeros(0, np.int64)
    sizes = unit_sizes(lengths, cutting.tokens, packed=cutting.packed, multiple=cutting.multiple)
    order = np.argsort(-sizes, kind="stable")
    if not cutting.packed:
        widths = np.maximum(1, sizes[order])
        # one whose longest row is the k-th has as many as there is room for, and as there are
        counts = np.minimum(np.minimum(most, cutting.tokens // widths), order.size - np.arange(order.size))
        first = int(np.argmax(counts * widths))
        return order[first : first + max(1, int(counts[first]))]
    chosen: list[int] = []
    left = cutting.tokens
    for place in order[:_LOOKED_AT].tolist():
        # what is too long for what is left makes room for a shorter one
        if sizes[place] <= left and len(chosen) < most:
            chosen.append(place)
            left -= int(sizes[place])
    return np.array(chosen, np.int64)


_LOOKED_AT = 20_000
"""Units, the longest first."""

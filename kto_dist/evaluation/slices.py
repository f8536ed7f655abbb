"""Held-out rows by what they are: the set that they come from, and the values of what they are sliced by."""

from collections.abc import Sequence

import numpy as np

from kto_dist.data.examples import Examples

LARGEST = 8
"""Values of a column that have figures of their own, the most frequent ones; the others share theirs."""
OTHERS = "(others)"


def sets_of(examples: Examples, names: Sequence[str]) -> np.ndarray | None:
    """(N,) the name of each row's set; None where sets are not told apart. `names`: of the sources that have names."""
    return np.array(names)[examples.source] if len(names) > 1 else None


def slices_of(examples: Examples, sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Column -> (N,) its value in each row, as text. `sources`: what the rows' sources are called."""
    found = {"prompt": by_length(examples.prompt_lengths)}
    if len(sources) > 1:
        found["source"] = np.array(sources)[examples.source]
    return found


def by_value(values: np.ndarray) -> list[tuple[str, np.ndarray]]:  # (N,) text -> (value, (N,) bool)
    """The rows of each value, the most frequent first; the rare ones are one."""
    names, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.lexsort((names, -counts))
    own = order if order.size <= LARGEST + 1 else order[:LARGEST]
    found = [(str(names[number]), place == number) for number in own]
    if own.size < order.size:
        found.append((OTHERS, ~np.isin(place, own)))
    return found


def by_length(tokens: np.ndarray) -> np.ndarray:  # (N,) -> (N,) text
    """Three parts of about equal size."""
    edges = np.unique(np.quantile(tokens, [1 / 3, 2 / 3], method="lower"))
    names = [f"up to {edge:,.0f} tokens" for edge in edges] + [f"over {edges[-1]:,.0f} tokens"]
    return np.array(names)[np.searchsorted(edges, tokens)]

"""Held-out rows by what they are: the set that they come from, and the values of what they are sliced by."""

from collections.abc import Sequence

import numpy as np

from kto_dist.base.languages import language_of
from kto_dist.data.examples import Examples

LARGEST = 8
"""Values of a column that have figures of their own, the most frequent ones; the others share theirs."""
OTHERS = "(others)"
NOTHING = "(none)"
"""Of a row that has no value."""
SURE = 0.9
"""Probability of a language below which an answer counts as of none that is known."""
_RARE = 0.01
"""Share of the rows below which a language that was told by the texts is likelier a mistake than a language."""
_CLASSIFIED = 20_000
"""Rows of which the language is told: two seconds' worth."""


def sets_of(examples: Examples, names: Sequence[str]) -> np.ndarray | None:
    """(N,) the name of each row's set; None where sets are not told apart. `names`: of the sources that have names."""
    return np.array(names)[examples.source] if len(names) > 1 else None


def slices_of(examples: Examples, sources: Sequence[str]) -> dict[str, np.ndarray]:
    """Column -> (N,) its value in each row, as text. `sources`: what the rows' sources are called.

    A column in which all rows have one value says nothing, and is left out. Where no column has the language, it is
    that of the answers' texts.
    """
    columns = examples.cuts()
    if "language" not in columns and "lang" not in columns and len(examples) <= _CLASSIFIED:
        columns["language"] = languages(examples)
    found = {"prompt": by_length(examples.prompt_lengths)}
    if len(sources) > 1:
        found["source"] = np.array(sources)[examples.source]
    for name, values in columns.items():
        if name not in found and len(np.unique(values)) > 1:
            found[name] = np.where(values == "", NOTHING, values)
    return found


def languages(examples: Examples) -> np.ndarray:  # (N,) ISO 639-1 codes as text; empty where it is not known
    """By the answers' texts; rare ones count as not known, and one alone is not told from what is not known."""
    told = np.array([language_of(examples.completion_text(row), SURE) or "" for row in range(len(examples))])
    names, place, counts = np.unique(told, return_inverse=True, return_counts=True)
    known = (counts >= _RARE * len(told)) & (names != "")
    return np.where(known[place.ravel()] & (known.sum() > 1), told, "")


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

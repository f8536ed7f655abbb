"""Which rows of a data set a loss takes, and in which units."""

import numpy as np

from kto_dist.data.config import Rule
from kto_dist.data.examples import Examples
from kto_dist.data.preference import Preferences, preferences
from kto_dist.objective.losses import Loss


def taken(loss: Loss, examples: Examples, rule: Rule) -> tuple[np.ndarray | None, Preferences | None]:
    """(U, unit) rows, None: all; and for a loss on pairs the account of what they were made of."""
    if loss.takes == "all":
        return None, None
    if loss.takes == "desirable":
        return np.flatnonzero(examples.probability > 0)[:, None], None
    found = preferences(examples, rule)
    return found.pairs, found

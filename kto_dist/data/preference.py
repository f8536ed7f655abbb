"""Pairs of a good and a bad answer to one prompt, for losses on pairs: those of the data, and what thumbs can give.

In:  tokenised rows and a rule. Out: `Preferences`: which rows make a pair, and what became of the others.

Rows that the data holds as a pair (chosen and rejected) stay that pair. Of all others, prompts are told apart by their
tokens before cutting, and a prompt gives pairs where it has a good and a bad answer. A function of rows and rule alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kto_dist.base.errors import UserError
from kto_dist.data.config import Rule
from kto_dist.data.examples import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """The pairs of one data set (P of them), and the account of its rows."""

    pairs: np.ndarray
    """(P, 2) int64 rows: chosen, rejected."""
    rule: Rule
    rows: int
    used: int
    """Rows that are in at least one pair."""
    given: int
    """Pairs that the data holds as such."""
    prompts: int
    """Prompts with a pair."""
    no_bad: int
    """Good answers whose prompt has no bad one."""
    no_good: int
    """Bad answers whose prompt has no good one."""
    by_rule: int
    """Rows that could make a pair, and that the rule leaves out."""
    twins: int
    """Rows left because their only partners have the same tokens: the same answer, rated both ways."""

    def to_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "pairs"}
        return {"pairs": len(self.pairs), **counts}

    def line(self) -> str:
        """For people."""
        left = {
            "good answers whose prompt has no bad one": self.no_bad,
            "bad answers whose prompt has no good one": self.no_good,
            f"rows by the rule ({self.rule})": self.by_rule,
            "rows whose answer was rated both ways": self.twins,
        }
        listed = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
        own = f", {self.given:,} of them pairs of the data" if self.given else ""
        return (
            f"{len(self.pairs):,} pairs of {self.prompts:,} prompts{own}, from {self.used:,} of {self.rows:,} rows"
            + (f"; left out: {listed}" if listed else "")
        )


def preferences(examples: Examples, rule: Rule) -> Preferences:
    """All pairs, in the order of their chosen rows."""
    rows, desirable = len(examples), examples.desirable
    partner = examples.pair
    given = np.flatnonzero((partner >= 0) & desirable)
    pairs = [np.stack([given, partner[given]], axis=1)]
    free = np.flatnonzero(partner < 0)
    no_bad = no_good = by_rule = twins = 0
    for members in _by_prompt(examples, free):
        good, bad = members[desirable[members]], members[~desirable[members]]
        if not (good.size and bad.size):
            no_bad, no_good = no_bad + good.size, no_good + bad.size
            continue
        chosen = _of_prompt(examples, good, bad, rule)
        left = np.setdiff1d(members, chosen)
        if len(chosen) and rule != "all":
            by_rule += left.size
        else:
            twins += left.size
        pairs.append(chosen)
    found = np.concatenate(pairs)
    same = _same_answer(examples, found)  # of the data's own pairs alone: the others differ
    twins, found = twins + 2 * int(same.sum()), found[~same]
    found = found[np.lexsort((found[:, 1], found[:, 0]))]
    return Preferences(
        pairs=found,
        rule=rule,
        rows=rows,
        used=np.unique(found).size,
        given=int((partner[found[:, 0]] >= 0).sum()),
        prompts=np.unique(examples.prompt_group[found[:, 0]]).size,
        no_bad=no_bad,
        no_good=no_good,
        by_rule=by_rule,
        twins=twins,
    )


def _by_prompt(examples: Examples, rows: np.ndarray) -> list[np.ndarray]:
    """Of the given rows, those of each prompt, each in the order of the data."""
    group = examples.prompt_group[rows]
    order = group.argsort(kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1) if rows.size else []


def _same_answer(examples: Examples, pairs: np.ndarray) -> np.ndarray:  # (P, 2) -> (P,) bool
    lengths = examples.completion_lengths[pairs]
    same = lengths[:, 0] == lengths[:, 1]
    for place in np.flatnonzero(same):
        chosen, rejected = (examples.completion(int(row)) for row in pairs[place])
        same[place] = np.array_equal(chosen, rejected)
    return same


def _of_prompt(examples: Examples, good: np.ndarray, bad: np.ndarray, rule: Rule) -> np.ndarray:  # (p, 2)
    """One prompt's pairs of answers that differ. Of equal weights the earlier row counts more."""
    if rule == "all":
        if good.size * bad.size > _MOST:
            raise UserError(
                f"a prompt with {good.size:,} good and {bad.size:,} bad answers gives {good.size * bad.size:,} pairs: "
                "set objective.pairs to one or best"
            )
        every = np.stack([np.repeat(good, bad.size), np.tile(bad, good.size)], axis=1)
        return every[~_same_answer(examples, every)]
    # the heaviest first: their votes say most
    good, bad = (rows[np.argsort(-examples.weights[rows], kind="stable")] for rows in (good, bad))
    left, found = bad.tolist(), []
    for chosen in good.tolist():
        differ = (place for place, row in enumerate(left) if not _same_answer(examples, np.array([[chosen, row]]))[0])
        place = next(differ, None)
        if place is not None:
            found.append((chosen, left.pop(place)))
            if rule == "best":
                break
    return np.array(found, np.int64).reshape(-1, 2)


_MOST = 10_000_000
"""Pairs of one prompt: far beyond what says anything new of it."""

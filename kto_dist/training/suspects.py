"""A step with a figure that is no number: which rows it came from, named by file and line, in a file of the run.

In:  the step's result. Out: `Suspects`: the rows, and how one knows that it was these.

What is asked first is what cannot be spoiled by other rows: a row's own log-probs. z0 is a mean over the step, so one
pair without a number takes the number from every row's loss; a gradient is a sum, and does not tell whose it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kto_dist.base.errors import UserError
from kto_dist.data.batch import step_kl_pairs
from kto_dist.data.sources import places_of
from kto_dist.objective import metrics
from kto_dist.record.run_folder import RunFolder, append_line
from kto_dist.training.prepare import PreparedTraining
from kto_dist.training.step import StepResult

LISTED = 100
"""Rows that stand in the file; the others are counted."""
_QUOTED = 400
"""Characters of a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspects:
    """Rows of one step."""

    why: str
    """What is known of them."""
    rows: tuple[int, ...]
    """Of the training set."""


def suspects(result: StepResult, prepared: PreparedTraining) -> Suspects:
    """Of a step of which a figure is not finite."""
    column = {name: result.table[:, number] for number, name in enumerate(metrics.QUANTITIES)}
    broken = {name: ~torch.isfinite(values).numpy() for name, values in column.items()}
    if broken["ref_logps"].any():
        return _of(result.rows[broken["ref_logps"]], "the reference's log-prob of each is no number")
    if broken["logps"].all():
        return _of(result.rows, "the log-prob of every row of the step is no number: the model's weights are none")
    if broken["logps"].any():
        why = "the model's log-prob of each is no number, and those of the step's other rows are"
        return _of(result.rows[broken["logps"]], why)
    if not torch.isfinite(result.kl).all():
        pairs = step_kl_pairs(prepared.plan, result.step - 1, result.rows, prepared.train.prompt_group)
        rows = np.unique(np.concatenate(pairs))
        return _of(rows, "z0 is no number, so one of their prompts with another one's answer has no log-prob")
    if broken["loss"].any():
        return _of(result.rows[broken["loss"]], "the loss of each is no number, and its log-probs are")
    far = column["reward"].abs().numpy()
    return _of(result.rows[np.argsort(-far, kind="stable")], "the gradient is no number, and no row tells whose it was")


def _of(rows: np.ndarray, why: str) -> Suspects:
    return Suspects(why=why, rows=tuple(rows.tolist()))


def note(found: Suspects, result: StepResult, prepared: PreparedTraining, folder: RunFolder) -> str:
    """Rank 0. Writes the rows into the run's folder; returns what is said of them. Raises `OSError`."""
    listed = found.rows[:LISTED]
    places = _places(prepared, listed)
    for row, place in zip(listed, places, strict=True):
        append_line(folder.bad_rows, _line(found, result, prepared, row, place))
    more = f" (the first {LISTED} of them)" if len(found.rows) > LISTED else ""
    count = "one row" if len(found.rows) == 1 else f"{len(found.rows):,} rows"
    return f"{count}, as {places[0]}: {found.why}; named in {folder.bad_rows}{more}"


def _places(prepared: PreparedTraining, rows: Sequence[int]) -> list[str]:
    try:
        return places_of(prepared.config.data.train_sources, [prepared.train.place(row) for row in rows])
    except UserError:  # a file that has gone since: the run ends for another reason
        return [f"training row {row}" for row in rows]


def _line(found: Suspects, result: StepResult, prepared: PreparedTraining, row: int, place: str) -> dict[str, Any]:
    train, here = prepared.train, np.flatnonzero(result.rows == row)
    own = result.table[int(here[0])].tolist() if here.size else [math.nan] * len(metrics.QUANTITIES)
    figures = dict(zip(metrics.QUANTITIES, own, strict=True))
    return {
        "step": result.step,
        "place": place,
        "row": row,
        "why": found.why,
        "desirable": bool(train.desirable[row]),
        "prompt_tokens": int(train.prompt_lengths[row]),
        "completion_tokens": int(train.completion_lengths[row]),
        # JSON has no word for what is no number
        **{name: _plain(figures[name]) for name in ("weight", "logps", "ref_logps", "reward", "loss")},
        "prompt": _quoted(train.prompt_text(row)),
        "completion": _quoted(train.completion_text(row)),
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _quoted(text: str) -> str:
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."

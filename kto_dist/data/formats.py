"""Thumbs logs in the layouts that people have -> canonical rows.

In:  `Source`s; one layout a source, recognised from its columns.
Out: `Row`s in file order, streamed; or, for what cannot be read, a `UserError` or a count in `BadRows`.

| columns                                             | known from                      | becomes          |
|-----------------------------------------------------|---------------------------------|------------------|
| PROMPT, ANSWER, LABEL                               | TRL, HALOs binary, NeMo-Aligner | one row          |
| messages or conversations, LABEL                    | LLaMA-Factory, ShareGPT, OpenAI | one; last turn   |
| instruction [input, system, history], ANSWER, LABEL | LLaMA-Factory (alpaca)          | one, as messages |
| PROMPT/messages/instruction, chosen, rejected       | TRL, LLaMA-Factory (DPO, ORPO)  | two              |
| chosen, rejected: whole conversations               | TRL, HH                         | two; same start  |
| messages, rejected_response or rejected_messages    | ms-swift                        | two              |
| PROMPT, output_A, output_B, label (1: A is better)  | HALOs pairwise                  | two              |

PROMPT is `prompt`, or else `question`, `query`, `input` or `context`; ANSWER is `completion`, `response`, `output` or
`answer`; LABEL is `label`, `kto_tag`, `preference` or `feedback`, in the words of base/vocabulary.py (0 or -1
means undesirable, and both in one source are refused). With `data.soft_labels` a number is the probability that the
answer (of two: the first) is good. `data.columns` gives other names.
Prompts and completions are text or chat messages (role/content, or ShareGPT's from/value; also as JSON text). Text is
taken as it is, without a chat template; where one side is messages and the other text, the text becomes a turn.
Beside turns, `system` goes before the prompt, `tools` and `chat_template_kwargs` go to the chat template. `weight` (a
number, 0 or more) multiplies the row's loss; null counts as 1. Other columns are counted, and said once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from kto_dist.base.errors import UserError
from kto_dist.data.columns import KWARGS, TOOLS, Mapped, is_there
from kto_dist.data.conversations import goes_on, without_prompt
from kto_dist.data.layouts import Layout, Scale, convert, others, recognise
from kto_dist.data.records import BadRecord, read_records, short, unread
from kto_dist.data.rows import BadRows as BadRows
from kto_dist.data.rows import Row as Row
from kto_dist.data.sources import Source
from kto_dist.data.turns import listed_in

_REPEATED = "answers that repeat the whole text of their prompt, which is trained on as if the model had said it"
_GOES_ON = "answers to a prompt of marked turns that hold a next turn of the user"
_FROM_JSON = "rows with messages as JSON text, which are read as messages"


class PairNumbers:
    """A number for every pair of a log, from 0 on."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken - 1


def read_rows(
    sources: Sequence[Source],
    *,
    on_bad_row: Literal["error", "skip"],
    bad: BadRows,
    columns: Mapping[str, str | None] | None = None,
    soft: bool = False,
    origins: Sequence[int] | None = None,
    slices: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of all sources, in order. One that cannot be read stops with a `UserError`, or is added to `bad`.

    A file without one usable row is an error either way: it is the wrong file rather than a bad row.
    `columns` is `data.columns`, `soft` is `data.soft_labels`; `origins` the number of each source in `data.train`;
    `slices` is `data.slices`, None where rows are not told apart.
    """
    mapped = Mapped(names=columns or {}, slices=slices)
    yield from read_some(
        sources,
        origins or range(len(sources)),
        mapped=mapped,
        pairs=PairNumbers(),
        on_bad_row=on_bad_row,
        bad=bad,
        soft=soft,
    )
    check_columns(mapped)


def read_some(
    sources: Sequence[Source],
    origins: Sequence[int],
    *,
    mapped: Mapped,
    pairs: PairNumbers,
    on_bad_row: str,
    bad: BadRows,
    soft: bool,
) -> Iterator[Row]:
    """Rows of some sources of a log, as `read_rows` has them. `mapped` and `pairs` are the whole log's: when all of it
    was read, `check_columns`."""
    for source, origin in zip(sources, origins, strict=True):
        yield from _rows_of(source, origin, mapped, pairs, on_bad_row, bad, soft)


def check_columns(mapped: Mapped) -> None:
    """Raises `UserError` where settings name columns that no row has."""
    if missing := mapped.missing():
        listed = ", ".join(f"data.columns.{known} ({mapped.names[known]})" for known in missing)
        raise UserError(f"{listed}: no row has such a column; correct the name, or leave it out")
    if uncut := mapped.uncut():
        raise UserError(
            f"data.slices ({', '.join(uncut)}): no held-out row has a value there; correct the name, or leave it out"
        )


def _rows_of(
    source: Source, origin: int, mapped: Mapped, pairs: Iterator[int], on_bad_row: str, bad: BadRows, soft: bool
) -> Iterator[Row]:
    layout, records, rows, problem, scale = None, 0, 0, "", Scale()
    for where, record in read_records(source, mapped.read()):
        records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            cuts = mapped.cuts(record)
            record = mapped.under_known_names(record)
            found = layout or recognise(record)
            if found.label is not None and not soft:
                scale.check(record.get(found.label), f"{where}: {found.label}")
            converted = list(convert(found, record, where, pairs, origin, cuts, soft=soft))
            layout = found  # a row that could be read says what the source's layout is
        except (BadRecord, RecursionError) as error:
            message = f"{where}: {error if isinstance(error, BadRecord) else 'it nests too deep to be read'}"
            if on_bad_row == "error":
                raise UserError(f"{message} (data.on_bad_row: skip leaves such rows out)") from None
            bad.add(error.reason if isinstance(error, BadRecord) else "nests too deep", message)
            problem = problem or message
            continue
        _note(layout, record, converted, bad, mapped.for_cuts())
        rows += len(converted)
        yield from converted
    if not records:
        raise UserError(f"{source.name} holds no rows: give a file with at least one rated answer")
    if not rows:
        raise UserError(f"{source.name}: not one of its {records} rows could be read; the first: {problem}")
    bad.unused.update(unread(source, mapped.read()))


def _note(layout: Layout, record: dict[str, Any], rows: list[Row], bad: BadRows, cuts: Collection[str]) -> None:
    """What a record holds beside its rows, and what looks odd about them.

    `cuts`: columns that rows are told apart by.
    """
    unused, first = [name for name in others(layout, record) if name not in cuts], rows[0]
    if isinstance(first.prompt, str):
        unused += [name for name in (*TOOLS, KWARGS) if is_there(record.get(name))]
    bad.unused.update(unused)
    sides = (record.get(name) for name in (layout.prompt, *layout.answers) if name)
    if any(isinstance(side, str) and listed_in(side) is not None for side in sides):
        bad.note(_FROM_JSON, first.source, rows=len(rows))
    if without_prompt(first.prompt, [row.completion for row in rows])[1]:
        bad.note(_REPEATED, first.source, short(first.completion), rows=len(rows))
    for row in rows:
        if isinstance(row.prompt, str) and isinstance(row.completion, str):
            turn = goes_on(row.prompt, row.completion)
            if turn is not None:
                bad.note(_GOES_ON, row.source, short(turn))

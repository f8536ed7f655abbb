"""Thumbs logs in the layouts that people have -> canonical rows.

In:  `Source`s, or stretches of them; one layout a source, recognised from its columns.
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

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kto_dist.base.errors import UserError
from kto_dist.data.columns import KWARGS, TOOLS, Mapped, is_there
from kto_dist.data.conversations import goes_on, without_prompt
from kto_dist.data.layouts import Layout, Scale, convert, others, recognise
from kto_dist.data.records import BadRecord, read_records, short, unread
from kto_dist.data.rows import BadRows as BadRows
from kto_dist.data.rows import Row as Row
from kto_dist.data.rows import line_of
from kto_dist.data.sources import Source
from kto_dist.data.stretches import Stretch
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


@dataclass(kw_only=True, slots=True)
class FileSoFar:
    """What has been read of one file: all that its next row may depend on."""

    layout: Layout | None = None
    """That of the first row that could be read."""
    begun: bool = False
    """Whether it was read from its start."""
    records: int = 0
    rows: int = 0
    problem: str = ""
    """Of the first record that could not be read."""
    scale: Scale = field(default_factory=Scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. The layout is not among them: it is found again."""
        plain = {name: getattr(self, name) for name in ("begun", "records", "rows", "problem")}
        return {**plain, "numbers": sorted(self.scale.met)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FileSoFar":
        plain = {name: value for name, value in values.items() if name != "numbers"}
        return cls(**plain, scale=Scale(values["numbers"]))

    def followed_by(self, other: "FileSoFar") -> "FileSoFar":
        """Of a stretch that follows."""
        return FileSoFar(
            layout=self.layout or other.layout,
            begun=self.begun or other.begun,
            records=self.records + other.records,
            rows=self.rows + other.rows,
            problem=self.problem or other.problem,
            scale=Scale(self.scale.met | other.scale.met),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogReader:
    """Reads a log's files, or some of them, and keeps what is found out of them meanwhile."""

    sources: Sequence[Source]
    """Of the whole log."""
    origins: Sequence[int]
    """The number of each source in `data.train`."""
    mapped: Mapped
    """When all of the log was read, `check_columns`."""
    on_bad_row: str
    soft: bool
    """`data.soft_labels`."""
    bad: BadRows = field(default_factory=BadRows)
    pairs: PairNumbers = field(default_factory=PairNumbers)
    files: dict[int, FileSoFar] = field(default_factory=dict)
    """By their number."""

    def read(self, stretches: Iterable[Stretch]) -> Iterator[Row]:
        """Rows of these, in order, as they are in the whole log. Raises `UserError`."""
        for stretch in stretches:
            yield from _rows_of(self, stretch, self.files.setdefault(stretch.file, FileSoFar()))


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
    origins = origins or range(len(sources))
    reader = LogReader(sources=sources, origins=origins, mapped=mapped, on_bad_row=on_bad_row, soft=soft, bad=bad)
    yield from reader.read(Stretch(file=file) for file in range(len(sources)))
    check_columns(mapped)


def check_columns(mapped: Mapped) -> None:
    """Raises `UserError` where settings name columns that no row has."""
    if missing := mapped.missing():
        listed = ", ".join(f"data.columns.{known} ({mapped.names[known]})" for known in missing)
        raise UserError(f"{listed}: no row has such a column; correct the name, or leave it out")
    if uncut := mapped.uncut():
        raise UserError(
            f"data.slices ({', '.join(uncut)}): no held-out row has a value there; correct the name, or leave it out"
        )


def _rows_of(log: LogReader, stretch: Stretch, so_far: FileSoFar) -> Generator[Row, None, None]:
    source, mapped = log.sources[stretch.file], log.mapped
    so_far.begun |= stretch.start == 0
    if stretch.start and so_far.layout is None:
        so_far.layout = _layout_before(log, stretch)
    for where, record in read_records(source, mapped.read(), stretch):
        so_far.records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            cuts = mapped.cuts(record)
            record = mapped.under_known_names(record)
            found = so_far.layout or recognise(record)
            if found.label is not None and not log.soft:
                so_far.scale.check(record.get(found.label), f"{where}: {found.label}")
            origin = log.origins[stretch.file]
            converted = list(convert(found, record, where, log.pairs, origin, cuts, soft=log.soft))
            so_far.layout = found  # a row that could be read says what the source's layout is
        except (BadRecord, RecursionError) as error:
            message = f"{where}: {error if isinstance(error, BadRecord) else 'it nests too deep to be read'}"
            if log.on_bad_row == "error":
                raise UserError(f"{message} (data.on_bad_row: skip leaves such rows out)") from None
            reason = error.reason if isinstance(error, BadRecord) else "nests too deep"
            log.bad.add(reason, message, stretch.file, line_of(where))
            so_far.problem = so_far.problem or message
            continue
        _note(so_far.layout, record, converted, log.bad, mapped.for_cuts())
        so_far.rows += len(converted)
        yield from converted
    if stretch.stop is not None:
        return
    if so_far.begun and not so_far.records:
        raise UserError(f"{source.name} holds no rows: give a file with at least one rated answer")
    if so_far.begun and not so_far.rows:
        raise UserError(
            f"{source.name}: not one of its {so_far.records} rows could be read; the first: {so_far.problem}"
        )
    log.bad.unused.update(unread(source, mapped.read()))


def _layout_before(log: LogReader, stretch: Stretch) -> Layout | None:
    """That of the file's rows before the stretch, which as a rule the first one tells."""
    so_far = FileSoFar()
    # what is found is found once more by whoever reads these rows
    aside = replace(log, bad=BadRows(), pairs=PairNumbers())
    with closing(_rows_of(aside, Stretch(file=stretch.file, stop=stretch.start), so_far)) as rows:
        next(rows, None)
    return so_far.layout


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

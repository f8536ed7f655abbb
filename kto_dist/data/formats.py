"""Thumbs logs in the layouts that people have -> canonical rows.

In:  `Source`s, or stretches of them; one layout a source, recognised from its columns.
Out: `Row`s in file order, streamed; or, for what cannot be read, a `UserError` or a count in `BadRows`.

1. `LogReader.chunks`   files -> blocks of records, each with what the rows before it decide: its layout
2. `LogReader.rows`     a chunk -> rows. Another reader, in another process, may do so: its `Found` is taken in
3. `LogReader.ended`    what can be said of a file as a whole

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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kto_dist.base.errors import UserError
from kto_dist.data.columns import KWARGS, TOOLS, Mapped, is_there
from kto_dist.data.conversations import goes_on, without_prompt
from kto_dist.data.doubts import check_beside
from kto_dist.data.layouts import Layout, Scale, convert, others, recognise
from kto_dist.data.records import BadRecord, Block, read_blocks, short, unread
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
class Chunk:
    """Neighbouring records of a file, and what has to be known of those before."""

    file: int
    """Its number in the log."""
    block: Block
    layout: Layout | None
    """That of the first row before these that could be read; None: there is none."""
    first: bool
    """Whether the file starts with these."""
    last: bool
    """Whether it ends with these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a reader has found out, beside the rows."""

    files: dict[int, FileSoFar]
    """By the number of the file."""
    pairs: int
    found: frozenset[str]
    """`Mapped.found`."""
    cut: frozenset[str]
    """`Mapped.cut`."""
    bad: BadRows


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

    def afresh(self) -> "LogReader":
        """One that has read nothing."""
        return replace(
            self,
            mapped=replace(self.mapped, found=set(), cut=set()),
            bad=BadRows(),
            pairs=PairNumbers(),
            files={},
        )

    def read(self, stretches: Iterable[Stretch]) -> Iterator[Row]:
        """Rows of these, in order, as they are in the whole log. Raises `UserError`."""
        for chunk in self.chunks(stretches, _ROWS):
            yield from self.rows(chunk)
            self.ended(chunk)

    def chunks(self, stretches: Iterable[Stretch], rows: int) -> Iterator[Chunk]:
        """All records of these, in order, at most so many at a time. Raises `UserError`."""
        layouts = {file: so_far.layout for file, so_far in self.files.items()}
        for stretch in stretches:
            layout = layouts.get(stretch.file)
            if stretch.start and layout is None:
                layout = self._layout_before(stretch)
            first = stretch.start == 0
            blocks = read_blocks(self.sources[stretch.file], self.mapped.read(), stretch, rows)
            for block, last in _with_last(blocks):
                ends = last and stretch.stop is None
                yield Chunk(file=stretch.file, block=block, layout=layout, first=first, last=ends)
                layout, first = layout or self._layout_in(stretch.file, block), False
            layouts[stretch.file] = layout

    def rows(self, chunk: Chunk) -> Iterator[Row]:
        """Raises `UserError`."""
        source, mapped = self.sources[chunk.file], self.mapped
        so_far = self.files.setdefault(chunk.file, FileSoFar())
        so_far.begun |= chunk.first
        so_far.layout = so_far.layout or chunk.layout
        apart = mapped.for_cuts()
        for where, given in chunk.block.records(source):
            so_far.records += 1
            try:
                if isinstance(given, BadRecord):
                    raise given
                cuts = mapped.cuts(given)
                record = mapped.under_known_names(given)
                found = so_far.layout or recognise(record)
                check_beside(found, record, given, mapped)
                if found.label is not None and not self.soft:
                    so_far.scale.check(record.get(found.label), f"{where}: {found.label}")
                origin = self.origins[chunk.file]
                converted = list(convert(found, record, where, self.pairs, origin, cuts, soft=self.soft))
                so_far.layout = found  # a row that could be read says what the source's layout is
            except (BadRecord, RecursionError) as error:
                message = f"{where}: {error if isinstance(error, BadRecord) else 'it nests too deep to be read'}"
                if self.on_bad_row == "error":
                    raise UserError(f"{message} (data.on_bad_row: skip leaves such rows out)") from None
                reason = error.reason if isinstance(error, BadRecord) else "nests too deep"
                self.bad.add(reason, message, chunk.file, line_of(where))
                so_far.problem = so_far.problem or message
                continue
            _note(so_far.layout, record, converted, self.bad, apart)
            so_far.rows += len(converted)
            yield from converted

    def ended(self, chunk: Chunk) -> None:
        """To be called when a chunk's rows are read, or taken in. Raises `UserError` for a file without any."""
        if not chunk.last:
            return
        source, so_far = self.sources[chunk.file], self.files[chunk.file]
        if so_far.begun and not so_far.records:
            raise UserError(f"{source.name} holds no rows: give a file with at least one rated answer")
        if so_far.begun and not so_far.rows:
            raise UserError(
                f"{source.name}: not one of its {so_far.records} rows could be read; the first: {so_far.problem}"
            )
        self.bad.unused.update(unread(source, self.mapped.read()))

    def found(self) -> Found:
        return Found(
            files=self.files,
            pairs=self.pairs.taken,
            found=frozenset(self.mapped.found),
            cut=frozenset(self.mapped.cut),
            bad=self.bad,
        )

    def take_in(self, found: Found, ended: Collection[int] = ()) -> bool:
        """What another reader found in what follows. False, and nothing is changed, for rows that are wrong beside
        those before them, or a file without any among those that have `ended`: who reads them after these says so."""
        files = {file: self.files.get(file, FileSoFar()).followed_by(so_far) for file, so_far in found.files.items()}
        if any(so_far.scale.trouble() or (file in ended and not so_far.rows) for file, so_far in files.items()):
            return False
        self.files.update(files)
        self.mapped.found.update(found.found)
        self.mapped.cut.update(found.cut)
        self.pairs.taken += found.pairs
        self.bad.extend(found.bad)
        return True

    def _layout_before(self, stretch: Stretch) -> Layout | None:
        """That of the file's rows before the stretch, which as a rule the first one tells."""
        aside = self.afresh()
        blocks = read_blocks(
            self.sources[stretch.file], self.mapped.read(), Stretch(file=stretch.file, stop=stretch.start), _ROWS
        )
        for block in blocks:
            chunk = Chunk(file=stretch.file, block=block, layout=None, first=True, last=False)
            if next(aside.rows(chunk), None) is not None:
                return aside.files[stretch.file].layout
        return None

    def _layout_in(self, file: int, block: Block) -> Layout | None:
        aside = self.afresh()
        with suppress(UserError):  # whoever makes rows of the block says it
            next(aside.rows(Chunk(file=file, block=block, layout=None, first=False, last=False)), None)
        return aside.files[file].layout


_ROWS = 1000
"""Records that are read at once where nobody waits for them."""


def _with_last(blocks: Iterable[Block]) -> Iterator[tuple[Block, bool]]:
    """Each with whether it is the last one; of none, one without records. Before an error all that came first."""
    held = None
    try:
        for block in blocks:
            if held is not None:
                yield held, False
            held = block
    except UserError:
        if held is not None:
            yield held, False
        raise
    yield held or Block(content=[]), True


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

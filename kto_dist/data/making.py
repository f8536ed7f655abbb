"""A chunk of a log's records -> tokens, and what was found out on the way. It runs in the worker processes.

In:  a `Chunk`, of whose file only the layout is known. Out: `Made`, which whoever has the chunks before takes in.

What a row is depends on the rows before it in two ways only. The layout is its file's first one, and comes with the
chunk. The numbers among labels must not make a rating together with those before: `LogReader.take_in` sees whether they
do. Where they do, and where a row here is wrong, the chunk is made again after what came before it, which says the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kto_dist.base.errors import UserError
from kto_dist.data.encode import Encoder, Part
from kto_dist.data.formats import Chunk, FileSoFar, Found, LogReader
from kto_dist.data.layouts import Scale
from kto_dist.data.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """Of one chunk."""

    parts: Sequence[Part]
    """One a split. Pairs are numbered from 0 on."""
    found: Found


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """Can be pickled."""

    reader: LogReader
    """That has read nothing."""
    encoder: Encoder

    @classmethod
    def of(cls, reader: LogReader, encoder: Encoder) -> "Maker":
        """Of the files only the names go to other processes."""
        named = [replace(source, dataset=None) for source in reader.sources]
        return cls(reader=replace(reader, sources=named).afresh(), encoder=encoder)

    def __call__(self, chunk: Chunk) -> Made | None:
        """None where a row is wrong, among those of the chunk alone: `made` says which is the first one."""
        try:
            return self.made(chunk, None)
        except UserError:
            return None

    def made(self, chunk: Chunk, before: FileSoFar | None) -> Made:
        """`before`: of the file's rows before the chunk. Raises `UserError`."""
        reader = self.reader.afresh()
        if before is not None:
            reader.files[chunk.file] = FileSoFar(scale=Scale(before.scale.met))
        rows: list[Row] = []
        trouble = None
        try:
            rows.extend(reader.rows(chunk))
        except UserError as error:
            trouble = error
        # the rows that could be read may be wrong too, and stand first
        parts, seen = self.encoder(rows)
        if trouble is not None:
            raise trouble
        reader.bad.extend(seen)
        return Made(parts=parts, found=reader.found())

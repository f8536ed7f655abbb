"""A text file of the log -> its lines, in whatever encoding, in bounded memory.

In:  a `LogFile`.
Out: blocks of whole lines with their numbers; lines of JSON also as Arrow batches that DuckDB turns into rows.

Lines are split here and not by DuckDB, because its readers either stop at a broken line or drop it uncounted, and
because a line's number has to stand in a message.
"""

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import InputConfig
from kto_dist.feedback.notices import Notices
from kto_dist.feedback.sources import LogFile

LINES = pa.schema([("position", pa.uint64()), ("problem", pa.string()), ("record", pa.large_string())])
_BLOCK = 4 << 20


# Bytes of another encoding that mean nothing there become half of a surrogate pair, which no UTF-8 has: so they are
# found where broken UTF-8 is found.
def _broken(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("kto_dist.broken", _broken)


def text_blocks(file: LogFile, encoding: str) -> Iterator[bytes]:
    """The file as blocks of what should be UTF-8, without a byte order mark. Raises `UserError`."""
    try:
        with gzip.open(file.path, "rb") if file.gzipped else open(file.path, "rb") as raw:
            head = raw.read(_BLOCK)
            name, skip = _encoding(file, head, encoding)
            blocks = itertools.chain([head[skip:]], iter(lambda: raw.read(_BLOCK), b""))
            if name == "utf-8":
                yield from blocks
                return
            decoder = codecs.getincrementaldecoder(name)(errors="kto_dist.broken")
            for block in blocks:
                yield decoder.decode(block).encode("utf-8", "surrogatepass")
            yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file.path} is damaged or not what its name says: {error}; write it again") from None


def _encoding(file: LogFile, head: bytes, encoding: str) -> tuple[str, int]:
    """Python's name of the encoding, and the length of the byte order mark."""
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    mark = next((mark for mark in marks if head.startswith(mark)), b"")
    if encoding == "auto":
        if mark:
            return marks[mark], len(mark)
        # the first character of a log is a brace, a bracket or a column's name: ASCII, whose other byte is 0
        if len(head) > 1 and (head[0] == 0) != (head[1] == 0):
            return ("utf-16-be" if head[0] == 0 else "utf-16-le"), 0
        return "utf-8", 0
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(
            f"input.encoding ({encoding}) is no encoding that is known: give auto, utf-8, utf-16, cp1252, latin-1, ..."
        ) from None
    if mark and name in ("utf-8", "utf-16", marks[mark]):
        return marks[mark], len(mark)
    return name, 0


def lines(file: LogFile, config: InputConfig) -> Iterator[tuple[int, np.ndarray, bytes]]:
    """(number of the first line, offsets, whole lines) a block; offsets[i] is where line i starts.

    A line over the limit is given as it is, cut to the limit: so it is over the limit for whoever checks.
    """
    limit = config.max_row_mebibytes << 20
    number, rest, dropping = 1, b"", False
    for block in itertools.chain(text_blocks(file, config.encoding), [None]):
        if block is None:
            block = b"\n" if rest else b""
        if dropping:
            end = block.find(b"\n")
            if end < 0:
                continue
            block, dropping = block[end:], False
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if len(rest) > limit:
            rest, dropping = rest[: limit + 1], True
        if end:
            whole = block[:end]
            ends = np.flatnonzero(np.frombuffer(whole, np.uint8) == 10).astype(np.int64) + 1
            yield number, np.concatenate([np.zeros(1, np.int64), ends]), whole
            number += len(ends)


def json_batches(file: LogFile, config: InputConfig, notices: Notices) -> Iterator[pa.RecordBatch]:
    limit = config.max_row_mebibytes << 20
    for number, offsets, whole in lines(file, config):
        count = len(offsets) - 1
        position = pa.array(np.arange(number, number + count, dtype=np.uint64))
        notices.lines(offsets, whole)
        try:
            whole.decode("utf-8")
            bad = np.diff(offsets) > limit + 1
        except UnicodeDecodeError:
            bad = np.ones(count, bool)
        if not bad.any():
            record = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(whole))
            yield pa.record_batch([position, pa.nulls(count, pa.string()), record], schema=LINES)
            continue
        problems, records = [], []
        for start, end in itertools.pairwise(offsets.tolist()):
            text, problem = checked(whole[start:end], limit)
            problems.append(problem)
            records.append(text)
        yield pa.record_batch(
            [position, pa.array(problems, pa.string()), pa.array(records, pa.large_string())], schema=LINES
        )


def checked(line: bytes, limit: int) -> tuple[str, str | None]:
    """A line's text, and its problem."""
    if len(line) > limit + 1:
        return line[:limit].decode("utf-8", "replace"), "too long"
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError:
        return line.decode("utf-8", "replace"), "encoding"


def text_pieces(file: LogFile, config: InputConfig) -> Iterator[str]:
    """The file's text in pieces. Raises `UserError` for bytes that are none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in text_blocks(file, config.encoding):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: the bytes {error.object[error.start : error.end]!r} are not text in the file's encoding: "
            "give input.encoding, or convert the file to UTF-8"
        ) from None

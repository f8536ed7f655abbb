"""A JSON document -> its rows, one after the other, in bounded memory.

In:  the document's text in pieces, and a pointer to the list of rows in it.
Out: each row; where the document breaks, an error that says on which line.

Without a pointer, a list's elements are the rows, and an object is a row; several documents may follow each other.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")


class Broken(ValueError):
    """The document is not JSON, or has not what the pointer says; the message says where and what."""


def loads(text: str) -> Any:
    """Strict JSON: no NaN, no half of a surrogate pair. Raises `ValueError`, also for what is nested too deep."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text or "\\uD" in text:
        _check_unicode(value)
    return value


def _check_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def rows(blocks: Iterable[str], path: tuple[str, ...] = (), limit: int = 1 << 30) -> Iterator[Any]:
    """The rows below `path`, none longer than `limit` characters. Raises `Broken`."""
    text = _Text(iter(blocks), limit)
    if path:
        text.descend(path)
        yield from text.elements()
        return
    while text.peek():
        if text.peek() == "[":
            yield from text.elements()
        else:
            yield text.value()


class _Text:
    """What has been read of the document and not been used yet."""

    def __init__(self, blocks: Iterator[str], limit: int) -> None:
        self._blocks, self._limit = blocks, limit
        self._text, self._place, self._line = "", 0, 1

    def _more(self) -> bool:
        """Reads on, as much again as there is, so that a value over many pieces is not begun anew for each of them."""
        block = next(self._blocks, None)
        if block is None:
            return False
        left = self._text[self._place :]
        if len(left) > self._limit:
            raise self.broken("a row is longer than input.max_row_mebibytes, or never ends")
        self._line += self._text.count("\n", 0, self._place)
        pieces, length = [left, block], len(block)
        while length < len(left) and (block := next(self._blocks, None)) is not None:
            pieces.append(block)
            length += len(block)
        self._text, self._place = "".join(pieces), 0
        return True

    def broken(self, why: str, place: int | None = None) -> Broken:
        place = self._place if place is None else place
        line = self._line + self._text.count("\n", 0, place)
        return Broken(f"line {line:,}: {why}: {self._text[max(0, place - 20) : place + 40]!r}")

    def peek(self) -> str:
        """The next sign that is no space; none at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def take(self, signs: str) -> str:
        """The next sign, which must be one of these."""
        found = self.peek()
        if not found or found not in signs:
            raise self.broken(f"expecting {' or '.join(signs)}")
        self._place += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # what a piece cuts breaks at its end, or in a text that does not close
                cut = error.msg.startswith(("Unterminated", "Invalid \\u")) or error.pos > len(self._text) - 10
                if cut and self._more():
                    continue
                raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                raise self.broken("it is nested too deep" if deep else str(error)) from None
            # a number at the end of a piece may go on in the next one
            if end < len(self._text) or not self._more():
                break
        try:
            _check_unicode(value)
        except ValueError as error:
            raise self.broken(str(error)) from None
        self._place = end
        return value

    def descend(self, path: tuple[str, ...]) -> None:
        """To the value of a key in a key: what stands before it is read and dropped."""
        for depth, key in enumerate(path, 1):
            self.take("{")
            while True:
                if self.peek() == "}":
                    raise self.broken(f"/{'/'.join(path[:depth])} is not there")
                name = self.value()
                self.take(":")
                if name == key:
                    break
                self.value()
                if self.take(",}") == "}":
                    raise self.broken(f"/{'/'.join(path[:depth])} is not there")

    def elements(self) -> Iterator[Any]:
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

"""Canonical rows, and the account of what became of a log's records.

`formats.py` makes rows, `encode.py` makes tokens of them; both add to the account.
"""

from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from kto_dist.data.turns import Messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rated answer. Prompt and completion are both text or both messages."""

    prompt: str | Messages
    completion: str | Messages
    """All turns are the assistant's. May be empty text: whether that can be trained on is decided after tokenising."""
    desirable: bool
    """Where the label is a probability: whether it is at least a half."""
    weight: float
    source: str
    """The row's place, "file:line" or "file:row 12", counted from 1."""
    probability: float | None = None
    """That the row is desirable, above 0 and below 1; None: the label is certain."""
    pair: int | None = None
    """The number of the pair that the row is an answer of; None for an answer that was rated alone."""
    origin: int = 0
    """The number of the source in `data.train`."""
    cuts: Mapping[str, str] = field(default_factory=dict)
    """Column -> value, of those by which figures are told apart (`data.slices`)."""
    tools: tuple[dict[str, Any], ...] = ()
    """For the chat template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template; wins over `data.template_kwargs`."""


@dataclass(kw_only=True, slots=True)
class BadRows:
    """Rows that were skipped, and what was seen and not used."""

    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that were skipped."""
    quoted: list[tuple[int, int, str]] = field(default_factory=list)
    """Messages of the first few, each after the number of its file and its line."""
    unused: Counter[str] = field(default_factory=Counter)
    """Column, or key of a message -> rows that have it, where nothing reads it."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was found and may not be meant -> rows."""
    first: dict[str, str] = field(default_factory=dict)
    """Of each note the first row's place, and what it is about."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values. (`dataclasses.asdict` would count a Counter's items.)"""
        return {field.name: copy(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BadRows":
        """As `to_dict` made them, and JSON kept them."""
        counters = {name: Counter(values[name]) for name in ("counts", "unused", "notes")}
        return cls(**{**values, **counters, "quoted": [(file, line, text) for file, line, text in values["quoted"]]})

    @property
    def examples(self) -> list[str]:
        """The first few messages, in the log's order."""
        return [message for _, _, message in self.quoted]

    def add(self, reason: str, message: str, file: int, line: int) -> None:
        self.counts[reason] += 1
        self._quote((file, line, message))

    def note(self, note: str, where: str, quote: str = "", rows: int = 1) -> None:
        self.notes[note] += rows
        self.first.setdefault(note, f"{where}: {quote}" if quote else where)

    def extend(self, other: "BadRows") -> None:
        self.counts.update(other.counts)
        self._quote(*other.quoted)
        self.unused.update(other.unused)
        self.notes.update(other.notes)
        self.first = {**other.first, **self.first}

    def _quote(self, *messages: tuple[int, int, str]) -> None:
        # rows are read ahead of those that are made tokens of: what comes first here need not stand first in the log
        self.quoted = sorted([*self.quoted, *messages], key=lambda quoted: quoted[:2])[:5]


def line_of(place: str) -> int:
    """The line or row of a row's place."""
    return int(place.rpartition(":")[2].removeprefix("row "))

"""What columns are called: the names that are known, and a log's own names for them (`data.columns`).

In:  a record as the file has it. Out: the same record under the known names, and its values of `data.slices`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kto_dist.base import json_pointer
from kto_dist.base.label_names import beside

TURNS = ("messages", "conversations", "conversation")
GUESSES = ("question", "query", "input", "context")
"""Prompts where no column is called so."""
PROMPTS = ("prompt", "instruction", *TURNS, *GUESSES)
ANSWERS = ("completion", "response", "output", "answer")
LABELS = ("label", "kto_tag", "preference", "feedback")
PAIRS = ("chosen", "rejected")
SIDES = ("output_A", "output_B")
REJECTED = ("rejected_response", "rejected_messages")
"""The worse answer, or the whole conversation with it, beside a conversation that ends with the better one."""
TOOLS = ("tools", "functions")
KWARGS = "chat_template_kwargs"
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""What a language model of text alone cannot see."""
INDICES = ("message_index", "message_idx", "turn_index", "turn_idx", "rated_index")
IDS = ("message_id", "messageId")
"""Which turn of a conversation was rated, as its number or its id."""
WINNERS = ("winner", "preferred", "preference")
"""Which of two answers is the better one."""
KNOWN = (*PROMPTS, *ANSWERS, *LABELS, *PAIRS, *SIDES, *REJECTED, "system", "history", "weight", *TOOLS, KWARGS)
"""What `data.columns` may map."""


CUTS = {"language": ("language", "lang"), "model": ("model", "model_version", "model_name", "models")}
"""What held-out figures are told apart by without being asked -> the columns that may hold it, the first one counts."""
_LONGEST = 60
"""Characters of a value that names a slice."""


def is_there(value: Any) -> bool:
    """Whether a cell holds anything: no null, no empty text, list or object."""
    return value is not None and value != "" and value != [] and value != {}


def root_of(name: str) -> str:
    """The column that a name or a pointer starts from."""
    return json_pointer.keys_of(name)[0] if name.startswith("/") else name


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """`data.columns` at work."""

    names: Mapping[str, str | None]
    """Known name -> the log's own name or JSON pointer (from a slash on); None: the log's column is left out."""
    slices: Sequence[str] | None = None
    """`data.slices`; None where rows are not told apart."""
    found: set[str] = field(default_factory=set)
    """Known names whose columns some record had."""
    cut: set[str] = field(default_factory=set)
    """Of `slices`, those that some record had."""

    def read(self) -> set[str]:
        """Columns to read from files that are read by column."""
        own = {root_of(name) for name in self.names.values() if name is not None}
        label = self.names.get("label")
        return (
            {*KNOWN, *MEDIA, *INDICES, *IDS, *WINNERS}
            | own
            | self.for_cuts()
            | (beside(root_of(label)) if label else set())
        )

    def for_cuts(self) -> set[str]:
        """Columns that rows are told apart by."""
        if self.slices is None:
            return set()
        return {root_of(name) for name in self.slices} | {name for names in CUTS.values() for name in names}

    def cuts(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Slice -> its value, as text, of a record as the file has it; what it lacks is absent."""
        if self.slices is None:
            return {}
        wanted: dict[str, tuple[str, ...]] = {name: (name,) for name in self.slices}
        # a column that was asked for is not there twice, under its own name and a general one
        wanted |= {name: columns for name, columns in CUTS.items() if not {name, *columns} & wanted.keys()}
        values: dict[str, str] = {}
        for name, columns in wanted.items():
            for column in columns:
                path = (column,) if column in record or not column.startswith("/") else json_pointer.keys_of(column)
                value = json_pointer.find(record, path)
                if value is not json_pointer.MISSING and is_there(value) and not isinstance(value, dict):
                    self.cut.add(name)
                    values[name] = _as_text(value)
                    break
        return values

    def under_known_names(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self.names:
            return record
        renamed = dict(record)
        for known, own in self.names.items():
            if own is None:
                renamed.pop(known, None)
                continue
            path = (own,) if own in record or not own.startswith("/") else json_pointer.keys_of(own)
            value = json_pointer.find(record, path)
            if value is not json_pointer.MISSING:
                self.found.add(known)
                if root_of(own) not in self.names:
                    renamed.pop(root_of(own), None)
                renamed[known] = value
        return renamed

    def missing(self) -> list[str]:
        """Known names whose columns no record had."""
        return [known for known, own in self.names.items() if own is not None and known not in self.found]

    def uncut(self) -> list[str]:
        """Of `slices`, those that no record had."""
        return [name for name in self.slices or () if name not in self.cut]


def _as_text(value: Any) -> str:
    """Of several values all, in order: the models whose answers were the same one."""
    text = ", ".join(sorted(map(str, value))) if isinstance(value, list | tuple) else str(value).strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

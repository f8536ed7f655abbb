"""What columns are called: the names that are known, and a log's own names for them (`data.columns`).

In:  a record as the file has it. Out: the same record under the known names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kto_dist.base import json_pointer

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
KNOWN = (*PROMPTS, *ANSWERS, *LABELS, *PAIRS, *SIDES, *REJECTED, "system", "history", "weight", *TOOLS, KWARGS)
"""What `data.columns` may map."""


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
    found: set[str] = field(default_factory=set)
    """Known names whose columns some record had."""

    def read(self) -> set[str]:
        """Columns to read from files that are read by column."""
        return {*KNOWN, *MEDIA} | {root_of(name) for name in self.names.values() if name is not None}

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

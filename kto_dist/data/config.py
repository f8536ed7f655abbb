"""The `data` section: which rows, and how they become tokens."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_dist.base.config import Paths, Place, Positive, Section, Text
from kto_dist.data.columns import KNOWN

Name = Annotated[str, Field(pattern=r"^[\w][\w .-]*$")]
"""Of a source: a part of its metrics' names."""
Named = Annotated[dict[Name, Paths], Field(min_length=1)]
"""Source's name -> its path or paths."""


Rule = Literal["all", "one", "best"]
"""Which of a prompt's good and bad answers make a pair (`preference.py`)."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class DataConfig(Section):
    """The thumbs, and how rows become tokens."""

    train: Annotated[Annotated[tuple[Place, ...], Field(min_length=1)] | Named, BeforeValidator(_listed)] = Field(
        description="JSONL, CSV or Parquet file(s), a `datasets` folder, or a hub name (name:split); or name: path of"
        " several sources, each with counts and metrics of its own"
    )
    heldout: float | Place | Named | None = Field(
        None,
        description="held-out rows: a path, or the fraction of prompts to hold out (by prompt hash); or name: path of"
        " several sets, each with figures of its own",
    )
    columns: dict[Text, Text | None] = Field(
        {},
        description="column of the data for a name that is known, as in {prompt: query, label: /votes/0/thumb}; null:"
        " leave that column out",
    )
    slices: tuple[Text, ...] = Field(
        (),
        description="columns (or JSON pointers) by which held-out figures are told apart, beside language and model"
        " where the rows have these, length of prompt, and source",
    )
    template_kwargs: dict[str, Any] = Field(
        {},
        description="settings of the chat template, as in {enable_thinking: false}; a row's `chat_template_kwargs` win",
    )
    max_length: Positive = Field(1024, description="tokens of prompt + completion; longer rows are cut")
    max_prompt_length: Positive | None = Field(
        None, description="tokens an over-long row's prompt keeps, from its end; null: half of max_length"
    )
    soft_labels: bool = Field(
        False,
        description="a label that is a number is the probability, from 0 to 1, that the answer is good; false: a thumb",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a row that cannot be read: stop, or count it")
    workers: Positive | None = Field(None, description="processes that tokenise; null: one a core, at most 8")
    cache: Place = Field("runs/tokenised", description="folder of tokenised datasets, keyed by content")

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> "DataConfig":
        if isinstance(self.heldout, float) and not 0 < self.heldout < 1:
            raise ValueError(f"heldout ({self.heldout}) must be a path, or a fraction between 0 and 1")
        if self.max_length < 2:
            raise ValueError(
                f"max_length ({self.max_length}) must be at least 2: one prompt token and one completion token"
            )
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}): "
                "no completion token would be left"
            )
        return self

    @model_validator(mode="after")
    def _columns_are_known(self) -> "DataConfig":
        for name in (name for name, own in self.columns.items() if own is not None and name not in KNOWN):
            near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}"
            raise ValueError(f"columns: {name} is no name that is known, {hint} It reads {{known name: your column}}")
        return self

    @property
    def prompt_limit(self) -> int:
        """Tokens that the prompt of an over-long row keeps."""
        return self.max_prompt_length or max(1, self.max_length // 2)

    @property
    def train_sources(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(name, paths) of each source; without names every path is one."""
        return _sources(self.train)

    @property
    def heldout_sources(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(name, paths) of each held-out source; () where rows are held out by a fraction, or not at all."""
        return () if self.heldout is None or isinstance(self.heldout, float) else _sources(self.heldout)

    @property
    def heldout_names(self) -> tuple[str, ...]:
        """Of the held-out sets that have names; () where they have none."""
        return tuple(self.heldout) if isinstance(self.heldout, dict) else ()

    @property
    def train_paths(self) -> tuple[str, ...]:
        return tuple(path for _, paths in self.train_sources for path in paths)

    @property
    def heldout_paths(self) -> tuple[str, ...]:
        return tuple(path for _, paths in self.heldout_sources for path in paths)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Of the training rows' sources that have names; () where they have none."""
        return tuple(self.train) if isinstance(self.train, dict) else ()


def _sources(given: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(given, dict):
        return tuple(given.items())
    return tuple((path, (path,)) for path in ([given] if isinstance(given, str) else given))

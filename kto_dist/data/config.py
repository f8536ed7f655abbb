"""The `data` section: which rows, and how they become tokens."""

from typing import Literal

from pydantic import Field, model_validator

from kto_dist.base.config import Paths, Positive, Section, Text


class DataConfig(Section):
    """The thumbs, and how rows become tokens."""

    train: Paths = Field(description="JSONL or Parquet file(s), a `datasets` folder, or a hub name (name:split)")
    heldout: str | float | None = Field(
        None, description="held-out rows: a path like `train`, or the fraction of prompts to hold out (by prompt hash)"
    )
    max_length: Positive = Field(1024, description="tokens of prompt + completion; longer rows are cut")
    max_prompt_length: Positive | None = Field(
        None, description="tokens an over-long row's prompt keeps, from its end; null: half of max_length"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a row that cannot be read: stop, or count it")
    workers: Positive | None = Field(None, description="processes that tokenise; null: one a core, at most 8")
    cache: Text = Field("runs/tokenised", description="folder of tokenised datasets, keyed by content")

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

    @property
    def prompt_limit(self) -> int:
        """Tokens that the prompt of an over-long row keeps."""
        return self.max_prompt_length or max(1, self.max_length // 2)

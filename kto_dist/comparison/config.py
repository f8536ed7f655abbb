"""The `compare` section, and the config of a comparison: that of a training run, and this section beside it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kto_dist.base.config import Positive, PositiveFloat, Section
from kto_dist.objective.losses import LOSSES
from kto_dist.training.config import Config

Method = Literal["sft", "kto", "apo_zero_unpaired", "dpo", "ipo"]


class CompareConfig(Section):
    """Which losses are compared, and what is tried for each."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = Field(
        ("sft", "kto", "apo_zero_unpaired", "dpo"), description="losses, each on the same rows, tokens and store"
    )
    lr: tuple[PositiveFloat, ...] = Field((), description="peak learning rates tried for each; none: train.lr")
    beta: tuple[PositiveFloat, ...] = Field(
        (), description="betas tried for each loss that has one; none: objective.beta"
    )
    budget: Positive = Field(16, description="most runs; a grid of more is an error")
    choose_by: Literal["auc", "accuracy/pairs"] = Field(
        "auc",
        description="the figure on one half of the held-out prompts by which lr and beta are chosen: over all rows, or"
        " within prompts",
    )


class ComparisonConfig(Config):
    """A training run's config; `train.output` is the folder in which each run has one of its own."""

    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _can_be_compared(self) -> "ComparisonConfig":
        if len(set(self.compare.methods)) < len(self.compare.methods):
            raise ValueError(f"compare.methods ({', '.join(self.compare.methods)}) names one twice: write it once")
        if self.data.heldout is None:
            raise ValueError(
                "data.heldout is null, and a comparison needs held-out rows: half of their prompts choose lr and beta, "
                "the others are reported; give a path, or a fraction such as 0.2"
            )
        if self.data.soft_labels:
            raise ValueError(
                "data.soft_labels (true) must be false: a comparison tells good answers from bad ones, and a label "
                "that is a probability names neither; give held-out and training rows with thumbs"
            )
        if self.reference.path is not None:
            raise ValueError(
                f"reference.path ({self.reference.path}) must be null: the start that all methods share is the "
                "reference, so that one log-ratio means the same for each"
            )
        runs = sum(
            max(1, len(self.compare.lr)) * (max(1, len(self.compare.beta)) if "beta" in LOSSES[name].settings else 1)
            for name in self.compare.methods
        )
        if runs > self.compare.budget:
            raise ValueError(
                f"the grid has {runs} runs, and compare.budget is {self.compare.budget}: try fewer lr or beta, or "
                "raise the budget"
            )
        return self

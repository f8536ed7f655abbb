"""The `objective` section: the loss, its settings and its weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kto_dist.base.config import NonNegativeFloat, Positive, PositiveFloat, Section
from kto_dist.data.config import Rule
from kto_dist.objective.losses import LOSSES


class ObjectiveConfig(Section):
    """What is minimised. A setting that the loss does not use is an error."""

    loss: Literal["kto", "apo_zero_unpaired", "dpo", "ipo", "sft"] = Field(
        "kto",
        description="kto: Eq. 7 and 8 of arXiv 2402.01306; apo_zero_unpaired: without z0, so without KL pairs; dpo: on"
        " pairs of a good and a bad answer to one prompt; ipo: likewise, towards a margin of 1 / (2 beta) nats a token;"
        " sft: on the thumbs-up rows alone",
    )
    beta: PositiveFloat = Field(0.1, description="how strongly a log-ratio counts; the KTO paper uses 0.05 to 0.5")
    desirable_weight: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="loss weight of thumbs-up rows; auto: by the paper's rule from the class counts"
    )
    undesirable_weight: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="loss weight of thumbs-down rows; auto likewise"
    )
    kl_pairs_per_step: Positive | None = Field(
        None, description="mismatched pairs that estimate z0 each step; null: one a row; fewer is faster and noisier"
    )
    pairs: Rule = Field(
        "all",
        description="dpo and ipo: which of a prompt's good and bad answers make a pair: each with each; one each, so"
        " that no answer is in two pairs; or the best with the worst, by the rows' weights. Pairs of the"
        " data stay as they are",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo: the chance that a pair is the other way round"
    )
    sft_weight: NonNegativeFloat = Field(
        0.0, description="adds so many times the mean over thumbs-up rows of -log-prob a token"
    )
    router_loss: Literal["auto"] | NonNegativeFloat = Field(
        "auto",
        description="mixtures of experts: adds so many times the loss that keeps experts evenly loaded; auto: as the"
        " model's config says (router_aux_loss_coef), and 0 where its family has no such loss",
    )

    @model_validator(mode="after")
    def _settings_are_used(self) -> "ObjectiveConfig":
        used = {"loss", *LOSSES[self.loss].settings}
        unused = [
            f"{name} ({getattr(self, name)})"
            for name, field in type(self).model_fields.items()
            if name not in used and getattr(self, name) != field.default
        ]
        if unused:
            raise ValueError(
                f"loss {self.loss} does not use {' and '.join(unused)}: leave {'them' if len(unused) > 1 else 'it'} "
                f"out; it uses {', '.join(sorted(used - {'loss'})) or 'no other setting'}"
            )
        return self

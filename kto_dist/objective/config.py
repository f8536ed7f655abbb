"""The `kto` section: the loss and its weights."""

from typing import Literal

from pydantic import Field

from kto_dist.base.config import NonNegativeFloat, Positive, PositiveFloat, Section


class KtoConfig(Section):
    """The objective (Eq. 7 and 8 of arXiv 2402.01306)."""

    loss: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="apo_zero_unpaired has no z0, so no KL pairs")
    beta: PositiveFloat = Field(0.1, description="how strongly a log-ratio counts; the paper uses 0.05 to 0.5")
    desirable_weight: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="loss weight of thumbs-up rows; auto: by the paper's rule from the class counts"
    )
    undesirable_weight: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="loss weight of thumbs-down rows; auto likewise"
    )
    kl_pairs_per_step: Positive | None = Field(
        None, description="mismatched pairs that estimate z0 each step; null: one a row; fewer is faster and noisier"
    )

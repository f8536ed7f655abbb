"""What an audit must find before data is fit to train on: the `audit` section of a mining config.

The defaults are starting points, not laws. `min_alpha`: two labellers who agree on 73 % of balanced pairs, as those of
InstructGPT did (arXiv 2203.02155, section 5), have an alpha near 0.45. Each check that fails becomes a line with the
number, the threshold and what to do (checks.py), in the report and when `train` is given the data.
"""

from typing import Annotated

from pydantic import Field

from kto_dist.base.config import Positive, Section

Share = Annotated[float, Field(ge=0, le=1)]


class AuditConfig(Section):
    """Thresholds below or above which the report, and `train`, warn."""

    min_alpha: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.4, description="Krippendorff's alpha between users who judged the same response"
    )
    max_noise: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.2, description="estimated share of single votes that miss what most users would say"
    )
    min_shared: Positive = Field(
        50, description="responses judged by several users, below which agreement counts as unknown"
    )
    max_user_share: Share = Field(0.05, description="one user's share of the loss, after cap and shrinking")
    max_critics_share: Share = Field(0.1, description="share of the loss of all heavy downvoters together")
    max_drift: Share = Field(
        0.15, description="distance of a week's, or a model version's, share of thumbs up from the rest's"
    )
    max_deployment_gap: Share = Field(
        0.1, description="distance of the dataset's share of thumbs up from balance.deployment_up_share"
    )
    max_length_auc: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.75, description="how well length alone tells the classes apart; 0.5: not at all, 1: perfectly"
    )
    max_one_length: Share = Field(
        0.02,
        description="share of the answers that have one exact length, far more than the lengths around it, as where an "
        "export cut them",
    )
    max_cleaned: Share = Field(0.5, description="share of the labelled votes that the cleaning takes")
    min_rows: Positive = Field(200, description="rows of each class in the dataset")
    min_votes: Positive = Field(10, description="votes from which a user can be named a heavy downvoter")
    false_names: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.02, description="expected share of the users named heavy downvoters that are none"
    )
    significance: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.001, description="p-value below which a week's, or a model version's, distance is more than chance"
    )
    resamples: Annotated[int, Field(ge=100)] = Field(2000, description="bootstrap draws behind a confidence interval")
    samples: Annotated[int, Field(ge=0)] = Field(8, description="conflicts that the report quotes")

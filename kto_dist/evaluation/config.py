"""The `evaluate` section."""

from pydantic import Field

from kto_dist.base.config import Positive, Section


class EvaluateConfig(Section):
    """Held-out rows while training."""

    every_steps: Positive | None = Field(None, description="optimizer steps between evaluations; null: first and last")

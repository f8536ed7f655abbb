"""The sections `evaluate`, `answers` and `judge`, and which way each held-out figure gets better."""

import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_dist.base.config import NonNegativeFloat, Place, Positive, Section, Text

_CLASSES = ("desirable", "undesirable")
BETTER: dict[str, Literal["higher", "lower"]] = {
    "auc": "higher",
    "accuracy/all": "higher",
    **{f"accuracy/{name}": "higher" for name in _CLASSES},
    "rewards/margin": "higher",
    "loss": "lower",
    **{f"loss/{name}": "lower" for name in _CLASSES},
    "brier": "lower",
    **{f"brier/{name}": "lower" for name in _CLASSES},
}
"""The figures by which one model is better than another."""


class EvaluateConfig(Section):
    """Held-out rows while training."""

    every_steps: Positive | None = Field(None, description="optimizer steps between evaluations; null: first and last")
    tokens: Positive | None = Field(
        None,
        description="most tokens of an evaluation between the first and the last, KL pairs counted: the same held-out"
        " prompts each time; null: all of them",
    )


Count = Annotated[int, Field(ge=0)]
_KEY = "OPENAI_API_KEY"


class AnswersConfig(Section):
    """Held-out prompts, answered by the model: a handful while training, more by `kto-dist evaluate`."""

    while_training: Count = Field(
        8, description="held-out prompts that a run answers as it goes on, always the same; 0: none"
    )
    every_steps: Positive | None = Field(
        None,
        description="optimizer steps between them, beside the first and the last of a run; null: with every evaluation",
    )
    in_evaluate: Count = Field(
        32,
        description="held-out prompts that `kto-dist evaluate` has answered by the model and its reference, and that"
        " answers are drawn to for KL and entropy; 0: none",
    )
    max_tokens: Positive = Field(128, description="of an answer at the most")
    temperature: NonNegativeFloat = Field(
        0.0, description="0: the likeliest token each time; else drawn, by train.seed"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="where answers are drawn: from the likeliest tokens that have this share of the probability"
    )
    batch: Positive = Field(
        16, description="prompts that a device answers at a time; where memory runs out, half of them"
    )
    cache: Place = Field("runs/answers", description="folder of the answers of `kto-dist evaluate`, keyed by content")
    model_url: Text | None = Field(
        None,
        description="`kto-dist evaluate`: OpenAI-compatible API that serves the model, as http://localhost:8000/v1;"
        " null: answered here",
    )
    model_name: Text | None = Field(None, description="its name there; null: the first one")
    reference_url: Text | None = Field(None, description="likewise of the reference")
    reference_name: Text | None = Field(None, description="its name there; null: the first one")
    key: Text = Field(_KEY, description="environment variable with the key of these APIs")

    @model_validator(mode="after")
    def _steps_have_prompts(self) -> "AnswersConfig":
        if self.every_steps is not None and not self.while_training:
            raise ValueError(
                f"every_steps ({self.every_steps}) needs while_training, the number of prompts that are answered then, "
                "to be 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _names_have_addresses(self) -> "AnswersConfig":
        for side in ("model", "reference"):
            if getattr(self, f"{side}_name") and not getattr(self, f"{side}_url"):
                raise ValueError(f"{side}_name is the name at an API: give {side}_url as well")
        return self


INSTRUCTIONS = (
    "You compare two answers to a user's message. The better answer is right, does what was asked, and is as long as "
    "that takes and no longer. Neither its length nor its place speaks for an answer."
)


def _words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


class JudgeConfig(Section):
    """Who says which of two answers is better."""

    by: Literal["function", "command", "endpoint", "mlflow"] | None = Field(
        None,
        description="a Python function, a program, a model behind an OpenAI-compatible API, or one of MLflow's judges;"
        " null: nobody",
    )
    function: Text | None = Field(
        None,
        description="module:function or file.py:function, of (prompt, first, second) that returns first, second or tie,"
        " or of (prompt, answer) that returns a score, the higher the better",
    )
    command: Annotated[tuple[Text, ...], BeforeValidator(_words)] = Field(
        (),
        description="program and arguments: a line of JSON (prompt, first, second) comes in, a line with first, second,"
        " tie or none goes out",
    )
    base_url: Text | None = Field(
        None,
        description="address of an OpenAI-compatible API, as http://localhost:8000/v1; MLflow's judges take it too",
    )
    model: Text | None = Field(
        None, description="name of the model there, null: the first one; for MLflow a name such as openai:/gpt-4o-mini"
    )
    key: Text = Field(_KEY, description="environment variable with the key of that API")
    instructions: Text = Field(INSTRUCTIONS, description="what a model is told to judge by")
    max_tokens: Positive = Field(512, description="tokens of a model's reply at the most")
    parallel: Positive = Field(8, description="comparisons that a model is asked at a time")
    cache: Place | None = Field(
        "runs/verdicts",
        description="folder of what judges have said, keyed by content: none is asked the same twice; null: ask again",
    )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "JudgeConfig":
        given = {name for name in ("function", "command", "base_url", "model") if getattr(self, name)}
        takes = {"function": {"function"}, "command": {"command"}, "endpoint": {"base_url", "model"}}
        takes |= {"mlflow": {"base_url", "model"}}
        needs = {"function": "function", "command": "command", "endpoint": "base_url", "mlflow": "model"}
        if self.by is None:
            if given:
                raise ValueError(f"{', '.join(sorted(given))} is given and by is null: say who judges (by)")
            return self
        if needs[self.by] not in given:
            raise ValueError(f"by ({self.by}) needs {needs[self.by]}")
        if unused := given - takes[self.by]:
            raise ValueError(f"by ({self.by}) does not use {', '.join(sorted(unused))}: leave it out")
        if self.by == "mlflow" and self.key != _KEY:
            raise ValueError(
                f"by (mlflow) does not use key ({self.key}): MLflow reads the variable of the model's provider, as "
                f"{_KEY}; leave it out"
            )
        return self


def better_way(name: str, sets: Sequence[str] = ()) -> Literal["higher", "lower"]:
    """Of `heldout/<figure>` or `heldout/<set>/<figure>`. Raises `ValueError` for what is no such name."""
    figure = name.removeprefix("heldout/")
    of, _, rest = figure.partition("/")
    if figure not in BETTER and of in sets:
        figure = rest
    if not name.startswith("heldout/") or figure not in BETTER:
        known = ", ".join(f"heldout/{each}" for each in BETTER)
        more = f", and heldout/SET/... of {', '.join(sets)}" if sets else ""
        raise ValueError(f"{name!r} is no held-out figure by which models are compared: known are {known}{more}")
    return BETTER[figure]

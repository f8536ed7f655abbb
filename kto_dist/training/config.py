"""The sections of the optimizer's steps, and `Config`: all sections of a run, each from its wing's own file.

It stands here and not in `base`, because it needs the wings' sections: imports run down only.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kto_dist.base.config import (
    Decay,
    NonNegativeFloat,
    Place,
    Positive,
    PositiveFloat,
    Section,
    Text,
    build,
    current_names,
    resolve,
)
from kto_dist.data.config import DataConfig
from kto_dist.evaluation.config import AnswersConfig, EvaluateConfig, JudgeConfig, better_way
from kto_dist.model.config import AdapterConfig, DeepspeedConfig, ModelConfig
from kto_dist.objective.config import ObjectiveConfig
from kto_dist.objective.losses import LOSSES
from kto_dist.record.config import TrackingConfig
from kto_dist.reference.config import ReferenceConfig

ADAPTER_LR = 2e-4
"""Of an adapter, whose few weights have to move further; see docs/adapters.md."""


class TrainConfig(Section):
    """The optimizer's steps."""

    output: Place = Field("runs/kto", description="the run's folder")
    global_batch: Positive = Field(32, description="rows of one optimizer step, over all ranks")
    tokens_per_microbatch: Literal["auto"] | Positive = Field(
        "auto",
        description="most tokens one device runs at a time; auto: 8192 on the CPU, on a GPU as many as its memory is "
        "estimated to hold; where it runs out, half of them",
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="rows end to end without padding; auto: where attention has a variable-length kernel"
    )
    epochs: PositiveFloat = Field(1.0, description="passes over the training rows, reshuffled each time")
    max_steps: Positive | None = Field(None, description="optimizer steps; overrides epochs")
    lr: PositiveFloat = Field(
        5e-6, description=f"peak learning rate of AdamW; for an adapter the default is {ADAPTER_LR:g}"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up; ends at 0")
    warmup: NonNegativeFloat = Field(0.1, description="below 1: a share of all steps; else: a number of steps")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's moment decay rates")
    eps: PositiveFloat = Field(1e-8, description="AdamW's denominator term")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled decay; norms and biases are exempt")
    clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0: no clipping")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 keeps fp32 master weights; auto: bf16 where the device does it well"
    )
    logits_mebibytes: Positive | None = Field(
        None, description="most memory that the LM head's logits take at a time; null: 512 on the CPU, 2048 on a GPU"
    )
    logits_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: fp32, but bf16 for a bf16 model on the CPU, whose matmul gives nothing else"
    )
    stop_after: Positive | None = Field(
        None,
        description="evaluations without a better one, by `checkpoint.best`, that end the run; null: never",
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="row order and KL pairs are a function of it")
    deterministic: bool = Field(
        False, description="the same bits from every run on the same GPUs; slower, see docs/engine-notes.md"
    )
    profile: bool = Field(False, description="write a trace of three steps and a table of where their time went")


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: Positive | None = Field(
        None,
        description="optimizer steps between checkpoints; null: only when the run is stopped, and at its end until the "
        "export is done",
    )
    keep: Positive = Field(2, description="newest checkpoints that stay on disk")
    background: bool = Field(
        False,
        description="whether training goes on while a checkpoint is written: until then each rank keeps a copy of its "
        "part in host memory",
    )
    best: Text | None = Field(
        None,
        description="held-out figure, as heldout/auc: the best evaluation's checkpoint stays beside the newest and is"
        " what is exported; null: the last step",
    )
    resume: Literal["auto"] | bool = Field(
        "auto",
        description="auto: go on from the newest whole checkpoint; true: insist on one; false: refuse any",
    )


class HealthConfig(Section):
    """When a run is stopped, or its user is warned."""

    max_kl: PositiveFloat | None = Field(
        200.0, description="nats: stop when the size of kl_raw stays above it for `patience` steps; null: never"
    )
    patience: Positive = Field(3, description="consecutive steps beyond a limit before the rule acts")
    on_trouble: Literal["stop", "warn"] = Field("stop", description="stop (with a checkpoint) or only warn")
    rules: tuple[Text, ...] = Field(
        (), description="rules of your own: Python functions, as module:function or file.py:function"
    )


def _with_own_rate(values: dict[str, Any]) -> dict[str, Any]:
    """An adapter's default learning rate, where none is given."""

    adapter, train = values.get("adapter"), values.get("train", {})
    kind = adapter.type if isinstance(adapter, AdapterConfig) else isinstance(adapter, dict) and adapter.get("type")
    if kind not in ("lora", "dora"):
        return values
    if isinstance(train, TrainConfig) and "lr" not in train.model_fields_set:
        return {**values, "train": train.model_copy(update={"lr": ADAPTER_LR})}
    return {**values, "train": {"lr": ADAPTER_LR, **train}} if isinstance(train, dict) else values


class ClusterConfig(Section):
    """Several ranks, on one host or many: how long they wait, and what they are given."""

    timeout: PositiveFloat = Field(
        600.0, description="seconds after which a rank that is silent, or holds the others up, ends the job by name"
    )
    grace: PositiveFloat = Field(
        600.0,
        description="seconds between SIGTERM and the end: for the step that is being done, and for its checkpoint",
    )
    min_nodes: Positive | None = Field(
        None, description="fewest hosts that `kto-dist launch` starts again with where one is lost; null: all of them"
    )

    @model_validator(mode="after")
    def _timeout_is_none_of_haste(self) -> "ClusterConfig":
        if self.timeout < 5:
            raise ValueError(f"timeout ({self.timeout}) must be at least 5 seconds: ranks are seldom at one place")
        return self


class Config(Section):
    """One training run. `Config.load` reads it from YAML; `Config(**sections)` builds it in Python."""

    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    answers: AnswersConfig = AnswersConfig()
    judge: JudgeConfig = JudgeConfig()
    health: HealthConfig = HealthConfig()
    cluster: ClusterConfig = ClusterConfig()

    RENAMED: ClassVar[dict[str, str]] = {"kto": "objective"}

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        return _with_own_rate(current_names(values, cls.RENAMED)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        loss = LOSSES[self.objective.loss]
        if loss.has_z0 and self.train.global_batch < 2:
            raise ValueError(
                f"train.global_batch ({self.train.global_batch}) must be at least 2 with objective.loss {loss.name}: "
                "z0 is the mean over mismatched pairs of the same batch, and one row has no partner; raise it, or use "
                "apo_zero_unpaired"
            )
        if self.train.global_batch % loss.unit:
            raise ValueError(
                f"train.global_batch ({self.train.global_batch}) must be even with objective.loss {loss.name}: it "
                "counts rows, and a pair, which is two of them, is never cut"
            )
        if self.data.soft_labels and loss.unit > 1:
            raise ValueError(
                f"data.soft_labels (true) gives an answer both labels, each by its probability, and objective.loss "
                f"{loss.name} takes pairs of a good and a bad one: use kto, apo_zero_unpaired or sft, or false"
            )
        pairs = self.objective.kl_pairs_per_step
        if pairs is not None and pairs > self.train.global_batch:
            raise ValueError(
                f"objective.kl_pairs_per_step ({pairs}) must be at most train.global_batch "
                f"({self.train.global_batch}): each row has one partner"
            )
        if self.answers.every_steps is not None and self.data.heldout is None:
            raise ValueError(
                f"answers.every_steps ({self.answers.every_steps}) needs data.heldout: it is held-out prompts that are "
                "answered"
            )
        self._check_best()
        self._check_quantization()
        if self.tracking.register_as and self.adapter.type != "none" and not self.adapter.merged:
            raise ValueError(
                f"tracking.register ({self.tracking.register_as}) needs adapter.merged: what is registered is loaded "
                "as a whole model; set adapter.merged to true"
            )
        for name, tokens, unit in (
            ("train.tokens_per_microbatch", self.train.tokens_per_microbatch, loss.unit),
            ("reference.tokens_per_batch", self.reference.tokens_per_batch, 1),
        ):
            if tokens != "auto" and tokens < self.data.max_length * unit:
                times, what = ("", "row") if unit == 1 else (f"{unit} times ", "pair")
                raise ValueError(
                    f"{name} ({tokens}) must be at least {times}data.max_length ({self.data.max_length}): "
                    f"the longest {what} must fit on a device; raise it, or lower data.max_length"
                )
        return self

    def _check_quantization(self) -> None:
        packed = self.model.quantization
        if packed != "none" and self.adapter.type != "lora":
            # peft's DoRA beside packed weights was measured to change the model before it has learned anything
            raise ValueError(
                f"model.quantization ({packed}) needs adapter.type lora, not {self.adapter.type}: weights in 4 bits "
                "have no gradient, and DoRA takes norms of them that are not theirs"
            )
        if packed != "none" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                f"model.quantization ({packed}) needs deepspeed.zero_stage 0, 1 or 2, not 3: ZeRO-3 would cut weights "
                "apart from the scales that unpack them; in 4 bits a whole copy is a quarter of one in bf16"
            )
        mine = self.reference.quantization
        theirs = packed if mine == "auto" else mine
        if theirs != "none" and (self.reference.zero_stage == 3 or self.reference.offload != "none"):
            raise ValueError(
                f"reference.quantization ({theirs}) needs reference.zero_stage 0 and reference.offload none: ZeRO-3 "
                "would cut weights apart from the scales that unpack them"
            )

    def _check_best(self) -> None:
        best = self.checkpoint.best
        if best is None and self.train.stop_after is not None:
            raise ValueError(
                f"train.stop_after ({self.train.stop_after}) needs checkpoint.best: the held-out figure that is to get "
                "better, as heldout/auc"
            )
        if best is None:
            return
        try:
            better_way(best, self.data.heldout_names)
        except ValueError as error:
            raise ValueError(f"checkpoint.best: {error}") from None
        if self.data.heldout is None or self.evaluate.every_steps is None:
            raise ValueError(
                f"checkpoint.best ({best}) needs data.heldout and evaluate.every_steps: without them there is one "
                "evaluation after training, and nothing to choose from"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "Config":
        """Reads a YAML file and applies `section.key=value` overrides.

        Raises `UserError` for a missing file, broken YAML, an unknown key or a value outside its rule.
        """
        return resolve(path, overrides, kind=cls)[0]

    @classmethod
    def build(cls, tree: dict[str, dict[str, Any]]) -> "Config":
        """From nested plain values. Raises `UserError` that lists every problem at once."""
        return build(tree, kind=cls)

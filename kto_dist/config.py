"""What a run is: typed, documented, strict settings, and where each value came from.

In:  a YAML file and `section.key=value` overrides (last wins), or keyword arguments from Python.
Out: `Config`, frozen, every field validated when it is built; unknown keys name the nearest known one.

Each field's description is the documentation that `kto-dist config` and the README show, so it states the unit.
Rules that need more than one field live in the validators of the section (or of `Config`) that owns the fields.
Paths are kept as written: relative ones are relative to the working directory, as in the peers' tools.
"""

import difflib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kto_dist.errors import UserError

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")


class _StrictLoader(yaml.SafeLoader):
    """A key that is written twice is an error: plain YAML silently drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is written twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _one_path_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
Paths = Annotated[tuple[Text, ...], BeforeValidator(_one_path_as_list), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy, and the reference where `reference.path` is empty."""

    path: Text = Field(description="Hugging Face folder or hub name of the model to align")
    gguf_file: str | None = Field(None, description="GGUF file inside `path`, unpacked to dense weights at load")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="attention implementation; auto: flash_attention_2 on GPUs where installed, else sdpa"
    )
    gradient_checkpointing: bool = Field(False, description="recompute each decoder layer in backward, to save memory")


class ReferenceConfig(Section):
    """The frozen reference, scored once into a store; nothing here is taken from the policy's settings."""

    path: str | None = Field(None, description="the reference model; null: the policy's own starting weights")
    gguf_file: str | None = Field(None, description="GGUF file inside `reference.path`")
    store: Text = Field("runs/reference", description="folder of the log-prob store, shared by any number of runs")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the reference runs, whatever the policy runs on; auto: a GPU where there is one"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device does it well")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="attention implementation, as for `model.attention`"
    )
    zero_stage: Literal["auto", 0, 3] = Field(
        "auto", description="0: a whole copy on every device; 3: sharded over the ranks; auto: 3 when offloaded, else 0"
    )
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="where ZeRO-3 keeps the parameters")
    nvme_path: str | None = Field(None, description="fast local disk for offload: nvme")
    tokens_per_batch: Positive = Field(8192, description="tokens a device scores at a time")
    packing: Literal["auto"] | bool = Field("auto", description="rows end to end without padding, as `train.packing`")
    share_prefixes: Literal["auto"] | bool = Field(
        "auto", description="score a prompt once for all of its completions; auto: on the CPU, where it saves work"
    )
    logits_mebibytes: Positive | None = Field(
        None, description="most memory that the LM head's logits take at a time; null: 512 on the CPU, 2048 on a GPU"
    )
    logits_dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="as `train.logits_dtype`")

    @model_validator(mode="after")
    def _offload_is_possible(self) -> "ReferenceConfig":
        if self.offload == "nvme" and not self.nvme_path:
            raise ValueError("offload (nvme) needs nvme_path: a folder on a fast local disk")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload ({self.offload}) needs zero_stage 3 or auto: only ZeRO-3 moves parameters away")
        if self.packing is True and self.share_prefixes is True:
            raise ValueError(
                "packing and share_prefixes are both true, and a row holds either pairs end to end or completions of "
                "one prompt: leave one on auto"
            )
        if self.gguf_file and not self.path:
            raise ValueError(f"gguf_file ({self.gguf_file}) needs reference.path, the folder that holds it")
        return self


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


class KtoConfig(Section):
    """The objective (DESIGN section 3; Eq. 7 and 8 of arXiv 2402.01306)."""

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


class TrainConfig(Section):
    """The optimizer's steps."""

    output: Text = Field("runs/kto", description="the run's folder")
    global_batch: Positive = Field(32, description="rows of one optimizer step, over all ranks")
    tokens_per_microbatch: Positive = Field(8192, description="most tokens one device runs at a time")
    packing: Literal["auto"] | bool = Field(
        "auto", description="rows end to end without padding; auto: where attention has a variable-length kernel"
    )
    epochs: PositiveFloat = Field(1.0, description="passes over the training rows, reshuffled each time")
    max_steps: Positive | None = Field(None, description="optimizer steps; overrides epochs")
    lr: PositiveFloat = Field(5e-6, description="peak learning rate of AdamW")
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
    seed: Annotated[int, Field(ge=0)] = Field(0, description="row order and KL pairs are a function of it")


class DeepspeedConfig(Section):
    """How ZeRO shards the policy."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="what is sharded: 0 nothing (fp32 only; bf16 uses 1), 1 optimizer, 2 + gradients, 3 + weights"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where optimizer states live")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="where ZeRO-3 keeps the weights")
    nvme_path: str | None = Field(None, description="fast local disk for offload to nvme")
    config: str | None = Field(None, description="JSON file of further DeepSpeed options, merged and checked")

    @model_validator(mode="after")
    def _offload_is_possible(self) -> "DeepspeedConfig":
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters ({self.offload_parameters}) needs zero_stage 3, not {self.zero_stage}: "
                "lower stages keep whole weights on every device"
            )
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer ({self.offload_optimizer}) needs zero_stage 1, 2 or 3, not 0")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(f"offload_optimizer (nvme) needs zero_stage 3, not {self.zero_stage}")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise ValueError("offload to nvme needs nvme_path: a folder on a fast local disk")
        return self


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(True, description="false: metrics.jsonl and the report only")
    uri: str | None = Field(None, description="MLflow tracking URI; null: a SQLite file beside the runs")
    experiment: Text = Field("kto", description="MLflow experiment")
    run_name: str | None = Field(None, description="MLflow run; null: the name of the output folder")
    log_model: bool = Field(False, description="upload the exported model as an artifact of the run")
    register_as: str | None = Field(
        None, alias="register", description="name in the model registry (uploads the model)"
    )

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: Positive | None = Field(None, description="optimizer steps between checkpoints; null: only on SIGTERM")
    keep: Positive = Field(2, description="newest checkpoints that stay on disk")
    resume: Literal["auto"] | bool = Field(
        "auto",
        description="auto: go on from the newest whole checkpoint; true: insist on one; false: refuse any",
    )


class EvaluateConfig(Section):
    """Held-out rows while training."""

    every_steps: Positive | None = Field(None, description="optimizer steps between evaluations; null: first and last")


class HealthConfig(Section):
    """When a run is stopped, or its user is warned."""

    max_kl: PositiveFloat | None = Field(
        200.0, description="nats: stop when the size of kl_raw stays above it for `patience` steps; null: never"
    )
    patience: Positive = Field(3, description="consecutive steps beyond a limit before the rule acts")
    on_trouble: Literal["stop", "warn"] = Field("stop", description="stop (with a checkpoint) or only warn")


class Config(Section):
    """One training run. `Config.load` reads it from YAML; `Config(**sections)` builds it in Python."""

    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig
    kto: KtoConfig = KtoConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if self.kto.loss == "kto" and self.train.global_batch < 2:
            raise ValueError(
                f"train.global_batch ({self.train.global_batch}) must be at least 2 with kto.loss kto: z0 is the mean "
                "over mismatched pairs of the same batch, and one row has no partner; raise it, or use "
                "apo_zero_unpaired"
            )
        pairs = self.kto.kl_pairs_per_step
        if pairs is not None and pairs > self.train.global_batch:
            raise ValueError(
                f"kto.kl_pairs_per_step ({pairs}) must be at most train.global_batch ({self.train.global_batch}): "
                "each row has one partner"
            )
        for name, budget in (
            ("train.tokens_per_microbatch", self.train.tokens_per_microbatch),
            ("reference.tokens_per_batch", self.reference.tokens_per_batch),
        ):
            if budget < self.data.max_length:
                raise ValueError(
                    f"{name} ({budget}) must be at least data.max_length ({self.data.max_length}): "
                    "the longest row must fit on a device; raise it, or lower data.max_length"
                )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "Config":
        """Reads a YAML file and applies `section.key=value` overrides.

        Raises `UserError` for a missing file, broken YAML, an unknown key or a value outside its rule.
        """
        return resolve(path, overrides)[0]


# A config: a model whose fields are sections, such as `Config` here or the one of `kto_dist.feedback`.
Kind = TypeVar("Kind", bound=Section)


def resolve(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: type[Kind] = Config
) -> tuple[Kind, dict[str, str]]:
    """The config, and for each `section.key` its origin: `default`, the file's name, or `override`."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist: give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"config {path} is not readable as YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(section, dict | None) for section in tree.values()):
        raise UserError(f"config {path} must hold sections with keys below them, such as `train:` with `lr: 5.0e-6`")
    tree = {name: dict(section or {}) for name, section in tree.items()}
    origin = {f"{name}.{key}": str(path) for name, section in tree.items() for key in section}

    for override in overrides:
        dotted, separator, text = override.partition("=")
        section, dot, key = dotted.partition(".")
        if not (separator and dot and section and key):
            raise UserError(f"override {override!r} must read section.key=value, for example train.lr=1e-6")
        try:
            tree.setdefault(section, {})[key] = yaml.load(text, _StrictLoader)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {override!r} is not readable as YAML: {error}; quote the value, as in \"{dotted}='...'\""
            ) from None
        origin[dotted] = "override"

    overridden = {name for name, source in origin.items() if source == "override"}
    config = build(tree, where=str(path), overridden=overridden, kind=kind)
    for name, key, _ in flatten(config):
        origin.setdefault(f"{name}.{key}", "default")
    return config, origin


def build(
    tree: dict[str, dict[str, Any]],
    where: str = "config",
    overridden: Collection[str] = (),
    kind: type[Kind] = Config,
) -> Kind:
    """A config from nested plain values. Raises `UserError` that lists every problem at once.

    `where` and `overridden` (`section.key`s) say in messages where a value stands.
    """
    try:
        return kind.model_validate(_floats_from_text(tree))
    except ValidationError as error:
        problems = error.errors()
        places = ["override" if ".".join(map(str, p["loc"][:2])) in overridden else where for p in problems]
        raise UserError(
            "\n".join(_explain(p, place, kind) for p, place in zip(problems, places, strict=True))
        ) from None


def flatten(config: Section) -> list[tuple[str, str, Any]]:
    """(section, key, plain value) of every setting, in the order of the classes above."""
    dumped = config.model_dump(mode="json", by_alias=True)
    return [(name, key, value) for name, section in dumped.items() for key, value in section.items()]


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def check_model_path(name: str, path: str) -> None:
    """Raises `UserError` for what can only be a folder, and is none: a hub's name has one slash at the most."""
    if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).exists():
        raise UserError(f"{name} ({path}) does not exist: check the path; relative ones start at {Path.cwd()}")


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's own DeepSpeed options (`deepspeed.config`). Raises `UserError`."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed.config ({path}) does not exist: give a JSON file, or null") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"deepspeed.config ({path}) is not readable as JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"deepspeed.config ({path}) must hold a JSON object of DeepSpeed options")
    return options


def _floats_from_text(tree: dict[str, Any]) -> dict[str, Any]:
    # YAML 1.1 reads `1e-6` as text, because it has no dot; people write it all the same.
    def convert(value: Any) -> Any:
        return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value

    return {
        name: {key: convert(value) for key, value in section.items()} if isinstance(section, dict) else section
        for name, section in tree.items()
    }


# What the settings are called in transformers and TRL.
_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "per_device_train_batch_size": "tokens_per_microbatch",
    "bf16": "dtype",
    "save_steps": "every_steps",
    "loss_type": "loss",
}


def _explain(problem: Any, where: str, kind: type[Section]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        if len(location) == 1:
            known, what = list(kind.model_fields), "section"
        else:
            section = kind.model_fields[location[0]].annotation
            known, what = [field.alias or name for name, field in section.model_fields.items()], "key"
        near = difflib.get_close_matches(_ELSEWHERE.get(location[-1], location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown {what} {'.'.join(location)}: {hint}"
    # A union's error names the branch that failed after the field; section.key is what the user wrote.
    name = ".".join(location[:2])
    if problem["type"] == "missing" and len(location) == 1:
        fields = kind.model_fields[name].annotation.model_fields
        needed = {key: field for key, field in fields.items() if field.is_required()} or fields
        wanted = [f"{name}.{key} ({field.description})" for key, field in needed.items()]
        return f"{where}: {name} is required: give {', '.join(wanted)}"
    if problem["type"] == "missing":
        return f"{where}: {name} is required: {_description(location, kind)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {name + ': ' if name else ''}{message}"
    return f"{where}: {name} ({problem['input']!r}): {message}; {_description(location, kind)}"


def _description(location: list[str], kind: type[Section]) -> str:
    section = kind.model_fields.get(location[0])
    if section is None or len(location) < 2:
        return "see `kto-dist config --help`"
    for name, field in section.annotation.model_fields.items():
        if location[1] in (name, field.alias):
            return field.description or ""
    return ""

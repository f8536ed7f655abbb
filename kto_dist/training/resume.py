"""A run that goes on: what of its settings makes it another run, what is applied and said, and what changes nothing.

Every setting of the config stands in one of the groups below; a test holds that, so that a new one has to decide.
"""

from pathlib import Path
from typing import Any

import torch

from kto_dist.base.errors import UserError
from kto_dist.base.files import sha256_of
from kto_dist.model.adapters import Adapter
from kto_dist.training.checkpoint import NO_ADAPTER, State
from kto_dist.training.config import Config

BY_CONTENT = frozenset(
    {"model.path", "model.gguf_file", "reference.path", "reference.gguf_file", "adapter.start"}
    | {f"data.{name}" for name in ("train", "columns", "template_kwargs", "max_length", "max_prompt_length")}
    | {"data.on_bad_row", "data.soft_labels"}
)
"""Refused where what they lead to, weights or tokenised rows, is another one: part of `identity` by a fingerprint."""
REFUSED = frozenset(
    {"train.seed", "train.global_batch", "train.dtype", "deepspeed.zero_stage"}
    | {
        f"objective.{name}"
        for name in ("loss", "beta", "desirable_weight", "undesirable_weight", "kl_pairs_per_step", "pairs")
    }
    | {"objective.label_smoothing", "objective.sft_weight", "objective.router_loss"}
    | {f"adapter.{name}" for name in ("type", "rank", "alpha", "targets")}
    | {"model.quantization"}
)
"""Part of `identity` as they are."""
END = frozenset({"train.epochs", "train.max_steps"})
"""Applied and said as the number of steps."""
APPLIED = frozenset(
    {f"train.{name}" for name in ("lr", "schedule", "warmup", "betas", "eps", "weight_decay", "clip")}
    | {f"train.{name}" for name in ("tokens_per_microbatch", "packing", "logits_mebibytes", "logits_dtype")}
    | {"train.deterministic", "model.attention", "model.kernels", "model.gradient_checkpointing"}
    | {
        f"reference.{name}"
        for name in ("device", "dtype", "attention", "kernels", "zero_stage", "offload", "quantization")
    }
    | {f"reference.{name}" for name in ("tokens_per_batch", "packing", "share_prefixes", "logits_mebibytes")}
    | {"reference.logits_dtype", "deepspeed.offload_optimizer", "deepspeed.offload_parameters", "deepspeed.config"}
    | {
        "data.heldout",
        "data.slices",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "evaluate.every_steps",
        "evaluate.tokens",
    }
    | {"checkpoint.best", "train.stop_after"}
    | {"health.max_kl", "health.patience", "health.on_trouble", "health.rules"}
)
"""Applied from the checkpoint on, and said: they change the trajectory, its rounding, or what is written and when."""
ASIDE = frozenset(
    {"train.output", "train.profile", "data.workers", "data.cache", "reference.store", "checkpoint.resume"}
    | {"checkpoint.background"}
    | {"reference.nvme_path", "deepspeed.nvme_path", "model.trust_remote_code", "reference.trust_remote_code"}
    | {f"tracking.{name}" for name in ("enabled", "uri", "experiment", "report", "run_name", "log_model")}
    | {"tracking.register_as", "adapter.merged"}
    | {f"judge.{name}" for name in ("by", "function", "command", "base_url", "model", "key", "instructions")}
    | {"judge.max_tokens", "judge.parallel", "judge.cache", "cluster.timeout", "cluster.grace", "cluster.min_nodes"}
    | {f"answers.{name}" for name in ("while_training", "every_steps", "in_evaluate", "max_tokens", "temperature")}
    | {"answers.top_p", "answers.batch"}
    | {f"answers.{name}" for name in ("cache", "model_url", "model_name", "reference_url", "reference_name", "key")}
)
"""Where things lie, who may load them and who watches: applied without a word."""


def identity(
    config: Config,
    *,
    data: str,
    policy: str,
    reference: str | None,
    zero_stage: int,
    dtype: torch.dtype,
    router_loss: float,
    adapter: Adapter | None = None,
    start: str | None = None,
) -> dict[str, Any]:
    """`data`, `policy` and `reference`: fingerprints of the tokenised rows, of the starting weights, and of the
    reference's where it is another model. `adapter`, and `start`, the fingerprint of its first values: what is trained.
    `router_loss`: the coefficient that is used, 0 without experts.

    The ZeRO stage leaves the trajectory alone, but another stage cannot read the optimizer's states.
    """
    return {
        "data": data,
        "model": policy,
        "reference": reference,
        "train.seed": config.train.seed,
        "train.global_batch": config.train.global_batch,
        "train.dtype": str(dtype).removeprefix("torch."),
        "deepspeed.zero_stage": zero_stage,
        **NO_ADAPTER,
        "model.quantization": config.model.quantization,
        "adapter.type": config.adapter.type,
        **({} if adapter is None else {f"adapter.{name}": value for name, value in adapter.to_dict().items()}),
        "adapter.start": start,
        **{f"objective.{key}": value for key, value in config.objective.model_dump(mode="json").items()},
        "objective.router_loss": router_loss,
    }


def settings_of(config: Config, *, steps: int, heldout: str | None) -> dict[str, Any]:
    """Of `APPLIED`, and the number of steps. `heldout`: the fingerprint of the held-out rows; a file counts by its
    content."""
    sections = config.model_dump(mode="json")
    found = {name: sections[name.partition(".")[0]][name.partition(".")[2]] for name in sorted(APPLIED)}
    found["data.heldout"] = heldout
    options = config.deepspeed.config
    if options is not None and Path(options).is_file():  # else it is refused, when it is read
        found["deepspeed.config"] = sha256_of(Path(options))
    return {**found, "steps": steps}


def check_same_run(found: State, now: State, output: str) -> None:
    """Raises `UserError` when the checkpoint is another run's, or beyond this one's end."""
    if "reference" not in found.identity and now.identity["reference"] is not None:
        raise UserError(
            f"the checkpoint in train.output ({output}) does not say from which weights its policy started: an older "
            "version of kto_dist wrote it, which noted those of reference.path alone. Go on with that version, give "
            "another train.output, or delete the folder's checkpoints"
        )
    # an older version had no router's loss
    noted = {"objective.router_loss": 0.0} | found.identity
    differing = [
        f"{key} was {noted.get(key)!r} and is {value!r}"
        for key, value in now.identity.items()
        if noted.get(key) != value
        # an older version did not note what `auto` meant
        and not (key == "train.dtype" and noted.get(key) == "auto")
    ]
    if differing:
        raise UserError(
            f"the checkpoint in train.output ({output}) belongs to another run: {'; '.join(differing)}. "
            "Give another train.output, or delete the folder's checkpoints"
        )
    if found.step > now.settings["steps"]:
        raise UserError(
            f"this run has {now.settings['steps']:,} steps, and the checkpoint in train.output ({output}) has done "
            f"{found.step:,}: raise train.max_steps or train.epochs, or give another train.output. (kto-dist export "
            "writes the model of a checkpoint)"
        )


def changes(found: State, now: State) -> list[str]:
    """What is another setting from here on."""
    return [
        f"{name} is {value!r} (was {found.settings[name]!r})"
        for name, value in now.settings.items()
        if found.settings.get(name, value) != value
    ]

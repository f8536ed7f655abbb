"""An adapter's folder, in peft's layout: what it says of itself, and its values.

    adapter_config.json  adapter_model.safetensors

Read here for `adapter.start`, for an evaluation and to be merged; written by `training.export`.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kto_dist.base.errors import UserError
from kto_dist.store.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PREFIX = "base_model.model."
"""Before all names of tensors in a file: those of the model within peft's two wrappers."""

_DECIDES = {"r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern"}
_DECIDES |= {"layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "fan_in_fan_out"}
_REFUSED = {
    "modules_to_save": "it saves whole layers as well, which would be trained beside it",
    "trainable_token_indices": "it trains tokens of the embedding, which may be the LM head's",
    "layer_replication": "it has layers of the model twice",
    "lora_bias": "it has biases of its own",
    **dict.fromkeys(
        ("velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora", "arrow_config"),
        "it is a variant of LoRA that is not trained here",
    ),
    "kasa_config": "it is a variant of LoRA that is not trained here",
    "megatron_config": "it is for Megatron's layers",
}


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_json(setting: str, folder: Path) -> dict[str, Any]:
    """Its adapter_config.json as it is. Raises `UserError`."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise UserError(f"{setting} ({folder}) holds no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object: save the adapter again")
    return found


def read_settings(setting: str, folder: Path) -> dict[str, Any]:
    """What decides how the adapter of a folder computes, as settings of a `LoraConfig`. Raises `UserError`.

    Dropout is left out: it would make the policy random. So is how values were drawn.
    """
    found = read_json(setting, folder)
    if found.get("peft_type") != "LORA":
        raise UserError(f"{setting} ({folder}) is an adapter of type {found.get('peft_type')}: only LoRA and DoRA are")
    for name, reason in _REFUSED.items():
        if found.get(name):
            raise UserError(f"{setting} ({folder}) has {name} ({found[name]}): {reason}")
    if found.get("bias", "none") != "none":
        raise UserError(f"{setting} ({folder}) has bias ({found['bias']}): it trains biases of the model beside it")
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{setting} ({folder}) has init_lora_weights ({start}), which changes the model's own weights as well: "
            "convert it to a plain LoRA (peft's path_initial_model_for_weight_conversion) and give that"
        )
    if not isinstance(found.get("r"), int) or not found.get("target_modules"):
        raise UserError(f"{folder / ADAPTER_CONFIG} lacks r or target_modules: save the adapter again")
    settings = {name: found[name] for name in sorted(_DECIDES) if found.get(name) is not None}
    return {"lora_alpha": 8, "use_dora": False, "task_type": "CAUSAL_LM", **settings}


def base_of(folder: Path) -> str:
    """The model that an adapter says it is for. Raises `UserError` where it says none."""
    named = read_json("the adapter", folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} does not name base_model_name_or_path: set it to the adapter's model"
        )
    return named


def read_values(folder: Path) -> dict[str, Tensor]:
    """Its tensors by their names in the file. Raises `UserError`."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS}: save the adapter again with safetensors")
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} cannot be read as weights, it is damaged or cut short: {error}") from None


def named_in_files(name: str, adapter: str) -> str:
    """What a parameter of a model is called in a file."""
    # DoRA's magnitudes lie in a module of their own, and in files they do not
    name = name.replace(f".lora_magnitude_vector.{adapter}.weight", ".lora_magnitude_vector")
    return PREFIX + name.replace(f".{adapter}.", ".")

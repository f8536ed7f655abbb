"""A Hugging Face model from its folder: config, tokenizer, and a model without randomness in one dtype.

In:  a folder or hub name. Out: `load_config`, `load_tokenizer`, `load_model`; `UserError` for what does not load, and
for weights that the files lack: transformers would draw them at random and go on.

`set_modes` makes the policy's function the reference's: everything computes as in evaluation.
"""

import copy
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kto_dist.base.errors import UserError
from kto_dist.model import hub
from kto_dist.model.attention import refuse_sinks
from kto_dist.model.config import check_model_path
from kto_dist.model.kernels import fuse
from kto_dist.model.memory import is_out_of_memory

_AUTO = "AutoModelForCausalLM"

# What transformers raises for a folder that it cannot make sense of.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)


def load_config(
    path: str, gguf_file: str | None = None, name: str = "model.path", *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """`name`: the setting that gives `path`. Raises `UserError` where there is no causal language model to load."""
    check_model_path(name, path)
    hub.require(name, path)
    try:
        # never None, for which transformers asks on stdin
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **_gguf(gguf_file))
    except _UNREADABLE as error:
        if _wants_trust(error):
            raise UserError(_untrusted(name, path)) from None
        if isinstance(error, StrictDataclassError | ArithmeticError):
            raise UserError(
                f"{name} ({path}) has a config.json with a wrong value: {one_line(error)}; correct it, or take the "
                "checkpoint's own"
            ) from None
        raise UserError(
            f"{name} ({path}) holds no Hugging Face model: {one_line(error)}; give a folder with config.json and "
            "weights, or the name of a model on the hub"
        ) from None
    if trust_remote_code and _AUTO in (getattr(config, "auto_map", None) or {}):
        _register(name, path, config)
    if model_class(config) is None:
        if _AUTO in (getattr(config, "auto_map", None) or {}):
            raise UserError(_untrusted(name, path))
        raise UserError(
            f"{name} ({path}) is a {config.model_type} model, and transformers {transformers.__version__} has no "
            "causal language model of that kind: give another, or set model_type in its config.json right"
        )
    return config


def _register(name: str, path: str, config: PretrainedConfig) -> None:
    """Makes the class that the folder brings along known, as transformers does when it loads the weights."""
    reference = config.auto_map[_AUTO]
    repository, _, reference = reference.rpartition("--")
    try:
        found = get_class_from_dynamic_module(reference, repository or path)
    except (*_UNREADABLE, ImportError, SyntaxError) as error:
        raise UserError(f"the code that {name} ({path}) brings along does not load: {one_line(error)}") from None
    AutoModelForCausalLM.register(type(config), found, exist_ok=True)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """What transformers makes of a config."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(found, list | tuple):
        return found
    by_name = {each.__name__: each for each in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


def own_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that its class is built from: of a multimodal model that is loaded as text, the text's."""
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(model_class(config), "config_class", None) == text:
        return config.get_text_config()
    return config


def without_contents(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on torch's meta device: its weights have shapes and nothing in them."""
    with torch.device("meta"):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(own_config(config), trust_remote_code=trust_remote_code)
    return lm


def load_tokenizer(
    path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **_gguf(gguf_file))
    except (*_UNREADABLE, ImportError) as error:
        if _wants_trust(error):
            raise UserError(_untrusted("model.path", path, "tokenizer")) from None
        raise UserError(
            f"model.path ({path}) has no tokenizer that loads: {one_line(error)}; save one beside the weights "
            "(tokenizer.save_pretrained)"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token: a completion needs an end; set tokenizer.eos_token")
    return tokenizer


def load_model(
    path: str,
    *,
    gguf_file: str | None,
    dtype: torch.dtype,
    attention: str,
    kernels: str = "none",
    quantization: str = "none",
    config: PretrainedConfig | None = None,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The model in `dtype`, in evaluation mode. Raises `UserError` where weights are missing, or it does not load.

    `warn`: is told of what quantised files hold beside; of others `model.weights` knows it from their headers.
    """
    # a copy: the export writes the given one
    config = copy.deepcopy(config) if config else load_config(path, gguf_file, trust_remote_code=trust_remote_code)
    without_noise(config)
    packed = getattr(config, "quantization_config", None) is not None
    extra = _gguf(gguf_file)
    if gguf_file:
        # packed GGUF weights can be neither trained nor saved
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if quantization != "none":
        extra["quantization_config"] = _in_4_bits(path, quantization, dtype, config, gguf_file)
    loader: Any = AutoModelForCausalLM  # its type does not know `output_loading_info`
    lm: PreTrainedModel
    try:
        lm, found = loader.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **extra,
        )
    except (*_UNREADABLE, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the model at {path} does not load with attention {attention}: {one_line(error)}") from None
    if found["missing_keys"]:
        raise UserError(
            f"the files of {path} lack {len(found['missing_keys'])} tensors that {type(lm).__name__} needs, which "
            f"would be random numbers: {shortened(found['missing_keys'])}; give a checkpoint that has them"
        )
    if warn is not None and packed and (left := found["unexpected_keys"]):
        warn(
            f"{len(left)} tensors of the files of {path} have no place in the model and are not used: "
            f"{shortened(left)}; if they should be, config.json is another model's"
        )
    refuse_sinks(lm, attention, path)
    _in_one_dtype(lm, dtype)
    if kernels == "liger":
        fuse(lm)
    return lm


def _in_4_bits(
    path: str, kind: str, dtype: torch.dtype, config: PretrainedConfig, gguf_file: str | None
) -> transformers.BitsAndBytesConfig:
    """Packed into tensors of the dtype that is computed in, as whoever shards or copies parameters expects them."""
    if gguf_file or getattr(config, "quantization_config", None):
        raise UserError(f"the model at {path} is packed in its files already: set model.quantization to none")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        bnb_4bit_use_double_quant=True,
    )


def pick_quantization(setting: str, name: str, *, like: str = "none") -> str:
    """`auto`: as `like`. Raises `UserError` where the package is missing."""
    picked = like if name == "auto" else name
    if picked != "none" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{setting} ({picked}) needs the package bitsandbytes, which is not installed: pip install "
            "'kto_dist[qlora]', or set it to none"
        )
    return picked


def without_noise(config: PretrainedConfig) -> None:
    """Sets every probability of a dropout to 0, in the parts of a composite config too.

    Only what is random counts: other numbers, such as phimoe's `router_jitter_noise`, decide what is computed in
    evaluation as well.
    """
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_noise(value)
        # dropout, layerdrop, resid_pdrop
        elif isinstance(value, float) and value > 0 and "drop" in key:
            setattr(config, key, 0.0)
    if hasattr(config, "rescale_every"):
        # rwkv divides its weights in evaluation, in place, and its hidden states along with them: nothing in fp32 and
        # bf16, whose range suffices, and an export would write the divided ones
        config.rescale_every = 0


def set_modes(lm: PreTrainedModel) -> None:
    """Evaluation mode, for the policy as for its reference; training mode only where transformers recomputes in
    backward, which it does in that mode alone.

    In training mode families do more than dropout: they add noise to what routers see (mixtral, dbrx), draw experts
    at random (phimoe), or clip weights (gemma3n), and the policy would be another function than its reference.
    """
    # reformer's reversible layers have a backward in training mode alone
    lm.train(lm.config.model_type in _TRAIN_IN_TRAINING_MODE)
    for module in lm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


_TRAIN_IN_TRAINING_MODE = {"reformer"}


def refuse_packed(lm: PreTrainedModel, path: str) -> None:
    """Raises `UserError` for weights that stay quantised in memory: they have no gradient."""
    packed = [n for n, p in lm.named_parameters() if not p.is_floating_point() or p.element_size() < 2]
    if packed:
        raise UserError(
            f"model.path ({path}) is quantised, and {len(packed)} of its tensors stay so in memory "
            f"({shortened(packed, 3)}), where they cannot be trained: give the checkpoint in bf16, fp16 or fp32"
        )


def _in_one_dtype(lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds what the family would keep in fp32 (`_keep_in_fp32_modules_strict`), since DeepSpeed does: policy and
    reference are then rounded alike."""
    for parameter in lm.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def check_context(config: PretrainedConfig, max_length: int) -> None:
    """Raises `UserError` when rows may be longer than what the model has positions for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and max_length > limit:
        raise UserError(
            f"data.max_length ({max_length}) must be at most the model's context of {limit} tokens "
            "(max_position_embeddings): lower it; longer rows are then cut, and counted"
        )


def one_line(error: BaseException) -> str:
    """Its message without line breaks, cut where it lists what there is."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def shortened(names: Any, most: int = 6) -> str:
    """Names of tensors, with one line for those that differ by a number alone."""
    alike = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name) for name in names})
    return ", ".join(alike[:most]) + (f" and {len(alike) - most} more" if len(alike) > most else "")


def _gguf(gguf_file: str | None) -> dict[str, Any]:
    return {"gguf_file": gguf_file} if gguf_file else {}


def _wants_trust(error: BaseException) -> bool:
    return "trust_remote_code" in str(error)


def _untrusted(name: str, path: str, what: str = "model") -> str:
    section = name.partition(".")[0]
    return (
        f"the {what} in {name} ({path}) needs Python code that it brings along (auto_map), and code of others is not "
        f"run unasked: read it, then set {section}.trust_remote_code=true"
    )

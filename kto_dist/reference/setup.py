"""Which reference a run has: from which weights, on which device, in which precision, and its fingerprint.

In:  the `reference` and `model` sections and the rows' lengths. Out: `ReferenceSetup` and its fingerprint, both known
without loading a model. `logps.py` goes on from them.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

from kto_dist.base import agree, comm
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data.batch import Cutting
from kto_dist.model.attention import pick_attention, pick_packing, switch_length
from kto_dist.model.causal_lm import pick_dtype, pick_logits, round_width
from kto_dist.model.config import ModelConfig
from kto_dist.model.engines import Placement
from kto_dist.model.kernels import pick_kernels
from kto_dist.model.loading import load_config, pick_quantization
from kto_dist.model.weights import Weights, check_weights
from kto_dist.reference.config import ReferenceConfig
from kto_dist.reference.prefix import T0_OVER_HIDDEN, can_share
from kto_dist.reference.scoring import PassSettings
from kto_dist.store.fingerprint import Fingerprint, fingerprint


@dataclass(frozen=True, kw_only=True)
class ReferenceSetup:
    """The reference as it is going to be loaded: from its own settings, and from which weights."""

    name: str
    """The setting that names it."""
    role: str = "the reference"
    """What it is called when it is spoken of: any model can be scored as a reference is."""
    path: str
    gguf_file: str | None
    trust_remote_code: bool
    model_config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    kernels: str
    packed: bool
    logits_dtype: torch.dtype | None
    """None: fp32 where the device's matmul gives it."""
    share: bool | None
    """`LoadedReference.share_prefixes`, as far as it is known without the model."""
    placement: Placement
    settings: PassSettings
    """How pairs are cut and scored."""
    store: str
    """Folder or URL of the store."""
    quantization: str = "none"
    adapter: Path | None = None
    """The folder of an adapter that it has."""
    weights: Weights = field(default_factory=Weights)
    """What its files hold that is not used, or is rounded."""

    @property
    def logits(self) -> str:
        """In which precision the logits come."""
        default = torch.float32 if self.device.type == "cuda" else self.dtype
        return _named(self.logits_dtype or default)

    @cached_property
    def folder(self) -> Path:
        """Of the weights: what is hashed is what is loaded, whatever a hub's name means by then."""
        return local_folder(self.path, self.gguf_file, code=self.trust_remote_code)

    def fingerprint(self) -> Fingerprint:
        """Of the weights as they lie there now; files that are as they were are not read again."""
        return fingerprint(
            self.folder,
            self.gguf_file,
            self.model_config.to_dict() | self._code(),
            dtype=_named(self.dtype),
            logits=self.logits,
            attention=self.attention,
            kernels=None if self.kernels == "none" else self.kernels,
            quantisation=None if self.quantization == "none" else self.quantization,
            adapter=self.adapter,
        )

    def _code(self) -> dict[str, str]:
        """Of the Python files that the model brings along, where they run: they decide what is computed."""
        if not self.trust_remote_code or not getattr(self.model_config, "auto_map", None):
            return {}
        files = sorted(self.folder.glob("*.py"))
        hashed = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
        return {"code": hashlib.sha256("\n".join(hashed).encode()).hexdigest()}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_reference(
    section: ReferenceConfig, model: ModelConfig, *, max_length: int, prompt_limit: int, adapter: Path | None = None
) -> ReferenceSetup:
    """Raises `UserError` where a setting of the reference cannot be had on this rank."""
    name, path, gguf_file, trust = "reference.path", section.path, section.gguf_file, section.trust_remote_code
    if not path:
        name, path, gguf_file, trust = "model.path", model.path, model.gguf_file, model.trust_remote_code
    model_config = load_config(path, gguf_file, name, trust_remote_code=trust)
    device = reference_device(section)
    dtype = pick_dtype(section.dtype, device)
    attention = pick_attention(
        "reference.attention", section.attention, model_config, device, dtype, like=model.attention
    )
    packed = pick_packing("reference.packing", section.packing, attention, model_config, max_length)
    logits_dtype = pick_logits("reference.logits_dtype", section.logits_dtype, dtype, device)
    return ReferenceSetup(
        name=name,
        path=path,
        gguf_file=gguf_file,
        trust_remote_code=trust,
        model_config=model_config,
        device=device,
        dtype=dtype,
        attention=attention,
        kernels=pick_kernels("reference.kernels", section.kernels, model_config, device, like=model.kernels),
        packed=packed,
        logits_dtype=logits_dtype,
        share=may_share(section, model_config, attention, device, max_length),
        placement=Placement(
            sharded=section.zero_stage == 3 or section.offload != "none",
            offload=section.offload,
            nvme_path=section.nvme_path,
        ),
        settings=PassSettings(
            cutting=Cutting(
                max_length=max_length,
                prompt_limit=prompt_limit,
                tokens=section.tokens_per_batch,
                packed=packed,
                apart=switch_length(model_config, max_length),
                multiple=round_width(device),
            ),
            logits_bytes=None if section.logits_mebibytes is None else section.logits_mebibytes * 2**20,
            logits_dtype=logits_dtype,
            # blt has several widths, and none of its own
            t0=T0_OVER_HIDDEN * getattr(model_config.get_text_config(), "hidden_size", 1024),
            device=device,
        ),
        store=section.store,
        quantization=pick_quantization("reference.quantization", section.quantization, like=model.quantization),
        adapter=adapter,
    )


def find_reference(
    section: ReferenceConfig,
    model: ModelConfig,
    *,
    max_length: int,
    prompt_limit: int,
    console: Console,
    known: Weights | None = None,
    adapter: Path | None = None,
    role: str = "the reference",
) -> tuple[ReferenceSetup, Fingerprint]:
    """Collective. Hashes the weights, and raises `UserError` where some are missing, hosts differ or a setting cannot
    be had. `known`: what was found in the files already, where they are the policy's. `adapter`: the folder of one that
    the reference has. `role`: what it is called."""
    setup = agree.together(
        lambda: pick_reference(section, model, max_length=max_length, prompt_limit=prompt_limit, adapter=adapter)
    )
    if role != setup.role:  # whoever gave another model named it by no setting
        setup = replace(setup, role=role, name=role)
    console.phase("reference")
    weights = known or agree.once_per_host(lambda: _check(setup))
    setup = replace(setup, weights=weights)
    for text in () if known else weights.warnings(setup.name, exported=False):
        console.warn(text)
    found = agree.once_per_host(setup.fingerprint)

    # One value of a pair counts for all ranks, and all of them read equally many micro-batches.
    again = f"copy the model in {setup.name} to each of them again"
    for what, value, remedy in (
        (f"{role}'s weights", found.weights, again),
        (f"{role}'s config.json", found.config, again),
        (f"{role}'s adapter", found.adapter, f"copy {setup.adapter} to each of them again"),
        ("reference.dtype", _named(setup.dtype), "set it to one that all of them can use"),
        ("reference.logits_dtype", setup.logits, "set it, or reference.device"),
        ("reference.attention", setup.attention, "set it to one that all of them have"),
        ("reference.kernels", setup.kernels, "set it to none, or install liger-kernel on all of them"),
        ("reference.packing", setup.packed, "set it"),
        ("reference.share_prefixes", setup.share, "set it to false, or reference.device"),
    ):
        agree.same_everywhere(value, what, remedy)
    return setup, found


def _check(setup: ReferenceSetup) -> Weights:
    return check_weights(setup.name, setup.path, setup.folder, setup.gguf_file, setup.model_config, setup.dtype)


def reference_device(section: ReferenceConfig) -> torch.device:
    """Where the reference runs. Raises `UserError` where that is not possible."""
    if section.device == "auto":
        return comm.device()
    if section.device == "cuda" and not torch.cuda.is_available():
        raise UserError("reference.device (cuda) needs a GPU, and torch finds none here: use auto or cpu")
    if section.device == "cpu" and torch.cuda.is_available() and (section.zero_stage == 3 or section.offload != "none"):
        raise UserError(
            "reference.device (cpu) holds a whole copy a rank, and DeepSpeed shards over the GPUs that it finds here: "
            "with reference.zero_stage 3 or reference.offload leave reference.device on auto"
        )
    return comm.device() if section.device == "cuda" else torch.device("cpu")


def may_share(
    section: ReferenceConfig,
    model_config: PretrainedConfig,
    attention: str,
    device: torch.device,
    max_length: int,
) -> bool | None:
    """`LoadedReference.share_prefixes` as far as it is known before the model is loaded. Raises `UserError`.

    `auto` is for the CPU alone: there sharing was measured to be faster.
    """
    if section.share_prefixes is False:
        return False
    if section.share_prefixes == "auto" and (section.packing is True or device.type != "cpu"):
        return False
    reason = can_share(model_config, attention, max_length)
    if reason and section.share_prefixes is True:
        raise UserError(f"reference.share_prefixes is true, but {reason}; use auto or false")
    if reason:
        return False
    return True if section.share_prefixes is True else None


def local_folder(
    path: str, gguf_file: str | None, fetch: Callable[..., str] = snapshot_download, *, code: bool = False
) -> Path:
    """The folder of a model given by folder or hub name; of a hub's model the files that are going to be loaded.

    `fetch`: what brings them here, given what `snapshot_download` is given. `code`: its Python files too.
    """
    if Path(path).is_dir():
        return Path(path)
    # in the order of `fingerprint.weight_files`: many a model is there twice, and is tens of gigabytes
    kinds = [[gguf_file]] if gguf_file else [["*.safetensors", "*.safetensors.index.json"], ["pytorch_model*.bin*"]]
    try:
        for wanted in kinds:
            folder = Path(fetch(path, allow_patterns=[*wanted, *(["*.py"] if code else ())], ignore_patterns=["*/*"]))
            if any(folder.glob(wanted[0])):
                break
        return folder
    except OSError as error:
        raise UserError(f"the weights of {path} cannot be fetched: {error}; give a folder that holds them") from None

"""An adapter: a few weights beside those of a model, which stay as they are (LoRA, DoRA), put in place by peft.

1. `pick_adapter`   the settings, and what the folder of an adapter says of itself -> `Adapter`, or None
2. `rehearse`       put into the model without contents: what cannot be shows before long work, with the counts
3. `put_in`         into a loaded model, before an engine shards it, with the same values on every rank
4. `merge_in`       into the model's own weights, layer by layer in fp32

A fresh adapter changes nothing: LoRA adds 0, DoRA multiplies by 1. So the reference is the model without it, whatever
its rank, alpha, targets and learning rate. An adapter that a run starts from is a part of its reference.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kto_dist.base.errors import UserError
from kto_dist.model.adapter_files import named_in_files, read_settings, read_values
from kto_dist.model.config import AdapterConfig
from kto_dist.model.loading import one_line, shortened, without_contents

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""What peft calls the one adapter of a model, in names of parameters."""
RANK = 16
ALL_LINEAR = "all-linear"
_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is put into a model."""

    settings: dict[str, Any]
    """Of peft's `LoraConfig`; plain values."""
    start: Path | None
    """The folder that its values come from; None: a fresh one, which changes nothing."""
    seed: int
    """Of a fresh one's values."""

    @property
    def rank(self) -> int:
        return int(self.settings["r"])

    @property
    def alpha(self) -> float:
        return float(self.settings["lora_alpha"])

    @property
    def type(self) -> str:
        return "dora" if self.settings["use_dora"] else "lora"

    @property
    def targets(self) -> str | list[str]:
        """As they were asked for."""
        found = self.settings["target_modules"]
        return found if isinstance(found, str) else [*found, *(self.settings.get("target_parameters") or ())]

    def to_dict(self) -> dict[str, Any]:
        """For the summary, and for what makes a run another one."""
        found = self.targets
        targets = found if isinstance(found, str) else sorted(found)
        return {"type": self.type, "rank": self.rank, "alpha": self.alpha, "targets": targets}

    def peft_config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(**self.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsed:
    """What an adapter comes to in a model."""

    trained: int
    """Weights of the adapter."""
    total: int
    """Weights of the model."""
    modules: tuple[str, ...]
    """Names of the adapted layers."""
    experts: tuple[str, ...]
    """Parameters of experts that stay as they are."""
    rank: int
    largest: int
    """Weights of the largest matrix of the adapter."""
    passed: int
    """Modules of the model with the adapter, as `passed_modules` counts them."""

    def lines(self, adapter: Adapter) -> list[str]:
        """What is said of it."""
        kinds = sorted({name.rpartition(".")[2] for name in self.modules})
        said = [
            f"adapter: {adapter.type} of rank {adapter.rank}, alpha {adapter.alpha:g}, on {len(self.modules)} layers "
            f"({', '.join(kinds)}): {self.trained:,} weights are trained beside {self.total:,} that stay"
        ]
        if self.experts:
            said.append(
                f"adapter: {len(self.experts)} parameters of experts ({shortened(self.experts)}) are no linear layers "
                "and stay as they are; to adapt them too, name them in adapter.targets beside all-linear"
            )
        return said


def pick_adapter(section: AdapterConfig, *, base: str, seed: int) -> Adapter | None:
    """What the settings ask for; None for none. `base`: the model that it is for, as its files are going to name it.

    Raises `UserError` for a folder in `adapter.start` that no run can go on from.
    """
    if section.type == "none":
        return None
    if section.start is not None:
        return _started(section, base=base, seed=seed)
    rank = section.rank or RANK
    settings = _plain(rank, section.alpha or 2 * rank, section.targets or ALL_LINEAR, base, dora=section.type == "dora")
    return Adapter(settings=settings, start=None, seed=seed)


def _plain(rank: int, alpha: float, targets: str | tuple[str, ...], base: str, *, dora: bool) -> dict[str, Any]:
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_dora": dora,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }


def _started(section: AdapterConfig, *, base: str, seed: int) -> Adapter:
    folder = Path(str(section.start))
    settings = read_settings("adapter.start", folder)
    found = "dora" if settings["use_dora"] else "lora"
    if found != section.type:
        raise UserError(
            f"adapter.start ({folder}) is a {found} adapter and adapter.type is {section.type}: set {found}"
        )
    asked = {"rank": section.rank, "alpha": section.alpha, "targets": section.targets}
    there = {"rank": settings["r"], "alpha": settings["lora_alpha"], "targets": settings["target_modules"]}
    for name, value in asked.items():
        same = set(value) == set(there[name]) if isinstance(value, tuple) else value == there[name]
        if value is not None and not same:
            raise UserError(
                f"adapter.{name} ({value}) is not that of adapter.start ({folder}), {there[name]}: leave it out, since "
                "a run goes on with the adapter as it is"
            )
    return Adapter(settings={**settings, "base_model_name_or_path": base}, start=folder, seed=seed)


def from_folder(setting: str, folder: Path) -> Adapter:
    """The adapter that lies there, with its values. Raises `UserError`."""
    return Adapter(settings=read_settings(setting, folder), start=folder, seed=0)


def rehearse(model_config: PretrainedConfig, adapter: Adapter, *, trust_remote_code: bool = False) -> Rehearsed:
    """Raises `UserError` where the model has no place for the adapter, or where its values do not fit."""
    lm = without_contents(model_config, trust_remote_code=trust_remote_code)
    total = sum(p.numel() for p in lm.parameters())
    experts = {name for name, p in lm.named_parameters() if p.dim() == 3 and ".experts." in name}
    _inject(lm, adapter, hollow=True)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    if adapter.start is not None:
        _check_fit(adapter.start, trained)
    return Rehearsed(
        trained=sum(p.numel() for p in trained.values()),
        total=total,
        modules=tuple(sorted({name.partition(".lora_")[0] for name in trained})),
        experts=tuple(sorted(experts - _adapted_parameters(lm))),
        rank=adapter.rank,
        largest=max(p.numel() for p in trained.values()),
        passed=passed_modules(lm),
    )


def passed_modules(lm: nn.Module) -> int:
    """Modules that a forward calls: ZeRO-3 has hooks at each."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return sum(not isinstance(module, lists) for module in lm.modules())


def _adapted_parameters(lm: PreTrainedModel) -> set[str]:
    """Names, in the plain model, of parameters that are adapted and no layer's weight."""
    wrappers = {name: part for name, part in lm.named_modules() if hasattr(part, "parameter_name")}
    return {f"{name.replace('.base_layer', '')}.{part.parameter_name}" for name, part in wrappers.items()}


def injected(lm: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """With peft's layers in place, whatever values they have. Raises `UserError`."""
    _inject(lm, adapter)
    return lm


def put_in(lm: PreTrainedModel, adapter: Adapter) -> None:
    """Into a loaded model, in its dtype: from here on the adapter alone has gradients. Raises `UserError`.

    Collective where weights are sharded already: DoRA reads them.
    """
    dtype = lm.get_output_embeddings().weight.dtype
    _inject(lm, adapter)
    own = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    if adapter.start is not None:
        for name, value in _check_fit(adapter.start, own).items():
            own[name].data.copy_(value)
    else:
        for name, parameter in own.items():
            if ".lora_A." in name:
                parameter.data.copy_(_fresh(name, parameter.shape, adapter.seed))
    for parameter in own.values():
        parameter.data = parameter.data.to(dtype)


def _fresh(name: str, shape: torch.Size, seed: int) -> Tensor:
    """peft's own distribution, as a function of name and seed alone: the same on every rank and machine."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


def _inject(lm: PreTrainedModel, adapter: Adapter, *, hollow: bool = False) -> None:
    """Raises `UserError` for targets that the model does not have, and for its head and embeddings."""
    from peft import inject_adapter_in_model

    config = adapter.peft_config()
    wanted: list[str] = []
    if not isinstance(adapter.targets, str) or adapter.targets == ALL_LINEAR:
        config.target_modules, config.target_parameters, wanted = _placed(lm, adapter)
    asked = bool(config.target_parameters)
    try:
        inject_adapter_in_model(config, lm, adapter_name=NAME, low_cpu_mem_usage=hollow)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{type(lm).__name__} cannot be adapted: {one_line(error)}") from None
    if hasattr(lm.get_output_embeddings(), "base_layer"):
        raise UserError(f"the adapter's targets ({config.target_modules}) take in the LM head, which stays as it is")
    # of some families peft takes names of linear layers for those that the experts once had, and leaves the layers out
    unasked = not asked and any(type(part).__name__ == "ParamWrapper" for part in lm.modules())
    if adapter.start is None and (unasked or not all(hasattr(lm.get_submodule(n), "base_layer") for n in wanted)):
        raise UserError(
            f"peft takes adapter.targets ({adapter.targets}) for the experts of {type(lm).__name__}: name layers that "
            "are no experts' in adapter.targets, as [q_proj, k_proj, v_proj, o_proj]"
        )


def _placed(lm: PreTrainedModel, adapter: Adapter) -> tuple[list[str], list[str], list[str]]:
    """What of the targets are layers, and what are parameters, as those of experts; and the names of all these layers.
    Raises `UserError`."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    modules, parameters = dict(lm.named_modules()), dict(lm.named_parameters())
    layers: list[str] = []
    apart: list[str] = []
    found: list[str] = []
    for target in [ALL_LINEAR] if adapter.targets == ALL_LINEAR else adapter.targets:
        if target == ALL_LINEAR:
            every = [name for name, part in modules.items() if isinstance(part, _LINEAR) and part is not head]
            layers, found = layers + every, found + every
            continue
        names = [name for name in modules if name == target or name.endswith(f".{target}")]
        hit = [modules[name] for name in names]
        if any(part is head for part in hit):
            raise UserError(
                f"adapter.targets ({target}) is the LM head, which stays as it is: the fused head multiplies by one "
                "weight, and a frozen one costs two matmuls in place of three; leave it out"
            )
        if any(part is embedding or isinstance(part, nn.Embedding) for part in hit):
            raise UserError(
                f"adapter.targets ({target}) is an embedding, whose weight may be the LM head's as well: leave it out"
            )
        if hit:
            layers.append(target)
            found += names
        elif any(name.endswith(f".{target}") and len(_shape(p)) == 3 for name, p in parameters.items()):
            apart.append(target)
        else:
            linear = sorted({name.rpartition(".")[2] for name, part in modules.items() if isinstance(part, _LINEAR)})
            raise UserError(
                f"adapter.targets ({target}) is the name of no layer of {type(lm).__name__}: it has "
                f"{', '.join(linear)}; or use {ALL_LINEAR}"
            )
    return layers, apart, found


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of all ranks' parts together."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gather_with_experts(lm: PreTrainedModel) -> None:
    """Before ZeRO-3 takes a model with an adapter: lets it gather adapted experts and their adapters as one.

    For the time of a forward peft's layer puts such a parameter into a module of its own, and it reads the adapter's
    weights without a forward of theirs: no hook would gather either.
    """
    adapted: list[Any] = [part for part in lm.modules() if hasattr(part, "parameter_name")]
    for part in adapted:
        part._z3_leaf = True
    if adapted:
        # gradients of what is gathered as one are collected when that of its input is there: it has to have one
        lm.enable_input_require_grads()


def _check_fit(folder: Path, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values of a folder by the names of a model's parameters. Raises `UserError` where they do not fit."""
    values = read_values(folder)
    wanted = {named_in_files(name, NAME): name for name in own}
    missing, unknown = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or unknown:
        what = [f"lacks {shortened(missing)}"] * bool(missing) + [f"has {shortened(unknown)} beside"] * bool(unknown)
        raise UserError(f"the adapter in {folder} is not for this model: it {' and '.join(what)}")
    for name, value in values.items():
        if value.shape != own[wanted[name]].shape:
            raise UserError(
                f"the adapter in {folder} is not for this model: {name} is {tuple(value.shape)} and should be "
                f"{tuple(own[wanted[name]].shape)}"
            )
    return {wanted[name]: value for name, value in values.items()}


def merge_in(lm: PreTrainedModel, adapter: Adapter) -> None:
    """Puts the adapter in and merges it into the model's weights, each layer in fp32; the model is plain again."""
    dtype = lm.get_output_embeddings().weight.dtype
    put_in(lm, adapter)
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: list[tuple[str, Any]] = [(n, part) for n, part in lm.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, layer in reversed(adapted):  # of nested ones the innermost first
        layer.to(torch.float32)
        layer.merge(safe_merge=True, adapter_names=[NAME])
        place, _, own = name.rpartition(".")
        setattr(lm.get_submodule(place), own, layer.base_layer.to(dtype))
    del lm.peft_config

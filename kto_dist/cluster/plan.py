"""`kto-dist plan`: every way to run a config on a cluster, what each takes, and the best one as a config.

1. `ways`     stages, offloads, checkpointing: each with the largest micro-batch that fits
2. `plan`     predicts all of them, and the reference pass
3. `Plan`     the best, its hours and its price; `ready_config` writes it

In:  a config, a model's outline, a `Workload`, a `Cluster`. Out: `Plan`. Everything in it is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base.errors import UserError
from kto_dist.cluster.hardware import Cluster
from kto_dist.cluster.measure import Measured
from kto_dist.cluster.predict import Prediction, Way, predict
from kto_dist.cluster.reference_pass import ReferencePass, predict_reference
from kto_dist.cluster.workload import Workload
from kto_dist.model.adapters import Rehearsed, pick_adapter, rehearse
from kto_dist.model.attention import pick_attention, pick_packing
from kto_dist.model.config import AdapterConfig
from kto_dist.model.footprint import MOST_TOKENS, SHARE_OF_MEMORY, Shape, budget, shape_of, with_adapter
from kto_dist.model.kernels import pick_kernels
from kto_dist.model.loading import model_class
from kto_dist.training.config import Config

Method = Literal["full", "lora", "qlora"]
_ALIKE = 1.03
"""Ways whose seconds differ by less are as fast: the simpler one is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was computed. Hours and prices are of the training and of the reference pass alone: neither of loading,
    evaluation and checkpoints, nor of waiting for machines."""

    method: Method
    shape: Shape
    workload: Workload
    cluster: Cluster
    ways: list[Prediction]
    """All that were looked at, the best first, those that do not fit last."""
    reference: ReferencePass
    price: float | None
    """Of a GPU and hour."""
    layers: "Layers"
    measured: Measured | None = None
    """The run that compute times and links were taken from."""

    @property
    def idle(self) -> int:
        """GPUs that have no row of a step."""
        units = self.workload.global_batch // self.workload.unit
        return max(0, self.cluster.gpus - units)

    @property
    def best(self) -> Prediction | None:
        return self.ways[0] if self.ways and not self.ways[0].trouble else None

    def hours(self, way: Prediction) -> float:
        return (self.workload.steps * way.seconds.total + self.reference.seconds) / 3600

    def cost(self, way: Prediction) -> float | None:
        return None if self.price is None else self.hours(way) * self.cluster.gpus * self.price


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """How a family computes on a GPU."""

    attention: str = "varlen"
    """Of the table of attentions."""
    fused: bool = True
    """Layers of fused kernels."""
    packed: bool = True
    """Rows end to end, without padding."""
    checkpointing: bool = True
    """Whether the family can compute layers again."""


def layers_on_gpu(config: Config, found: PretrainedConfig) -> Layers:
    """As a run would pick them there, with the packages that are installed here; what the config asks for by name is
    taken to be there. Raises `UserError`."""
    gpu, model, train = torch.device("cuda"), config.model, config.train
    attention, kernels = str(model.attention), str(model.kernels)
    asked = attention != "auto"
    attention = pick_attention("model.attention", attention, found, gpu, torch.bfloat16, elsewhere=asked)
    if kernels == "auto":
        kernels = pick_kernels("model.kernels", kernels, found, gpu)
    return Layers(
        attention=attention,
        fused=kernels == "liger",
        packed=pick_packing("train.packing", train.packing, attention, found, config.data.max_length),
        checkpointing=bool(getattr(model_class(found), "supports_gradient_checkpointing", False)),
    )


def adapter_for(config: Config, method: Method, rank: int, found: PretrainedConfig) -> Rehearsed | None:
    """What the config's adapter, or one of this rank, comes to in the model; None where all of it is trained. Raises
    `UserError` where the model has no place for it."""
    if method == "full":
        return None
    section = config.adapter if config.adapter.type != "none" else AdapterConfig(type="lora", rank=rank)
    adapter = pick_adapter(section, base=config.model.path, seed=0)
    assert adapter is not None
    return rehearse(found, adapter, trust_remote_code=config.model.trust_remote_code)


def shape_for(lm: PreTrainedModel, method: Method, rank: int, adapter: Rehearsed | None = None) -> Shape:
    """`rank`: of an adapter beside every linear layer, where none is given."""
    if method == "full":
        return shape_of(lm)
    return with_adapter(lm, rank, packed=method == "qlora", put_in=adapter)


def plan(
    config: Config,
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    *,
    method: Method = "full",
    price: float | None = None,
    layers: Layers = Layers(),
    reference: Shape | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Predicts every way. `reference`: where it is another model. `measured`: what is known of a run here, which is
    applied to the cluster."""
    if measured is not None:
        cluster = measured.applied(cluster)
    found = [
        predict(shape, workload, cluster, way)
        for way in ways(config, shape, workload, cluster, method=method, layers=layers)
    ]
    tokens = config.reference.tokens_per_batch
    logits = (config.reference.logits_mebibytes or 2048) * 2**20
    as_here = replace(found[0].way, logits_bytes=logits)
    scored = predict_reference(reference or shape, workload, cluster, as_here, tokens)
    if scored.trouble:
        # all ways are alike to it, and a run scores before it trains
        found = [
            replace(way, trouble=" and ".join(filter(None, (way.trouble, f"for the reference {scored.trouble}"))))
            for way in found
        ]
    # of those that do not fit the closest first
    found.sort(key=lambda way: (True, _excess(way, cluster)) if way.trouble else (False, way.seconds.total))
    fitting = [way for way in found if not way.trouble]
    if fitting:
        as_fast = [way for way in fitting if way.seconds.total <= _ALIKE * fitting[0].seconds.total]
        best = min(as_fast, key=_effort)
        found.remove(best)
        found.insert(0, best)
    return Plan(
        method=method,
        shape=shape,
        workload=workload,
        cluster=cluster,
        ways=found,
        reference=scored,
        price=price,
        layers=layers,
        measured=measured,
    )


def ways(
    config: Config,
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    *,
    method: Method,
    layers: Layers,
) -> Iterator[Way]:
    """Each with as many tokens a micro-batch as fit, and at least the longest row that may come, even where that does
    not."""
    mebibytes = config.train.logits_mebibytes or 2048
    # packed weights cannot be sharded, nor can they lie elsewhere
    stages = (1, 2) if method == "qlora" else (1, 2, 3)
    for stage, optimizer, parameters, checkpointing in product(stages, (False, True), (False, True), (False, True)):
        if (parameters and stage != 3) or (checkpointing and not layers.checkpointing):
            continue
        way = Way(
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            checkpointing=checkpointing,
            tokens=1,
            bf16=config.train.dtype != "fp32",
            fused=layers.fused,
            packed=layers.packed,
            logits_bytes=mebibytes * 2**20,
            eager_row=workload.max_length if layers.attention == "eager" else 0,
        )
        fitting = budget(shape, way.sharding(cluster.gpus), cluster.gpu.memory)
        # a config has room for rows as long as it says, whether there are any or not
        least = workload.max_length * workload.unit
        yield replace(way, tokens=max(least, min(fitting, _enough(workload, cluster))))


def _enough(workload: Workload, cluster: Cluster) -> int:
    """A power of two from which on a rank has one micro-batch a step."""
    step = float((workload.prompts + workload.answers).mean()) * workload.global_batch
    tokens = 1024
    while tokens < 1.1 * step / cluster.gpus and tokens < MOST_TOKENS:
        tokens *= 2
    return tokens


def _excess(way: Prediction, cluster: Cluster) -> float:
    """Times what there is of a GPU's or of a host's memory."""
    return max(way.memory.device / cluster.gpu.memory, max(way.memory.host, way.memory.loading) / cluster.host_memory)


def _effort(way: Prediction) -> tuple[int, int, int, int]:
    """What a way asks for beside GPUs: copies to the host, computing twice, more collectives."""
    set_up = way.way
    return (set_up.offload_parameters, set_up.offload_optimizer, set_up.checkpointing, set_up.zero_stage)


def ready_config(config: Config, plan: Plan, *, rank: int) -> Config:
    """The config with the best way's settings. Raises `UserError` where none fits, or this version cannot run it."""
    best = plan.best
    if best is None:
        # weights in 4 bits lie whole on every GPU, where more of them are no help
        remedy = {
            "full": "larger GPUs, more of them, a shorter data.max_length, or --method lora",
            "lora": "larger GPUs, more of them, a shorter data.max_length, or --method qlora",
            "qlora": "larger GPUs, a shorter data.max_length, or --method lora, whose weights ZeRO 3 shards",
        }[plan.method]
        raise UserError(
            f"nothing fits on {plan.cluster.gpus} {plan.cluster.gpu.name}: the least that was found takes "
            f"{plan.ways[0].trouble}; take {remedy}"
        )
    way = best.way
    changes: dict[str, dict[str, Any]] = {
        "model": {"gradient_checkpointing": way.checkpointing},
        "train": {"tokens_per_microbatch": way.tokens},
        "deepspeed": {
            "zero_stage": way.zero_stage,
            "offload_optimizer": "cpu" if way.offload_optimizer else "none",
            "offload_parameters": "cpu" if way.offload_parameters else "none",
        },
        "reference": {
            "zero_stage": 3 if plan.reference.sharded else 0,
            "offload": "cpu" if plan.reference.offload else "none",
        },
    }
    if plan.method != "qlora":
        changes["model"]["quantization"] = "none"
    elif config.model.quantization == "none":
        changes["model"]["quantization"] = "nf4"
    tree = config.model_dump(mode="json", by_alias=True)
    if plan.method == "full":
        tree["adapter"] = {"type": "none"}
    elif config.adapter.type == "none":
        changes["adapter"] = {"type": "lora", "rank": rank}
        if "lr" not in config.train.model_fields_set:  # an adapter has a default of its own
            del tree["train"]["lr"]
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return type(config).build(tree)


def method_of(config: Config) -> Method:
    """What a config trains."""
    if config.adapter.type == "none":
        return "full"
    return "lora" if config.model.quantization == "none" else "qlora"


def room(plan: Plan) -> float:
    """Bytes of a device that plans use."""
    return SHARE_OF_MEMORY * plan.cluster.gpu.memory

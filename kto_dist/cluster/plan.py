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

from transformers import PreTrainedModel

from kto_dist.base.errors import UserError
from kto_dist.cluster.hardware import Cluster
from kto_dist.cluster.predict import Prediction, ReferencePass, Way, predict, predict_reference
from kto_dist.cluster.workload import Workload
from kto_dist.model.footprint import MOST_TOKENS, SHARE_OF_MEMORY, Shape, budget, shape_of, with_adapter
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

    @property
    def best(self) -> Prediction | None:
        return self.ways[0] if self.ways and not self.ways[0].trouble else None

    def hours(self, way: Prediction) -> float:
        return (self.workload.steps * way.seconds.total + self.reference.seconds) / 3600

    def cost(self, way: Prediction) -> float | None:
        return None if self.price is None else self.hours(way) * self.cluster.gpus * self.price


def shape_for(lm: PreTrainedModel, method: Method, rank: int) -> Shape:
    """`rank`: of an adapter."""
    return shape_of(lm) if method == "full" else with_adapter(lm, rank, packed=method == "qlora")


def plan(
    config: Config,
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    *,
    method: Method = "full",
    price: float | None = None,
    fused: bool = True,
    packed: bool = True,
) -> Plan:
    """`fused`, `packed`: whether layers are fused kernels, and rows lie end to end, as on GPUs that have both."""
    found = [
        predict(shape, workload, cluster, way)
        for way in ways(config, shape, workload, cluster, method=method, fused=fused, packed=packed)
    ]
    found.sort(key=lambda way: (bool(way.trouble), way.seconds.total))
    fitting = [way for way in found if not way.trouble]
    if fitting:
        as_fast = [way for way in fitting if way.seconds.total <= _ALIKE * fitting[0].seconds.total]
        best = min(as_fast, key=_effort)
        found.remove(best)
        found.insert(0, best)
    reference = predict_reference(shape, workload, cluster, found[0].way, config.reference.tokens_per_batch)
    return Plan(
        method=method,
        shape=shape,
        workload=workload,
        cluster=cluster,
        ways=found,
        reference=reference,
        price=price,
    )


def ways(
    config: Config,
    shape: Shape,
    workload: Workload,
    cluster: Cluster,
    *,
    method: Method,
    fused: bool,
    packed: bool,
) -> Iterator[Way]:
    """Each with as many tokens a micro-batch as fit, and at least the longest row, even where that does not."""
    mebibytes = config.train.logits_mebibytes or 2048
    # packed weights cannot be sharded, nor can they lie elsewhere
    stages = (1, 2) if method == "qlora" else (1, 2, 3)
    for stage, optimizer, parameters, checkpointing in product(stages, (False, True), (False, True), (False, True)):
        if parameters and stage != 3:
            continue
        way = Way(
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            checkpointing=checkpointing,
            tokens=1,
            bf16=config.train.dtype != "fp32",
            fused=fused,
            packed=packed,
            logits_bytes=mebibytes * 2**20,
        )
        fitting = budget(shape, way.sharding(cluster.gpus), cluster.gpu.memory)
        yield replace(way, tokens=max(workload.longest, min(fitting, _enough(workload, cluster))))


def _enough(workload: Workload, cluster: Cluster) -> int:
    """A power of two from which on a rank has one micro-batch a step."""
    step = float((workload.prompts + workload.answers).mean()) * workload.global_batch
    tokens = 1024
    while tokens < 1.1 * step / cluster.gpus and tokens < MOST_TOKENS:
        tokens *= 2
    return tokens


def _effort(way: Prediction) -> tuple[int, int, int, int]:
    """What a way asks for beside GPUs: copies to the host, computing twice, more collectives."""
    set_up = way.way
    return (set_up.offload_parameters, set_up.offload_optimizer, set_up.checkpointing, set_up.zero_stage)


def ready_config(config: Config, plan: Plan, *, rank: int) -> Config:
    """The config with the best way's settings. Raises `UserError` where none fits, or this version cannot run it."""
    best = plan.best
    if best is None:
        closest = min(plan.ways, key=lambda way: way.memory.device)
        raise UserError(
            f"nothing fits on {plan.cluster.gpus} {plan.cluster.gpu.name}: the least that was found takes "
            f"{closest.memory.device / 2**30:,.0f} GiB of {plan.cluster.gpu.memory / 2**30:,.0f} a GPU; take more "
            "GPUs, larger ones, a shorter data.max_length, or --method lora"
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
        "reference": {"zero_stage": 3 if plan.reference.sharded else 0, "offload": "none"},
    }
    if plan.method == "qlora":
        # the packed model is the reference, and a whole copy of it lies on every device
        changes["model"]["quantization"] = "nf4"
        changes["reference"]["zero_stage"] = 0
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
    return "full" if config.adapter.type == "none" else "lora"


def room(plan: Plan) -> float:
    """Bytes of a device that plans use."""
    return SHARE_OF_MEMORY * plan.cluster.gpu.memory

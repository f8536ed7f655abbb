"""A short run here, and what it takes of the time that is computed for it.

In:  a config. Out: `Measured`. The run is a real one, of a few steps, in a temporary folder; its reference log-probs go
into the config's own store, where the run that follows finds them. Of several ranks the links between them are measured
after it.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.cluster.allreduce import Links
from kto_dist.cluster.hardware import GPUS, Cluster, Gpu, calibrated, gpu_called, linked
from kto_dist.cluster.predict import Way, factor, load_of, predict
from kto_dist.cluster.rates import Rates, rates
from kto_dist.cluster.workload import Workload
from kto_dist.model.attention import pick_attention, pick_packing
from kto_dist.model.causal_lm import pick_dtype
from kto_dist.model.devices import kind
from kto_dist.model.footprint import Shape, budget
from kto_dist.model.kernels import pick_kernels
from kto_dist.model.loading import load_config
from kto_dist.training.config import Config
from kto_dist.training.prepare import TOKENS_PER_MICROBATCH

STEPS, WARM = 8, 3
"""Of the run, and those that do not count."""
Run = Callable[[list[str], Path], int]
"""Trains with these overrides, and leaves its mark in a folder; the exit status."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Medians of the steps that count."""

    here: Cluster
    """What it was measured on."""
    seconds: float
    """Of a step, as measured."""
    computed: float
    """And as computed, with links as they are here."""
    factor: float
    """Times what is computed, collectives apart."""
    links: Links | None
    """Between the ranks of this machine; None of a rank alone."""

    def applied(self, cluster: Cluster) -> Cluster:
        """What was measured here, to a cluster: a share of what its makers say stays that share."""
        if self.links is not None:
            cluster = linked(cluster, self.links, self.here.gpus, self.here.gpu.link)
        return calibrated(cluster, self.factor)


def measure(
    config: Config, shape: Shape, workload: Workload, run: Run, ranks: int = 1, planned: Gpu | None = None
) -> Measured:
    """`ranks`: that the run has. `planned`: a GPU that may be the one here, where nobody knows that. Raises `UserError`
    where the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        overrides = [
            f"train.output={output}",
            f"train.max_steps={STEPS}",
            "tracking.enabled=false",
            "tracking.report=false",
            "checkpoint.every_steps=null",
            "data.heldout=null",
            "evaluate.every_steps=null",
            "checkpoint.best=null",
            "train.stop_after=null",
        ]
        status = run(overrides, Path(folder))
        if status:
            raise UserError(f"--measure runs {STEPS} steps of the config here, and they ended with status {status}")
        seconds = step_seconds(output)
    found = rates_here(ranks)
    here = this_machine(found, ranks, planned)
    way = way_here(config, shape, here)
    return Measured(
        here=here,
        seconds=seconds,
        computed=predict(shape, workload, here, way).seconds.total,
        factor=factor(shape, here, way, load_of(workload, here, way), seconds),
        links=found.links,
    )


def step_seconds(output: Path) -> float:
    """The median of a run's steps, without the first ones."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[WARM:])


def way_here(config: Config, shape: Shape, here: Cluster) -> Way:
    """As the run that is measured is set up on this machine."""
    device, model = comm.device(), config.model
    found = load_config(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code)
    dtype = pick_dtype(config.train.dtype, device)
    attention = pick_attention("model.attention", model.attention, found, device, dtype)
    mebibytes = config.train.logits_mebibytes or (2048 if device.type == "cuda" else 512)
    bf16 = dtype == torch.bfloat16
    way = Way(
        zero_stage=max(config.deepspeed.zero_stage, int(bf16)),
        offload_optimizer=config.deepspeed.offload_optimizer != "none",
        offload_parameters=config.deepspeed.offload_parameters != "none",
        checkpointing=model.gradient_checkpointing,
        tokens=1,
        bf16=bf16,
        fused=pick_kernels("model.kernels", model.kernels, found, device) == "liger",
        packed=pick_packing("train.packing", config.train.packing, attention, found, config.data.max_length),
        logits_bytes=mebibytes * 2**20,
        cpu=device.type == "cpu",
        eager_row=config.data.max_length if attention == "eager" and device.type == "cuda" else 0,
    )
    return _with_tokens(way, config, shape, here)


def _with_tokens(way: Way, config: Config, shape: Shape, here: Cluster) -> Way:
    asked = config.train.tokens_per_microbatch
    if asked != "auto":
        return replace(way, tokens=asked)
    on_cpu = comm.device().type == "cpu"
    found = TOKENS_PER_MICROBATCH if on_cpu else budget(shape, way.sharding(here.gpus), here.gpu.memory)
    return replace(way, tokens=max(found, config.data.max_length))


def rates_here(ranks: int = 1, threads: int | None = None) -> Rates:
    """Of this machine's processor, and of the links between so many ranks on it; `threads`: as `rates` has it."""
    if torch.cuda.is_available() and ranks == 1:
        return Rates(flops=0.0, bandwidth=0.0)
    return rates(ranks, threads)


def this_machine(found: Rates, ranks: int = 1, planned: Gpu | None = None) -> Cluster:
    """Its GPUs, where these are of a known kind or of that which is planned for, else its processor, of which each rank
    has what was found."""
    if torch.cuda.is_available():
        gpu = _gpu(planned)
        here = Cluster(gpu=gpu, gpus=ranks, per_node=ranks)
        return here if found.links is None else linked(here, found.links, ranks, gpu.link)
    link = found.links.bandwidth if found.links else found.bandwidth
    gpu = Gpu(
        name="cpu",
        flops=found.flops,
        memory=psutil.virtual_memory().total / ranks,
        bandwidth=found.bandwidth,
        link=link,
        network=link,
        host=found.bandwidth,
    )
    here = Cluster(gpu=gpu, gpus=ranks, per_node=ranks)
    shares = here.shares
    crowded = replace(
        shares,
        host_seconds=found.crowding * shares.host_seconds,
        hook_seconds=found.crowding * shares.hook_seconds,
    )
    here = replace(here, shares=crowded)
    return here if found.links is None else linked(here, found.links, ranks, link)


def _gpu(planned: Gpu | None) -> Gpu:
    name, memory = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    known = planned if planned is not None and kind(planned.name) == kind(name) else gpu_called(name, memory)
    if known is None:
        raise UserError(
            f"--measure needs a GPU that is known ({', '.join(GPUS)}), and this one is a {name}: describe it in a file "
            f"with `name: {name}`, and plan with --gpu FILE.yaml (docs/planning.md)"
        )
    return replace(known, memory=memory)

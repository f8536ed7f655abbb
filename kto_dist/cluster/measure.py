"""A short run here, and what it takes of the time that is computed for it.

In:  a config. Out: `Measured`. The run is a real one, of a few steps, in a temporary folder; its reference log-probs go
into the config's own store, where the run that follows finds them.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.cluster.hardware import GPUS, Cluster, Gpu
from kto_dist.cluster.predict import Way, predict
from kto_dist.cluster.workload import Workload
from kto_dist.model.attention import pick_attention, pick_packing
from kto_dist.model.causal_lm import pick_dtype
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

    device: str
    seconds: float
    """Of a step, as measured."""
    computed: float
    """And as computed."""

    @property
    def factor(self) -> float:
        return self.seconds / self.computed


def measure(config: Config, shape: Shape, workload: Workload, run: Run, ranks: int = 1) -> Measured:
    """Raises `UserError` where the run fails."""
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
    here = this_machine(ranks)
    computed = predict(shape, workload, here, way_here(config, shape, here)).seconds.total
    return Measured(device=here.gpu.name, seconds=seconds, computed=computed)


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


def this_machine(ranks: int = 1, threads: int | None = None) -> Cluster:
    """Its GPU, where that is a known one, else what a matmul and a copy show of its processor; takes a second.

    `threads`: of a rank, each of which has as many cores to itself; None: ranks share what torch takes.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((gpu for key, gpu in GPUS.items() if key in name), None)
        if known is None:
            raise UserError(f"--measure needs a GPU that is known ({', '.join(GPUS)}), and this one is a {name}")
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        return Cluster(gpu=replace(known, memory=memory), gpus=ranks)
    with _threads(threads):
        flops, bandwidth = _matmul_rate(), _copy_rate()
    if threads is None:
        flops, bandwidth = flops / ranks, bandwidth / ranks
    memory = psutil.virtual_memory().total / ranks
    gpu = Gpu(
        name="cpu",
        flops=flops,
        memory=memory,
        bandwidth=bandwidth,
        link=bandwidth / 4,
        network=bandwidth / 4,
        host=bandwidth,
    )
    return Cluster(gpu=gpu, gpus=ranks)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matmul_rate(size: int = 1024) -> float:
    """FLOP a second of this process, in bf16 where that is what training uses."""
    a = torch.ones(size, size, dtype=pick_dtype("auto", torch.device("cpu")))
    return 2 * size**3 / _best_of(lambda: a @ a)


def _copy_rate(size: int = 2**26) -> float:
    """Bytes read and written a second."""
    a, b = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / _best_of(lambda: b.copy_(a))


def _best_of(work: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)

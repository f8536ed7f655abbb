"""What a step takes of a cluster, in bytes and in seconds: by roofline, and by alpha and beta of every link.

In:  a model's `Shape`, a `Workload`, a `Cluster`, and one `Way` to run it. Out: `Prediction`. Nothing runs.

The memory is that of `model/footprint.py`, which `train.tokens_per_microbatch: auto` starts from as well. The seconds
of a micro-batch are the larger of what the device and what the host takes. The device: matmuls and attention at a
share of the peak or, with few tokens, what reading the weights takes; the rest of a layer by the bytes that it moves.
Beside these: collectives and copies to the host, and the optimizer by the bytes that it moves. What a measured run
takes of all this but the collectives is `Shares.compute`, which `factor` finds.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from kto_dist.cluster.hardware import Cluster, calibrated
from kto_dist.cluster.workload import StepLoad, Workload, step_load
from kto_dist.model.causal_lm import ROUND_WIDTH
from kto_dist.model.footprint import (
    BUCKET,
    PACKED_BYTES,
    SHARE_OF_MEMORY,
    Held,
    Shape,
    Sharding,
    activation_bytes,
    attention_weights,
    backward_bytes,
    gradients_to_come,
    held,
    layer_bytes,
    update_bytes,
)

Batch = tuple[np.ndarray, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a run is set up on its cluster."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    checkpointing: bool
    tokens: int
    """Of a micro-batch, at the most."""
    bf16: bool
    fused: bool
    packed: bool
    """Rows end to end, without padding."""
    logits_bytes: int
    cpu: bool = False
    """Not on a GPU."""
    eager_row: int = 0
    """As `Sharding` has it."""

    @property
    def multiple(self) -> int:
        """Of positions: rows are padded to as many as one."""
        return 1 if self.packed or self.cpu else ROUND_WIDTH["cuda"]

    def sharding(self, ranks: int) -> Sharding:
        return Sharding(
            stage=self.zero_stage,
            ranks=ranks,
            bf16=self.bf16,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            checkpointing=self.checkpointing,
            logits_bytes=self.logits_bytes,
            fused=self.fused,
            cpu=self.cpu,
            eager_row=self.eager_row,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes."""

    held: Held
    activations: float
    backward: float
    """What a backward takes beside them, when the logits have gone."""
    update: float
    """What the update takes for a moment, when there are neither activations nor logits."""
    to_come: float
    """Of gradients, those that are not there when activations are at their most: no backward was before."""
    margin: float
    """What the allocator loses to fragments, and what CUDA and NCCL take."""
    host: float
    """Of a node's memory, for what is offloaded."""
    loading: float
    """Of a node's memory while weights are read, before there is anything to offload: what each of its processes has
    for itself. At ZeRO 3 none has: the first one maps the files, and hands their contents round."""

    @property
    def peak(self) -> float:
        """Of what tensors take."""
        work = self.activations + max(self.held.head, self.backward) - self.to_come
        return self.held.rest + max(work, self.update)

    @property
    def device(self) -> float:
        return self.peak + self.margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Of one step, on the rank that has most; what runs at the same time is counted once."""

    survey: float
    """KL forwards."""
    forwards: float
    backwards: float
    collectives: float
    """What compute does not hide."""
    offload: float
    """Copies to and from the host, and its optimizer."""
    optimizer: float
    """On the device."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Computed, not measured."""

    way: Way
    memory: Memory
    trouble: str
    """Why it does not fit; nothing where it does."""
    seconds: Seconds
    microbatches: int
    """Of a rank and step, KL pairs' included."""
    tokens_per_second: float
    """Of rows, over all ranks."""
    mfu: float
    """As in a run's metrics."""


def predict(shape: Shape, workload: Workload, cluster: Cluster, way: Way) -> Prediction:
    """Raises `ValueError` where a micro-batch cannot hold the longest row."""
    load = load_of(workload, cluster, way)
    memory = memory_of(shape, cluster, way, load, None if way.cpu else workload)
    seconds = Times(shape, cluster, way).step(load)
    whole = _flops(shape, load)
    return Prediction(
        way=way,
        memory=memory,
        trouble=_trouble(memory, cluster),
        seconds=seconds,
        microbatches=len(load.batches) + len(load.kl_batches),
        tokens_per_second=load.tokens / seconds.total,
        mfu=whole / seconds.total / (cluster.gpu.flops * cluster.gpus),
    )


def load_of(workload: Workload, cluster: Cluster, way: Way) -> StepLoad:
    """Of a step. Raises `ValueError` where a micro-batch cannot hold the longest row."""
    return step_load(workload, cluster.gpus, way.tokens, packed=way.packed, multiple=way.multiple)


def factor(shape: Shape, cluster: Cluster, way: Way, load: StepLoad, seconds: float) -> float:
    """Times what is computed, collectives apart, for a step of so many seconds as measured. Where collectives alone
    were to take longer than that, they are to blame as well: measured over computed, of the whole."""

    def total(compute: float) -> float:
        return Times(shape, calibrated(cluster, compute), way).step(load).total

    low, high = 0.0, 1.0
    if total(low) >= seconds:
        return seconds / total(1.0)
    while total(high) < seconds:
        high *= 2
    # a straight line, but for collectives that compute hides
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < seconds else (low, middle)
    return high


def memory_of(shape: Shape, cluster: Cluster, way: Way, load: StepLoad, workload: Workload | None = None) -> Memory:
    """`workload`: what `load` is a usual step of, where others may have longer rows."""
    sharding = way.sharding(cluster.gpus)
    batches = list(load.batches)
    once = len(load.batches) < 2
    if workload is not None:
        longest, unit = workload.longest, workload.unit
        units = -(-(workload.global_batch // unit) // cluster.gpus)
        # a step of longer rows may have more
        once = once and units * longest <= way.tokens
        # eager attention is charged for as many of them as there is room for; the rows of a pair do not see each other
        times = max(1, min(way.tokens, load.largest) // longest) if way.eager_row else 1
        batches.append((np.full(times * unit, longest // unit), load.most_rows))
    # master weights, moments and sums; and the weights
    optimizer = 16 * shape.trained if way.offload_optimizer else 0
    weights = weight_bytes(shape, way) if way.offload_parameters else 0
    return Memory(
        held=held(shape, sharding, load.most_rows),
        activations=max((activation_bytes(shape, sharding, lengths) for lengths, _ in batches), default=0.0),
        backward=max((backward_bytes(shape, sharding, *batch) for batch in batches), default=0.0),
        update=update_bytes(shape, sharding),
        to_come=gradients_to_come(shape, sharding) if once else 0.0,
        margin=(1 - SHARE_OF_MEMORY) * cluster.gpu.memory,
        host=(optimizer + weights) / cluster.nodes,
        loading=0.0 if way.zero_stage == 3 else loading_bytes(shape, cluster, way),
    )


def loading_bytes(shape: Shape, cluster: Cluster, way: Way) -> float:
    """Of a node's memory, where each of its processes reads the whole model."""
    return float(cluster.local * (2 if way.bf16 else 4) * shape.copied)


def weight_bytes(shape: Shape, way: Way) -> float:
    """Of the whole model."""
    return (shape.parameters - shape.packed) * (2 if way.bf16 else 4) + shape.packed * PACKED_BYTES


def _trouble(memory: Memory, cluster: Cluster) -> str:
    needs = (
        (memory.device, cluster.gpu.memory, "a GPU"),
        (memory.host, cluster.host_memory, "of a node's own memory"),
        (memory.loading, cluster.host_memory, "of a node's own memory while it loads"),
    )
    return lacking(*needs)


def lacking(*needs: tuple[float, float, str]) -> str:
    """What is taken, what there is, and whose it is: in words, where it is too little."""
    return " and ".join(
        f"{taken / 2**30:,.0f} of {there / 2**30:,.0f} GiB {whose}" for taken, there, whose in needs if taken > there
    )


def _flops(shape: Shape, load: StepLoad) -> float:
    """What a step must do, as a run's `mfu` counts it."""
    forward = shape.cost.forward(*load.whole) + shape.cost.forward(*load.kl_whole)
    beside = 2 * shape.trained * float(load.whole[0].sum() + load.kl_whole[0].sum()) if shape.adapter else 0.0
    return forward + beside + _backward_flops(shape, *load.whole)


def _backward_flops(shape: Shape, lengths: np.ndarray, rows: int) -> float:
    """Gradients of what is frozen are spared."""
    whole = 2 * shape.cost.forward(lengths, rows)
    if shape.adapter:
        whole += (4 * shape.trained - 2 * shape.cost.decoder) * float(lengths.sum())
    return whole - (0 if shape.head_trained else 2 * shape.cost.head * rows)


_PREFETCHED = 5 * 10**7
"""Parameters that ZeRO-3 fetches at a time, where matrices are smaller (DeepSpeed's `stage3_prefetch_bucket_size`)."""
_MATRICES = 7
"""Of a layer: larger ones are fetched one by one."""


def messages(shape: Shape) -> int:
    """Of ZeRO-3, in a pass."""
    return shape.layers * min(_MATRICES, math.ceil(shape.parameters / shape.layers / _PREFETCHED))


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the parts of a step."""

    shape: Shape
    cluster: Cluster
    way: Way

    def step(self, load: StepLoad) -> Seconds:
        survey = sum(self.forward(*batch) for batch in load.kl_batches)
        forwards = sum(self.forward(*batch) for batch in load.batches)
        backwards = sum(self.backward(*batch) for batch in load.batches)
        waits = self.collectives(len(load.kl_batches), len(load.batches))
        compute = self.cluster.shares.compute
        if self.way.zero_stage == 3:
            waits = max(0.0, waits - self.cluster.shares.overlap * compute * (survey + forwards + backwards))
        return Seconds(
            survey=compute * survey,
            forwards=compute * forwards,
            backwards=compute * backwards,
            collectives=waits,
            offload=compute * self.offload(len(load.kl_batches), len(load.batches)),
            optimizer=compute * self.optimizer(),
        )

    def forward(self, lengths: np.ndarray, rows: int) -> float:
        matmul = 2 * (self.shape.cost.decoder * float(lengths.sum()) + self.shape.cost.head * rows)
        attention = self.shape.cost.forward(lengths, rows) - matmul
        if self.shape.adapter:
            matmul += 2 * self.shape.trained * float(lengths.sum())
        matmul += self._of_experts(lengths)
        moved = self._moved(lengths) / 3 + 3 / 8 * self._beside(lengths)
        return self._pass(matmul, attention, moved, 1.0, self.shape.cost.head if rows else 0)

    def backward(self, lengths: np.ndarray, rows: int) -> float:
        """With what checkpointing computes again."""
        tokens = float(lengths.sum())
        attention = 2 * (self.shape.cost.forward(lengths, 0) - 2 * self.shape.cost.decoder * tokens)
        matmul = _backward_flops(self.shape, lengths, rows) - attention
        matmul += (1 if self.shape.adapter else 2) * self._of_experts(lengths)
        shares = self.cluster.shares
        host = shares.host_backward if self.way.zero_stage < 2 or self._in_place else shares.host_hooks
        moved = self._moved(lengths) * 2 / 3 + 5 / 8 * self._beside(lengths) + self._summed()
        seconds = self._pass(matmul, attention, moved, host, self.shape.cost.head)
        return seconds + (self.forward(lengths, 0) if self.way.checkpointing else 0.0)

    def _pass(self, matmul: float, attention: float, moved: float, host: float, head: int) -> float:
        """`host`: times the host's work for a forward, ZeRO-3's hooks apart; `head`: weights that are read beside the
        decoder's."""
        gpu, shares = self.cluster.gpu, self.cluster.shares
        bandwidth = gpu.bandwidth * shares.memory
        read = (2 if self.way.bf16 else 4) * (self.shape.cost.stored + head)
        device = max(matmul / (gpu.flops * gpu.matmul), read / bandwidth)
        device += attention / (gpu.flops * gpu.attention) + moved / bandwidth
        # 4 bits are unpacked to bf16, which the matmul reads
        device += (PACKED_BYTES + 2) * self.shape.packed / bandwidth
        host_seconds = host * shares.host_seconds * self.shape.layers
        if self.way.zero_stage == 3:
            host_seconds += shares.hook_seconds * self.shape.modules
        # a CPU does the host's work as well, one after the other
        return device / shares.busy + host_seconds if self.way.cpu else max(device / shares.busy, host_seconds)

    def _beside(self, lengths: np.ndarray) -> float:
        """Bytes that an adapter's narrow matmuls go through, forward and backward: what their layers take and give, and
        the gradients of both (`model/lora_layers.py`)."""
        return (8 if self.way.bf16 else 16) * self.shape.adapted * float(lengths.sum())

    def _of_experts(self, lengths: np.ndarray) -> float:
        """FLOP of other matmuls that would take as long as theirs take longer, in a forward."""
        return (1 / self.cluster.shares.experts - 1) * 2 * self.shape.cost.experts * float(lengths.sum())

    def _moved(self, lengths: np.ndarray) -> float:
        """Bytes that a layer's other work goes through, forward and backward."""
        width = 1 if self.way.bf16 else 2
        kept = width * layer_bytes(self.shape, fused=self.way.fused) * self.shape.layers
        passes = self.cluster.shares.traffic if self.way.fused else self.cluster.shares.traffic_plain
        weights = attention_weights(self.shape, self.way.sharding(self.cluster.gpus), lengths)[0]
        eager = self.cluster.shares.traffic_plain * weights * self.shape.layers if self.way.eager_row else 0.0
        return passes * kept * float(lengths.sum()) + eager

    def _summed(self) -> float:
        """Bytes: a micro-batch's gradients are added to the sums; ZeRO 2 and 3 go through them five times more."""
        width = 2 if self.way.bf16 else 4
        once = 2 * width + 8
        more = 0 if self.way.zero_stage < 2 or self._in_place else 9 * width
        return (once + more) * self.shape.trained

    @property
    def _in_place(self) -> bool:
        return self.way.sharding(self.cluster.gpus).sums_in_place

    def collectives(self, surveys: int, batches: int) -> float:
        shape, cluster, stage = self.shape, self.cluster, self.way.zero_stage
        width = 2 if self.way.bf16 else 4
        if stage == 3:
            gathers = (surveys + 2 * batches) * cluster.gather(weight_bytes(shape, self.way), messages(shape))
            return gathers + batches * cluster.gather(width * shape.trained, messages(shape))
        buckets = math.ceil(shape.trained / BUCKET)
        update = cluster.gather(width * shape.trained, buckets) if stage else 0.0
        if stage == 2:
            # all ranks reduce all of a bucket, and each keeps its part (`use_multi_rank_bucket_allreduce`)
            return batches * cluster.reduce(width * shape.trained, buckets) + update
        return cluster.reduce(4 * shape.trained, buckets) + update

    def offload(self, surveys: int, batches: int) -> float:
        shape, cluster, seconds = self.shape, self.cluster, 0.0
        width, each = 2 if self.way.bf16 else 4, cluster.gpu.host * cluster.gpus
        if self.way.offload_parameters:
            seconds += (surveys + 2 * batches) * weight_bytes(shape, self.way) / each
        if self.way.offload_optimizer:
            # gradients down, weights up, and Adam in between
            seconds += (batches + 1) * width * shape.trained / each
            seconds += 28 * shape.trained / cluster.nodes / cluster.shares.host_adam
        return seconds

    def optimizer(self) -> float:
        if self.way.offload_optimizer:
            return 0.0
        own = self.shape.trained / (self.cluster.gpus if self.way.zero_stage else 1)
        return 30 * own / (self.cluster.gpu.bandwidth * self.cluster.shares.memory)

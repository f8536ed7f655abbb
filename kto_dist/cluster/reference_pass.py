"""What the reference pass takes: of every row and KL pair one forward, before training.

In:  a model's `Shape`, a `Workload`, a `Cluster`, and how layers are computed. Out: `ReferencePass`. Nothing runs.
"""

from dataclasses import dataclass, replace

import numpy as np

from kto_dist.cluster.hardware import Cluster
from kto_dist.cluster.predict import Times, Way, lacking, loading_bytes, messages, weight_bytes
from kto_dist.cluster.workload import Workload
from kto_dist.model.footprint import LIVE, SHARE_OF_MEMORY, Shape, attention_weights, layer_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencePass:
    """Computed, not measured; nothing where the store holds every pair already."""

    sharded: bool
    """ZeRO-3, where a whole copy does not fit on one device."""
    offload: bool
    """And in host memory, where all devices together do not hold it either."""
    pairs: int
    seconds: float
    memory: float
    """Bytes of one device, without a margin."""
    host: float
    """Bytes of a node's memory, for what is offloaded."""
    loading: float
    """And while it loads, as `Memory.loading`."""
    trouble: str
    """Why it does not fit; nothing where it does."""


def predict_reference(shape: Shape, workload: Workload, cluster: Cluster, way: Way, tokens: int) -> ReferencePass:
    """`tokens`: of a batch of the pass."""
    width = 2 if way.bf16 else 4
    weights = weight_bytes(shape, way)
    lengths = workload.prompts + workload.answers
    answer, mean = float(workload.answers.mean()), max(1, round(float(lengths.mean())))
    mean = -(-mean // way.multiple) * way.multiple
    rows = max(1, tokens // mean)
    batch = np.full(rows, mean)
    # a forward holds a layer at a time, and a chunk of logits
    logits = min(way.logits_bytes, tokens * shape.vocabulary * 4)
    work = logits + tokens * layer_bytes(shape, fused=way.fused) + width * shape.unpacked
    if way.eager_row:
        long_rows = np.full(max(1, tokens // way.eager_row), way.eager_row)
        work += attention_weights(shape, way.sharding(1), long_rows)[0]
    room = SHARE_OF_MEMORY * cluster.gpu.memory
    gathered = width * min(shape.parameters, max(LIVE, shape.largest))
    too_large, loading = weights + work > room, loading_bytes(shape, cluster, way)
    sharded = (too_large or loading > cluster.host_memory) and not shape.packed
    offload = sharded and too_large and (cluster.gpus == 1 or weights / cluster.gpus + gathered + work > room)
    times = Times(shape, cluster, replace(way, zero_stage=3 if sharded else 0, checkpointing=False))
    seconds = cluster.shares.compute * times.forward(batch, round(answer * rows))
    if sharded:
        wait = cluster.gather(weights, messages(shape))
        wait += weights / cluster.gpus / cluster.gpu.host if offload else 0.0
        seconds += max(0.0, wait - cluster.shares.overlap * seconds)
    own = (0.0 if offload else weights / cluster.gpus) + gathered if sharded else weights
    host, loading = weights / cluster.nodes if offload else 0.0, 0.0 if sharded else loading
    return ReferencePass(
        host=host,
        loading=loading,
        trouble=lacking(
            (own + work + cluster.gpu.memory - room, cluster.gpu.memory, "a GPU"),
            (host, cluster.host_memory, "of a node's own memory"),
            (loading, cluster.host_memory, "of a node's own memory while it loads"),
        ),
        sharded=sharded,
        offload=offload,
        pairs=workload.reference_pairs,
        seconds=-(-workload.reference_pairs // (rows * cluster.gpus)) * seconds,
        memory=own + work,
    )

"""What a model takes of a device's memory, part by part: what is held all the time, and what each token adds.

In:  `Shape` (of a model, sharded or not, or of its config alone), `Sharding`. Out: `Held`, bytes a token, and the
tokens that fit. It is the estimate behind `train.tokens_per_microbatch: auto` and behind `kto-dist plan`.

What a decoder layer keeps for its backward, in bytes a token in bf16 (H hidden, F of the MLP, A and K what attention
asks with and keeps):

    plain layers   13 H + 4 A + 4 K + 8 F    measured as 100 KB at H 2048, F 8192
    fused layers    8 H + 4 A + 4 K + 6 F    norms keep their input alone, the gated product is made again

With checkpointing a layer keeps its input, 2 H, and one layer at a time all of it.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_dist.model.attention import largest
from kto_dist.model.devices import Cost, cost_of, experts_of

SHARE_OF_MEMORY = 0.85
"""The rest is what the allocator loses to fragments, and what CUDA and NCCL take for themselves."""
MOST_TOKENS = 65536
_BUCKET = 5 * 10**8
"""Parameters whose gradients ZeRO 2 and 3 reduce at a time (DeepSpeed's `reduce_bucket_size`)."""
_LIVE = 10**9
"""Parameters that ZeRO-3 holds gathered at a time (DeepSpeed's `stage3_max_live_parameters`)."""
PACKED_BYTES = 0.5 + 0.016
"""A weight in 4 bits, and its share of the scales (NF4, blocks of 64, scales quantised once more)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What of a model decides its memory and its arithmetic."""

    parameters: int
    trained: int
    """What has a gradient: of these, or an adapter beside them."""
    packed: int = 0
    """Of the parameters, those that lie in 4 bits."""
    adapter: bool = False
    """Whether what is trained lies beside the parameters."""
    head: int
    """Weights of the LM head."""
    head_trained: bool
    vocabulary: int
    layers: int
    hidden: int
    inner: int
    """Of the MLP that a token passes: of experts, all that it is sent to."""
    asked: int
    """Heads times their size."""
    kept: int
    """Key-value heads times their size."""
    cost: Cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """What decides how much of a device's memory is taken before any token comes."""

    stage: int
    ranks: int
    bf16: bool
    offload_optimizer: bool
    offload_parameters: bool
    checkpointing: bool
    logits_bytes: int
    fused: bool = False
    """Layers whose norms and gated products are fused kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of one device, without activations."""

    weights: float
    gathered: float
    """Of ZeRO-3: whole weights of the layers at hand."""
    gradients: float
    """Sums in fp32, and those of the backward at hand."""
    optimizer: float
    """Master weights and moments."""
    head: float
    """A chunk's logits, and the gradient of the head's weights in fp32."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def shape_of(lm: PreTrainedModel) -> Shape:
    """Of a causal language model, sharded or not, or without contents (on the device `meta`)."""
    config = lm.config.get_text_config()
    sizes = [(math.prod(_size(p)), p.requires_grad) for p in lm.parameters()]
    head = lm.get_output_embeddings().weight
    heads = getattr(config, "num_attention_heads", None) or 1
    width = largest(config, "head_dim") or config.hidden_size // heads
    return Shape(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        head=math.prod(_size(head)),
        head_trained=head.requires_grad,
        vocabulary=_size(head)[0],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=_inner(config),
        asked=heads * width,
        kept=(getattr(config, "num_key_value_heads", None) or heads) * width,
        cost=cost_of(lm),
    )


def with_adapter(lm: PreTrainedModel, rank: int, *, packed: bool = False) -> Shape:
    """Of a model of which an adapter of this rank beside every linear layer but the head is trained; `packed`: and
    whose linear layers lie in 4 bits (QLoRA)."""
    head = lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    whole = shape_of(lm)
    return replace(
        whole,
        trained=sum(rank * (m.in_features + m.out_features) for m in linear),
        packed=sum(m.in_features * m.out_features for m in linear) if packed else 0,
        head_trained=False,
        adapter=True,
    )


def _inner(config: Any) -> int:
    whole = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts, routed = experts_of(config)
    if not (experts and routed):
        return int(whole)
    one = getattr(config, "moe_intermediate_size", None) or whole
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return int(routed * one + (shared or (getattr(config, "n_shared_experts", None) or 0) * one))


def held(shape: Shape, sharding: Sharding, head_rows: int | None = None) -> Held:
    """`head_rows`: completion rows of a micro-batch, where they are known; few of them need few logits."""
    ranks, stage, width = sharding.ranks, sharding.stage, 2 if sharding.bf16 else 4
    whole = (shape.parameters - shape.packed) * width + shape.packed * PACKED_BYTES
    whole += width * shape.trained if shape.adapter else 0
    apart = ranks if stage == 3 else 1
    own = min(shape.trained, _BUCKET) if stage >= 2 else shape.trained
    # without ZeRO in fp32 the gradients are their own sums
    own_bytes = 0 if stage == 0 and not sharding.bf16 else width * own
    sums = 4 * shape.trained / (ranks if stage >= 2 else 1)
    states = shape.trained * (12 if sharding.bf16 or stage else 8) / (ranks if stage else 1)
    logits = sharding.logits_bytes
    if head_rows is not None:
        logits = min(logits, head_rows * shape.vocabulary * 4)
    return Held(
        weights=0.0 if sharding.offload_parameters else whole / apart,
        gathered=width * min(shape.parameters, _LIVE) if stage == 3 else 0.0,
        gradients=own_bytes + (0.0 if sharding.offload_optimizer else sums),
        optimizer=0.0 if sharding.offload_optimizer else states,
        head=logits + (8 * shape.head if shape.head_trained else 0),
    )


def token_bytes(shape: Shape, sharding: Sharding) -> float:
    """What a token of a micro-batch keeps until its backward."""
    width = 1 if sharding.bf16 else 2
    layer = width * layer_bytes(shape, fused=sharding.fused)
    if sharding.checkpointing:
        return shape.layers * 2 * width * shape.hidden + layer
    return shape.layers * layer


def layer_bytes(shape: Shape, *, fused: bool) -> float:
    """Of one layer and token in bf16, as the table above says."""
    attention = 4 * shape.asked + 4 * shape.kept
    if fused:
        return 8 * shape.hidden + attention + 6 * shape.inner
    return 13 * shape.hidden + attention + 8 * shape.inner


def budget(shape: Shape, sharding: Sharding, memory: float) -> int:
    """How many tokens of a micro-batch `memory` bytes of a device are estimated to hold: a power of two, 1 at least.

    Of the device's whole memory and not of what is free, so that a resumed run finds the same. Coarse on purpose: the
    largest micro-batch is tried before the first step.
    """
    room = SHARE_OF_MEMORY * memory - held(shape, sharding).total
    fitting = max(1.0, room / token_bytes(shape, sharding))
    return int(min(MOST_TOKENS, 2 ** math.floor(math.log2(fitting))))


def tokens_that_fit(lm: PreTrainedModel, sharding: Sharding, memory: int) -> int:
    """`budget` of a loaded model."""
    return budget(shape_of(lm), sharding, memory)


def _size(parameter: Tensor) -> tuple[int, ...]:
    """Of all ranks' parts together."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

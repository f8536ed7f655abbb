"""What a model takes of a device's memory, part by part: what is held all the time, and what each token adds.

In:  `Shape` (of a model, sharded or not, or of its config alone), `Sharding`. Out: `Held`, bytes a token, and the
tokens that fit. It is the estimate behind `train.tokens_per_microbatch: auto` and behind `kto-dist plan`.

What a decoder layer keeps for its backward, in bytes a token in bf16 (H hidden, F of the MLP, A and K what attention
asks with and keeps):

    plain layers   13 H + 4 A + 4 K + 8 F    measured as 100 KB at H 2048, F 8192
    fused layers    8 H + 4 A + 4 K + 6 F    norms keep their input alone, the gated product is made again
    no gate         4 F in place of 8 F      what the activation takes and gives; 10 F of one written out (gelu_new)
    LayerNorm       8 H in place of 13 H
    experts         4 E H beside             a token's copy for each of the E that it is sent to, and what each gives
    eager           6 bytes a head and pair of positions beside: softmax in fp32, and what it is rounded to

With checkpointing a layer keeps its input, 2 H, and one layer at a time all of it.

A CPU has ways of its own (`Sharding.cpu`): its norms keep their input and output alone (`cpu_layers`), its attention
keeps the weights of short sequences (`slices`), logits are as narrow as the weights are, a rank alone sums gradients
where they belong (`zero_sums`), and a buffer takes no memory before something is written to it.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kto_dist.model import slices
from kto_dist.model.adapters import Rehearsed, passed_modules
from kto_dist.model.devices import Cost, cost_of, experts_of, head_width, of_other_senses, stated

SHARE_OF_MEMORY = 0.85
"""The rest is what the allocator loses to fragments, and what CUDA and NCCL take for themselves."""
MOST_TOKENS = 65536
BUCKET = 5 * 10**8
"""Parameters whose gradients ZeRO 2 and 3 reduce at a time (DeepSpeed's `reduce_bucket_size`): on a GPU the bucket has
this size, however few they are."""
LIVE = 10**9
"""Parameters that ZeRO-3 holds gathered at a time (DeepSpeed's `stage3_max_live_parameters`)."""
_SUB_GROUP = 10**9
"""And those that it updates at a time (`sub_group_size`)."""
_BLOCK = 4 * 2**20
"""Bytes of wide logits that the kernels' pass over rows takes at a time on a CPU (`kto_kernels.rows`)."""
_BESIDE = 4
"""Modules of peft's in place of a linear layer, beside itself: that layer, a dropout, two matrices."""
PACKED_BYTES = 0.5 + 0.016
"""A weight in 4 bits, and its share of the scales (NF4, blocks of 64, scales quantised once more)."""
_LINEAR = (nn.Linear, Conv1D)


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
    modules: int
    """That a forward passes: ZeRO-3 has hooks at each."""
    hidden: int
    inner: int
    """Of the MLP that a token passes: of experts, all that it is sent to."""
    heads: int
    asked: int
    """Heads times their size."""
    kept: int
    """Key-value heads times their size."""
    cost: Cost
    largest: int = 0
    """Parameters of the module that has most by itself: ZeRO-3 gathers them at once, however many they are."""
    largest_trained: int = 0
    """And of those that have a gradient, which is whole until it is reduced."""
    unpacked: int = 0
    """Of what is packed, the largest layer, which is unpacked for its product."""
    adapted: int = 0
    """Widths of the layers that an adapter lies beside, in and out, together."""
    sent: int = 0
    """Experts that a token is sent to."""
    inner_bytes: int = 8
    """Of each of `inner`, in plain layers."""
    copied: int = 0
    """Parameters that a process has for itself in host memory when it has read them: of files in another dtype than
    bf16 all of them, else experts, which it stacks. The rest is mapped, and all processes share the file's pages."""
    norm_bytes: int = 13
    """Of each of `hidden`, in plain layers: of what norms and residuals keep."""


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
    cpu: bool = False
    """Not on a GPU."""
    eager_row: int = 0
    """Positions of the longest row, where attention keeps its weights (`eager`); 0 where it does not."""

    @property
    def own_sums(self) -> bool:
        """Whether gradients are summed in the parameters' own, and lie nowhere else."""
        return self.stage == 0 and not self.bf16

    @property
    def sums_in_place(self) -> bool:
        """Whether each gradient is added to the sums at once, and lies nowhere else."""
        return self.cpu and self.ranks == 1 and self.stage == 2 and not self.offload_optimizer


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
    """A chunk's logits, or what ZeRO 2 reduces at a time; and the gradient of the head's weights."""

    @property
    def total(self) -> float:
        return self.rest + self.head

    @property
    def rest(self) -> float:
        """What is there all the time: without the head."""
        return self.weights + self.gathered + self.gradients + self.optimizer


def shape_of(lm: PreTrainedModel) -> Shape:
    """Of a causal language model, sharded or not, or without contents (on the device `meta`)."""
    config = lm.config.get_text_config()
    sizes = [(math.prod(_size(p)), p.requires_grad) for p in lm.parameters()]
    packed = [math.prod(_size(p)) for p in lm.parameters() if hasattr(p, "quant_state")]
    head = lm.get_output_embeddings().weight
    heads = getattr(config, "num_attention_heads", None) or 1
    width = head_width(config) if getattr(config, "num_attention_heads", None) else config.hidden_size
    routed = experts_of(config)[1] or 0
    return Shape(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        packed=sum(packed),
        unpacked=max(packed, default=0),
        largest=_largest(lm),
        largest_trained=max((size for size, trained in sizes if trained), default=0),
        sent=math.ceil(routed),
        inner_bytes=_inner_bytes(lm, config),
        norm_bytes=8 if _has_layer_norms(lm) else 13,
        head=math.prod(_size(head)),
        head_trained=head.requires_grad,
        copied=_copied(lm),
        vocabulary=_size(head)[0],
        layers=config.num_hidden_layers,
        modules=passed_modules(lm),
        hidden=config.hidden_size,
        inner=_inner(config) + _shared_inner(lm, config.hidden_size),
        heads=heads,
        asked=round(heads * width),
        kept=round((getattr(config, "num_key_value_heads", None) or heads) * width),
        cost=cost_of(lm),
    )


def with_adapter(lm: PreTrainedModel, rank: int, *, packed: bool = False, put_in: Rehearsed | None = None) -> Shape:
    """Of a model of which an adapter is trained: the one that was `put_in`, or one of this rank beside every linear
    layer but the head; `packed`: and whose linear layers lie in 4 bits (QLoRA). Experts that are stacked are no linear
    layers."""
    head = lm.get_output_embeddings()
    linear = [m.weight for m in lm.modules() if isinstance(m, _LINEAR) and m is not head]
    sizes, whole = [math.prod(_size(w)) for w in linear], shape_of(lm)
    shape = replace(
        whole,
        trained=rank * sum(sum(_size(w)) for w in linear),
        adapted=sum(sum(_size(w)) for w in linear),
        largest_trained=max((rank * max(_size(w)) for w in linear), default=0),
        packed=sum(sizes) if packed else 0,
        unpacked=max(sizes, default=0) if packed else 0,
        modules=whole.modules + _BESIDE * len(linear),
        head_trained=False,
        adapter=True,
        copied=0 if packed else whole.copied,
    )
    if put_in is None:
        return shape
    return replace(
        shape,
        trained=put_in.trained,
        adapted=put_in.trained // put_in.rank,
        largest_trained=put_in.largest,
        modules=put_in.passed,
    )


def _copied(lm: PreTrainedModel) -> int:
    dtype = getattr(lm.config, "dtype", None)
    sizes = {name: _size(parameter) for name, parameter in lm.named_parameters()}
    if str(dtype).removeprefix("torch.") != "bfloat16":
        return sum(math.prod(size) for size in sizes.values())
    return sum(math.prod(size) for name, size in sizes.items() if len(size) == 3 and ".experts." in name)


def _largest(lm: nn.Module) -> int:
    """Parameters of one module's own, at the most."""
    return max(sum(math.prod(_size(p)) for p in m.parameters(recurse=False)) for m in lm.modules())


def _has_layer_norms(lm: nn.Module) -> bool:
    elsewhere = of_other_senses(lm)
    return any(isinstance(m, nn.LayerNorm) and id(m.weight) not in elsewhere for m in lm.modules())


def _inner_bytes(lm: nn.Module, config: Any) -> int:
    """Of a gated MLP: its gate before and after the activation, what is multiplied by it, and the product."""
    hidden, inner = config.hidden_size, stated(config, "intermediate_size", "ffn_hidden_size") or 4 * config.hidden_size
    if experts_of(config)[0]:
        return 8
    matrices = [sorted(_size(p)) for p in lm.parameters() if len(_size(p)) == 2]
    ends = sum(size == sorted((hidden, inner)) for size in matrices)
    joined = sum(size == sorted((hidden, 2 * inner)) for size in matrices)  # gate and other half in one
    if joined or ends > 2 * config.num_hidden_layers:
        return 8
    written_out = stated(config, "hidden_act", "activation_function", "activation") == "gelu_new"
    return 10 if written_out else 4


def _inner(config: Any) -> int:
    whole = stated(config, "intermediate_size", "ffn_hidden_size") or 4 * config.hidden_size
    experts, routed = experts_of(config)
    if not (experts and routed):
        return int(whole)
    return int(routed * (getattr(config, "moe_intermediate_size", None) or whole))


def _shared_inner(lm: nn.Module, hidden: int) -> int:
    """Of the experts of a layer that every token passes; families name them and their sizes in many ways."""
    shared = [m for name, m in lm.named_modules() if re.search(r"\.shared_(experts?|mlp)$", name)]
    ends = [_size(m.weight) for part in shared for m in part.modules() if isinstance(m, nn.Linear)]
    return max((inner for outer, inner in ends if outer == hidden), default=0)


def held(shape: Shape, sharding: Sharding, head_rows: int | None = None) -> Held:
    """`head_rows`: completion rows of a micro-batch, where they are known; few of them need few logits."""
    ranks, stage, width = sharding.ranks, sharding.stage, 2 if sharding.bf16 else 4
    whole = (shape.parameters - shape.packed) * width + shape.packed * PACKED_BYTES
    whole += width * shape.trained if shape.adapter else 0
    apart = ranks if stage == 3 else 1
    # without ZeRO in fp32 the gradients are their own sums; at stage 2 they lie where the logits were
    own_bytes = 0.0 if sharding.own_sums or stage == 2 else width * shape.trained
    if stage == 3:
        own_bytes = _bucket_bytes(shape, sharding)
    sums = 4 * shape.trained / (ranks if stage >= 2 else 1)
    states = shape.trained * (12 if sharding.bf16 or stage else 8) / (ranks if stage else 1)
    return Held(
        weights=0.0 if sharding.offload_parameters else whole / apart,
        gathered=_gathered(shape, sharding),
        gradients=own_bytes + (0.0 if sharding.offload_optimizer else sums),
        optimizer=0.0 if sharding.offload_optimizer else states,
        head=_head_bytes(shape, sharding, head_rows),
    )


def _gathered(shape: Shape, sharding: Sharding) -> float:
    """Of whole weights at hand; a rank alone has them whole already."""
    width = 2 if sharding.bf16 else 4
    if sharding.stage == 3 and sharding.ranks > 1:
        return width * min(shape.parameters, max(LIVE, shape.largest))
    return width * shape.unpacked


def _bucket_bytes(shape: Shape, sharding: Sharding) -> float:
    """Of what ZeRO 2 and 3 collect gradients in, or of a gradient that is larger."""
    if sharding.sums_in_place:
        return 0.0
    collected = min(shape.trained, BUCKET) if sharding.cpu else max(BUCKET, shape.largest_trained)
    return (2 if sharding.bf16 else 4) * collected


def _head_bytes(shape: Shape, sharding: Sharding, rows: int | None) -> float:
    """Of a chunk's logits, and of the gradient of the head's weights. A backward begins when the logits have gone, and
    with it ZeRO 2 takes its bucket."""
    logits = float(sharding.logits_bytes)
    if rows is not None:
        logits = min(logits, rows * _row_bytes(shape, sharding))
    if sharding.stage == 2:
        logits = max(logits, _bucket_bytes(shape, sharding))
    gradient = _head_gradient(shape, sharding, rows)
    if not sharding.cpu:
        return logits + gradient
    # a block of logits made wide, their softmax and its gradient, unless the blocks are more than all rows
    blocks = 3 * min(_BLOCK, 2 * logits) if sharding.bf16 else 2 * min(_BLOCK, logits)
    # of one chunk the gradient comes after the last block
    return logits + (gradient + blocks if _in_chunks(shape, sharding, rows) else max(gradient, blocks))


def _row_bytes(shape: Shape, sharding: Sharding) -> int:
    """Of a row of logits."""
    return shape.vocabulary * (2 if sharding.bf16 and sharding.cpu else 4)


def _in_chunks(shape: Shape, sharding: Sharding, rows: int | None) -> bool:
    return rows is None or rows * _row_bytes(shape, sharding) > sharding.logits_bytes


def _head_gradient(shape: Shape, sharding: Sharding, rows: int | None) -> float:
    """Of several chunks an fp32 sum, and what it is rounded to; of one, on a CPU, the product as it comes."""
    if not shape.head_trained:
        return 0.0
    width = 2 if sharding.bf16 else 4
    return shape.head * ((width + 4 * _in_chunks(shape, sharding, rows)) if sharding.cpu else 8)


def gradients_to_come(shape: Shape, sharding: Sharding) -> float:
    """Of what is held, gradients that the first backward of a step brings: of one micro-batch they are not there when
    activations are at their most. Those of ZeRO 2 and 3 lie in buffers."""
    if sharding.stage > 1:
        return 0.0
    return (2 if sharding.bf16 else 4) * shape.trained


def update_bytes(shape: Shape, sharding: Sharding) -> float:
    """What comes for a moment beside what is held, when there are neither activations nor logits: gradients laid end to
    end, ZeRO 0 and 1 to reduce a bucket of them, in the weights' dtype as well; at ZeRO 3 those of a sub-group to
    update, or those of the last bucket to reduce."""
    if sharding.stage == 3:
        reduced = _reduced_bytes(shape, sharding)
        return max(reduced, 0.0 if sharding.offload_optimizer else 4 * min(shape.trained, _SUB_GROUP) / sharding.ranks)
    if sharding.offload_optimizer or sharding.stage == 2:
        return 0.0
    return (6 if sharding.bf16 else 4) * min(shape.trained, BUCKET)


def _reduced_bytes(shape: Shape, sharding: Sharding) -> float:
    """Of ZeRO 3's bucket when it is reduced: its gradients laid end to end, and a rank's share of them in fp32."""
    return ((2 if sharding.bf16 else 4) + 4 / sharding.ranks) * min(shape.trained, BUCKET)


def token_bytes(shape: Shape, sharding: Sharding) -> float:
    """What a token of a micro-batch keeps until its backward."""
    width = 1 if sharding.bf16 else 2
    layer = width * layer_bytes(shape, fused=sharding.fused, cpu=sharding.cpu)
    # a token's share of attention's weights; a backward has their gradients beside, of one layer
    weights = _weight_bytes(sharding) * shape.heads * sharding.eager_row
    if sharding.checkpointing:
        return shape.layers * 2 * width * shape.hidden + layer + 3 * weights
    return shape.layers * (layer + weights) + 2 * weights


def layer_bytes(shape: Shape, *, fused: bool, cpu: bool = False) -> float:
    """Of one layer and token in bf16, as the table above says."""
    norms = 8 if fused or cpu else shape.norm_bytes
    inner = min(6, shape.inner_bytes) if fused else shape.inner_bytes
    return (norms + 4 * shape.sent) * shape.hidden + 4 * shape.asked + 4 * shape.kept + inner * shape.inner


def activation_bytes(shape: Shape, sharding: Sharding, lengths: np.ndarray) -> float:  # (S,) tokens of each sequence
    """What a micro-batch keeps until its backward."""
    width, tokens = 1 if sharding.bf16 else 2, float(lengths.sum())
    ends = 4 * width * shape.hidden * tokens  # what the last norm takes and gives
    if sharding.checkpointing:
        return ends + 2 * width * shape.layers * shape.hidden * tokens
    return ends + shape.layers * (_layer(shape, sharding, tokens) + attention_weights(shape, sharding, lengths)[0])


def backward_bytes(shape: Shape, sharding: Sharding, lengths: np.ndarray, head_rows: int) -> float:  # (S,)
    """What a backward has beside what was kept: the gradient of the head's weights, ZeRO 2's bucket, and of the layer
    at hand gradients of the MLP or of attention's weights; with checkpointing the layer itself."""
    width, tokens = 1 if sharding.bf16 else 2, float(lengths.sum())
    weights, of_group = attention_weights(shape, sharding, lengths)
    work = max(6 * width * shape.inner * tokens, 2 * of_group) + _head_gradient(shape, sharding, head_rows)
    work += _bucket_bytes(shape, sharding) if sharding.stage == 2 else 0.0
    # one bucket holds them all until activations have gone, several are reduced before
    work += _reduced_bytes(shape, sharding) if sharding.stage == 3 and shape.trained > BUCKET else 0.0
    return work + (_layer(shape, sharding, tokens) + weights if sharding.checkpointing else 0.0)


def _layer(shape: Shape, sharding: Sharding, tokens: float) -> float:
    return (1 if sharding.bf16 else 2) * layer_bytes(shape, fused=sharding.fused, cpu=sharding.cpu) * tokens


def attention_weights(shape: Shape, sharding: Sharding, lengths: np.ndarray) -> tuple[float, float]:
    """Of one layer, and of those of its sequences that are computed at a time; on a CPU alone, where they are short,
    and wherever attention is `eager`, of whole rows."""
    if not sharding.cpu:
        weights = _weight_bytes(sharding) * shape.heads * float((lengths.astype(np.float64) ** 2).sum())
        return (weights, weights) if sharding.eager_row else (0.0, 0.0)
    shortest = slices.SHORT.get(torch.bfloat16 if sharding.bf16 else torch.float32, 0)
    every, of_group = slices.weights_kept(lengths[lengths <= shortest])
    each = (2 if sharding.bf16 else 4) * shape.heads
    return each * every, each * of_group


def _weight_bytes(sharding: Sharding) -> int:
    """Of a weight of eager attention: the softmax in fp32, and what it is rounded to."""
    return 6 if sharding.bf16 else 4


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
    """Of all ranks' parts together; of what is packed into 4 bits, unpacked."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape)

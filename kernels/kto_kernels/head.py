"""The fused head: LM head, log-softmax gather and KTO loss, with gradients made on the way forward.

In:  hidden states of the completion rows, the head's weight, the targets, and what is known of each sequence.
Out: `HeadOutput`: the weighted loss, differentiable in hidden, weight and bias, and each sequence's log-prob.

Every token of a sequence shares one coefficient, the loss's slope at the sequence's log-prob, and z0 is known before.
(For a loss on pairs the two sequences of a pair share it, up to its sign, or to its sign over the number of tokens; a
chunk then holds whole pairs.)
So a chunk's logits become their own gradient while they are at hand:

1. logits = h W^T, for as many rows as the budget allows, cut between sequences where they fit   (matmul 1)
2. one pass a row: log-softmax, gather, and G = softmax - onehot, without the slope
   (on a GPU without the softmax's normaliser, too, which then is a part of each row's slope)
3. dH = G W                                                                                      (matmul 2)
4. the sequences of the chunk are complete, so their slopes c are known: dW += G^T (c h), in fp32 (matmul 3);
   a sequence longer than a chunk sums its own dW first, which is scaled by its slope and added at its end
5. backward only scales: dH by c and by the gradient that comes in, dW by the latter
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kto_kernels.chunks import cut
from kto_kernels.logits import LogitPass, Plan, plan_chunks
from kto_kernels.losses import Loss, pick_loss
from kto_kernels.matmul import one_dtype, pick_logits_dtype, scaled, scaled_rows
from kto_kernels.rows import pick_backend
from kto_kernels.sequences import Sequences, Terms, sequence_pass
from kto_kernels.transform import IDENTITY, LogitTransform
from kto_kernels.weight_sums import WeightSums


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOutput:
    """What a batch of S sequences comes to. Only `loss` carries a gradient."""

    kind: Loss
    """the row of the table of losses"""
    loss: Tensor
    """() fp64, sum over sequences of row weight times loss, of other weight times the loss with the other sign, and of
    the weight of -logp times -logp"""
    logps: Tensor
    """(S,) fp64, log-prob of each completion"""
    losses: Tensor
    """(S,) fp64, unweighted; of a pair both carry the pair's"""
    entropy: Tensor | None
    """(S,) fp64, sum over the completion's tokens of the entropy of their distribution, where asked for"""

    @property
    def count(self) -> int:
        return self.losses.numel()

    @property
    def saturated(self) -> Tensor:  # (S,) bool
        """Sequences whose loss is so flat that they hardly move the policy any more."""
        return self.kind.saturated(self.losses)


def kto_head(
    hidden: Tensor,  # (N, H) fp64, fp32 or bf16, the rows of S sequences, one sequence after the other
    weight: Tensor,  # (V, H) same dtype
    target: Tensor,  # (N,) int64
    lengths: Tensor,  # (S,) int64, rows of each sequence, sum N; 0 is allowed. On the CPU: the host cuts by it
    *,
    ref_logps: Tensor,  # (S,) log-prob of each completion under the reference
    sign: Tensor,  # (S,) +1 desirable or chosen, -1 undesirable or rejected
    row_weight: Tensor,  # (S,) class weight times row weight
    z0: Tensor,  # () the step's KL estimate, clamped at 0; no gradient flows into it
    beta: float,
    loss: str = "kto",  # a name in `losses.LOSSES`
    nll_weight: Tensor | None = None,  # (S,) weight of each completion's -logp beside the loss, as for an SFT term
    other_weight: Tensor | None = None,  # (S,) weight of each completion's loss with the other sign, see below
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
    budget: int | None = None,  # bytes that one chunk's logits and their gradient may take; None: by the device
    logits_dtype: torch.dtype | None = None,  # None: fp32, but bf16 for bf16 on the CPU
    backend: str = "auto",  # "torch" or "triton"; auto: triton on CUDA where it is installed
) -> HeadOutput:
    """Same value as `kto_kernels.reference.kto_head`; `kto` is Eq. 7 and 8 of arXiv 2402.01306.

    A loss on pairs (`dpo`, `ipo`) takes the two sequences of a pair one after the other. Each carries the pair's loss,
    so that for every loss the result over the number of sequences is the mean over rows, or over pairs.

    A label that is a probability p has two losses: give the likelier sign, p (or 1 - p) of its class's weight as
    `row_weight`, and the rest, of the other class's, as `other_weight`. Only for losses on single sequences.

    Costs three N*H*V matmuls with gradients (two where hidden or weight is frozen), one without. Memory beyond inputs,
    outputs and gradients: `budget`, and a (V, H) fp32 sum (two, when a unit is longer than a chunk). A pair that is
    longer than a chunk takes a fourth with `nll_weight`, in which its two sequences may differ.

    `lengths` on a GPU is read back, which waits for the device. From one id a row: `sequence_lengths`.
    Under autocast hidden and weight are cast as a matmul would. Targets must lie in 0..V-1: a GPU does not check.
    Raises `ValueError` for lengths that do not add up to N, two dtypes, another `loss`, sequences that make no whole
    units, `other_weight` for a loss on pairs, or a `logits_dtype` or `backend` that cannot be had. A second backward
    through the same result raises `RuntimeError`: gradients are scaled in place.
    """
    sizes = lengths.tolist()
    row = pick_loss(loss, len(sizes), soft=other_weight is not None)
    if sum(sizes) != len(hidden) or len(target) != len(hidden):
        raise ValueError(
            f"lengths sum to {sum(sizes)} and there are {len(target)} targets, but hidden has {len(hidden)} rows: give "
            "the completion rows of every sequence, one sequence after the other"
        )
    hidden, weight = one_dtype(hidden, weight)
    per_sequence = {"ref_logps": ref_logps, "sign": sign, "row_weight": row_weight, "nll_weight": nll_weight}
    per_sequence["other_weight"] = other_weight
    for name, tensor in per_sequence.items():
        if tensor is not None and tensor.shape != lengths.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but there are {len(sizes)} lengths: give one value a sequence"
            )
    backend = pick_backend(backend, hidden.device)
    plan = plan_chunks(hidden, weight, pick_logits_dtype(logits_dtype, hidden), backend, budget)
    # as a tensor, so that another beta compiles nothing
    slope = torch.full((), beta, dtype=torch.float64, device=hidden.device)
    terms = Terms(
        loss=row,
        ref_logps=ref_logps,
        sign=sign,
        row_weight=row_weight,
        z0=z0,
        beta=slope,
        nll_weight=nll_weight,
        other_weight=other_weight,
    )
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        value, logps, losses, entropies = _Head.apply(
            hidden, weight, bias, target, sizes, terms, transform, plan, entropy, differentiable
        )
    return HeadOutput(kind=row, loss=value, logps=logps, losses=losses, entropy=entropies if entropy else None)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        sizes: list[int],
        terms: Terms,
        transform: LogitTransform,
        plan: Plan,
        entropy: bool,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wants_hidden, wants_weight, wants_bias = (differentiable and wants for wants in ctx.needs_input_grad[:3])
        chunks = list(cut(sizes, plan.rows, terms.loss.unit))
        largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        logits = LogitPass(
            hidden, weight, bias, target, transform, plan, largest=largest, gradient=differentiable, entropy=entropy
        )
        rows = logits.rows
        row_slope = torch.empty_like(rows.logps)  # of each row: its sequence's, times the row's own scale
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        sums = WeightSums(weight=wants_weight, bias=wants_bias, chunks=len(chunks), backend=plan.backend)
        sequences: Sequences | None = None
        for chunk in chunks:
            span = slice(chunk.start, chunk.stop)
            count = chunk.stop - chunk.start
            logits.run(chunk.start, chunk.stop)
            if grad_hidden is not None and count:
                torch.mm(logits.gradient(count), weight, out=grad_hidden[span])
            if sequences is None:
                # only now, so that a GPU has work while the host prepares them
                sequences = terms.prepare(sizes, hidden.device)
            if chunk.complete:
                sequence_pass(sequences, chunk.first, chunk.last, rows.logps, rows.scale, row_slope, plan.backend)
            if not differentiable or not count:
                continue
            if chunk.piece:
                gradient, scale = logits.gradient(count), None if rows.scale is None else rows.scale[span]
                sums.add_piece(gradient, hidden[span], sequences.piece_factor(span, scale, row_slope.dtype))
                own = sequences.piece_nll(span, scale, row_slope.dtype)
                if own is not None:
                    sums.add(gradient, hidden[span], own)
                if chunk.complete:
                    sums.finish_pieces(sequences.piece_slope(chunk.first))
            else:
                sums.add(logits.gradient(count), hidden[span], row_slope[span])
        if sequences is None:
            sequences = terms.prepare(sizes, hidden.device)
        ctx.save_for_backward(row_slope if wants_hidden else None)
        ctx.gradients = [grad_hidden, *sums.result(weight)]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.backend = plan.backend
        entropies = None if rows.entropy is None else sequences.sums(rows.entropy)
        outputs = (sequences.logps, sequences.losses) + (() if entropies is None else (entropies,))
        ctx.mark_non_differentiable(*outputs)
        return sequences.weighted_loss(), sequences.logps, sequences.losses, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("kto_head's gradients are scaled in place, once: call it again instead of retain_graph")
        (row_slope,) = ctx.saved_tensors
        (grad_hidden, grad_weight, grad_bias), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            factor = row_slope * grad_loss.to(row_slope.dtype)
            grad_hidden = scaled_rows(grad_hidden, factor, ctx.backend, in_place=True)
        grad_weight, grad_bias = (
            None if grad is None else scaled(grad, grad_loss, dtype, ctx.backend)
            for grad, dtype in zip((grad_weight, grad_bias), ctx.dtypes[1:], strict=True)
        )
        return grad_hidden, grad_weight, grad_bias, *[None] * 7

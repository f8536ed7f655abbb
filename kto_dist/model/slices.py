"""`varlen` attention on a CPU: each sequence's own slice, by plain matmuls over groups of sequences of about a length.

Small products are where a CPU loses its time: for each sequence alone they are many, of shapes that no step sees twice,
with rows that fill no register. So short sequences are laid out in groups, each as long as the next multiple of 32:

1. `lay_out`     lengths -> where every row of a group comes from, and where it goes back to; once a micro-batch
2. `_Grouped`    gather; for each group two products and a softmax; gather back. Backward by hand: four products
3. `by_slices`   runs of short sequences through it, long ones through torch's fused kernel, which keeps no weights

What fills a group up lies behind a sequence's end, where no token of it looks, and its own gradient is 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Up to here plain matmuls are faster than the fused kernel on the CPU, with the rounding of `eager` (docs/notes.md).
SHORT = {torch.bfloat16: 512}
_MULTIPLE = 32


def weights_kept(lengths: np.ndarray) -> tuple[int, int]:  # (S,) tokens of short sequences
    """Weights of attention that a layer keeps for each head: of all groups, and of the largest one."""
    wide, count = np.unique(-(-lengths.astype(np.int64) // _MULTIPLE) * _MULTIPLE, return_counts=True)
    of_group = count * wide**2
    return int(of_group.sum()), int(of_group.max(initial=0))


def by_slices(
    query: Tensor,  # (Q, heads, size)
    key: Tensor,  # (Q, key heads, size)
    value: Tensor,  # (Q, key heads, value size)
    lengths: Sequence[int],  # of the sequences, sum Q
    scale: float,
    window: int | None,  # positions that a token sees, itself included
) -> Tensor:  # (Q, heads, value size)
    """Causal attention of each sequence to itself."""
    found, start = [], 0
    for short, run in _runs(lengths, SHORT.get(query.dtype, 0)):
        stop = start + sum(run)
        q, k, v = (x if stop - start == len(x) else x[start:stop] for x in (query, key, value))
        found.append(_Grouped.apply(q, k, v, run, scale, window) if short else _fused(q, k, v, scale, window))
        start = stop
    return found[0] if len(found) == 1 else torch.cat(found)


def _runs(lengths: Sequence[int], short: int) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Short sequences that lie side by side, and each long one by itself."""
    for is_short, run in groupby(lengths, lambda length: length <= short):
        if is_short:
            yield True, tuple(run)
        else:
            yield from ((False, (length,)) for length in run)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    length = len(query)
    near = window if window and window < length else None
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    found = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_seen(_few_sizes(length), near)[:length, :length] if near else None,
        is_causal=near is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found[0].transpose(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where rows go. Q tokens in order become Q' >= Q in groups; a row is a token's part of one head."""

    groups: tuple[tuple[int, int], ...]
    """(sequences, tokens of each) of every group; the tokens sum to Q'."""
    queries: Tensor
    """(Q' * heads,) int64 rows of the queries: a group's sequences, in each its heads, in each its tokens."""
    keys: Tensor
    """(Q' * key heads,) int64, likewise."""
    queries_back: Tensor
    """(Q * heads,) int64 rows of what lies in groups."""
    keys_back: Tensor
    """(Q * key heads,) int64, likewise."""
    filling: Tensor
    """Rows of the queries in groups that belong to no token."""


@lru_cache(maxsize=4)  # of a micro-batch all layers have the same, and none comes again
def lay_out(lengths: tuple[int, ...], heads: int, key_heads: int) -> Layout:
    starts = np.cumsum((0, *lengths))
    of_width: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        of_width.setdefault(-(-length // _MULTIPLE) * _MULTIPLE, []).append(number)
    tokens, real = [], []
    for width, members in of_width.items():
        places = np.arange(width)
        for number in members:
            # what fills up repeats the last token
            tokens.append(starts[number] + np.minimum(places, lengths[number] - 1))
            real.append(places < lengths[number])
    groups = tuple((len(members), width) for width, members in of_width.items())

    def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
        there = np.concatenate([(each * count + np.arange(count)[:, None]).ravel() for each in tokens])
        is_real = np.concatenate([np.tile(each, count) for each in real])
        back = np.empty(int(starts[-1]) * count, np.int64)
        back[there[is_real]] = np.flatnonzero(is_real)
        return torch.from_numpy(there), torch.from_numpy(back), torch.from_numpy(np.flatnonzero(~is_real))

    queries, queries_back, filling = rows(heads)
    keys, keys_back, _ = rows(key_heads)
    return Layout(
        groups=groups, queries=queries, keys=keys, queries_back=queries_back, keys_back=keys_back, filling=filling
    )


def _each(layout: Layout, rows: Tensor, heads: int, sharing: int) -> list[Tensor]:
    """Of each group (sequences * key heads, sharing * tokens, size): heads that share keys lie side by side."""
    parts = rows.split([sequences * heads * tokens for sequences, tokens in layout.groups])
    return [
        part.view(sequences * heads // sharing, sharing * tokens, -1)
        for part, (sequences, tokens) in zip(parts, layout.groups, strict=True)
    ]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        heads, shared = query.shape[1], key.shape[1]
        layout = lay_out(lengths, heads, shared)
        q = _rows(query).index_select(0, layout.queries).mul_(scale)
        k, v = (_rows(x).index_select(0, layout.keys) for x in (key, value))
        out = q.new_empty(len(q), v.shape[1])
        sharing = heads // shared
        weights = []
        for (sequences, tokens), queries, keys, values, into in zip(
            layout.groups,
            _each(layout, q, heads, sharing),
            _each(layout, k, shared, 1),
            _each(layout, v, shared, 1),
            _each(layout, out, heads, sharing),
            strict=True,
        ):
            scores = torch.bmm(queries, keys.transpose(1, 2)).view(sequences, heads, tokens, tokens)
            near = window if window and window < tokens else None
            scores += _bias(tokens, near, scores.dtype)
            weights.append(scores.softmax(-1).view(len(queries), -1, tokens))
            torch.bmm(weights[-1], values, out=into)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.layout, ctx.scale, ctx.heads = layout, scale, (heads, shared)
        return out.index_select(0, layout.queries_back).view(len(query), heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        layout, (heads, shared) = ctx.layout, ctx.heads
        sharing = heads // shared
        count = len(gradient)
        grad = _rows(gradient).index_select(0, layout.queries).index_fill_(0, layout.filling, 0.0)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for seen, queries, keys, values, given, into_q, into_k, into_v in zip(
            weights,
            _each(layout, q, heads, sharing),
            _each(layout, k, shared, 1),
            _each(layout, v, shared, 1),
            _each(layout, grad, heads, sharing),
            _each(layout, dq, heads, sharing),
            _each(layout, dk, shared, 1),
            _each(layout, dv, shared, 1),
            strict=True,
        ):
            torch.bmm(seen.transpose(1, 2), given, out=into_v)
            of_scores = torch.bmm(given, values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, seen, -1, seen.dtype)
            torch.bmm(of_scores, keys, out=into_q)
            torch.bmm(of_scores.transpose(1, 2), queries, out=into_k)
        back = dq.index_select(0, layout.queries_back).mul_(ctx.scale).view(count, heads, -1)
        of_keys, of_values = (x.index_select(0, layout.keys_back).view(count, shared, -1) for x in (dk, dv))
        return back, of_keys, of_values, None, None, None


def _rows(x: Tensor) -> Tensor:  # (Q, heads, size) -> (Q * heads, size)
    return x.reshape(-1, x.shape[-1])


def _few_sizes(length: int) -> int:
    return 1 << (length - 1).bit_length()


@lru_cache(maxsize=32)
def _bias(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(length, length): 0 where seen, else minus infinity."""
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~_seen(length, window), float("-inf"))


@lru_cache(maxsize=4)
def _seen(length: int, window: int | None) -> Tensor:  # (length, length) bool
    seen = torch.ones(length, length, dtype=torch.bool).tril_()
    return seen if window is None else seen.triu_(1 - window)

"""The gradients of weight and bias, summed over chunks in fp32 at least; a long unit apart until it ends.

Where one chunk holds all rows nothing is summed, and the weight's gradient is the product as it comes, in the weight's
dtype: a fp32 sum and a pass over it less.
"""

import torch
from torch import Tensor

from kto_kernels.matmul import add_product, scaled_rows, weighted_sum


class WeightSums:
    """n rows of a chunk at a time: their G (n, V), their hidden states (n, H), and the factor of each row of G."""

    def __init__(self, *, weight: bool, bias: bool, chunks: int, backend: str):
        self._wants_weight, self._wants_bias, self._one_chunk = weight, bias, chunks == 1
        self._backend = backend
        # (V, H) and (V,); None: nothing yet
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        # of a unit longer than a chunk, without its slope
        self._own_weight: Tensor | None = None
        self._own_bias: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor, factor: Tensor) -> None:
        if self._wants_weight:
            rows = scaled_rows(hidden, factor, self._backend)
            if self._one_chunk:
                self._weight = torch.mm(gradient.T, rows)
            else:
                self._weight = add_product(self._weight, gradient.T, rows)
        if self._wants_bias:
            self._bias = _plus(self._bias, weighted_sum(gradient, factor))

    def add_piece(self, gradient: Tensor, hidden: Tensor, factor: Tensor) -> None:
        """Rows of a unit whose slope is not known yet: `factor` is the rest of it."""
        if self._wants_weight:
            self._own_weight = add_product(self._own_weight, gradient.T, scaled_rows(hidden, factor, self._backend))
        if self._wants_bias:
            self._own_bias = _plus(self._own_bias, weighted_sum(gradient, factor))

    def finish_pieces(self, slope: Tensor) -> None:  # ()
        self._weight, self._own_weight = _plus_scaled(self._weight, self._own_weight, slope), None
        self._bias, self._own_bias = _plus_scaled(self._bias, self._own_bias, slope), None

    def result(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is wanted of weight's and bias's gradient; zeros where no row was added."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self._wants_weight and self._weight is None:
            self._weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
        if self._wants_bias and self._bias is None:
            self._bias = weight.new_zeros(len(weight), dtype=wide)
        return self._weight, self._bias


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _plus_scaled(total: Tensor | None, part: Tensor | None, factor: Tensor) -> Tensor | None:
    if part is None:
        return total
    factor = factor.to(part.dtype)
    return part.mul_(factor) if total is None else total.addcmul_(part, factor)

"""A matrix times one number, or each of its rows times one: one read and one write, rounded on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_COLUMNS = 2048


@triton.jit
def _scale_kernel(source, factor, into, count, BLOCK: tl.constexpr):
    # int64: 262,144 * 8,192 elements are as many as int32 can count
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(source + place, mask=inside) * tl.load(factor)
    tl.store(into + place, value.to(into.dtype.element_ty), mask=inside)


def scaled(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The contract of `matmul.scaled`; `factor` () has `source`'s dtype."""
    assert source.is_contiguous()
    into = torch.empty_like(source, dtype=dtype)
    if source.numel():
        with torch.cuda.device_of(source):
            grid = (triton.cdiv(source.numel(), _BLOCK),)
            _scale_kernel[grid](source, factor, into, source.numel(), BLOCK=_BLOCK, num_warps=8)
    return into


@triton.jit(do_not_specialize_on_alignment=["factors"])
def _scale_rows_kernel(source, factors, into, width, source_stride, into_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(factors + row)
    # in the factor's precision, which is fp32 at least
    value = tl.load(source + row * source_stride + columns, mask=inside).to(factor.dtype) * factor
    tl.store(into + row * into_stride + columns, value.to(into.dtype.element_ty), mask=inside)


def scaled_rows(rows: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """The contract of `matmul.scaled_rows`."""
    count, width = rows.shape
    into = rows if in_place else torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    if not rows.numel():
        return into
    source = rows if rows.stride(1) == 1 else rows.contiguous()
    assert into.stride(1) == 1
    with torch.cuda.device_of(rows):
        grid = (count, triton.cdiv(width, _COLUMNS))
        strides = source.stride(0), into.stride(0)
        block = min(_COLUMNS, triton.next_power_of_2(width))
        _scale_rows_kernel[grid](source, factor, into, width, *strides, BLOCK=block, num_warps=4)
    return into

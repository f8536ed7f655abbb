"""A matrix times one number, rounded on the way: one read in fp32 and one write in bf16."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


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

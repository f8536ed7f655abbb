"""The three matrix products of an LM head, each the vendor's, with the precision that its result needs.

n rows, H hidden size, V vocabulary size. `torch.mm` of bf16 matrices rounds its result to bf16; on CUDA it can be
asked for fp32, which costs nothing but the bytes that are written.
"""

import torch
from torch import Tensor


def one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as a plain matmul would take them; else as they are.

    Raises `ValueError` where they differ.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden states ({hidden.dtype}) and weight ({weight.dtype}) must have one dtype: convert one, or use "
            "torch.autocast"
        )
    return hidden, weight


def pick_logits_dtype(asked: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    """None: fp32 (fp64 for fp64), but bf16 for bf16 on the CPU, whose product of bf16 matrices is bf16.

    Raises `ValueError` for a precision that the matmul cannot give.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    possible = (wide, hidden.dtype) if hidden.is_cuda else (hidden.dtype,)
    if asked is None:
        return possible[0]
    if asked not in possible:
        raise ValueError(
            f"logits_dtype ({asked}) must be {' or '.join(str(dtype) for dtype in dict.fromkeys(possible))} for "
            f"{hidden.dtype} hidden states on {hidden.device.type}: leave it out, or pass wider tensors"
        )
    return asked


def logits_of(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:  # (n, H), (V, H), (n, V) -> out
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.T, out=out)
    return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)


# Rows of a (V, H) product that are made at a time where the matmul rounds it: 8,192 * 4,096 in fp32 are 128 MiB.
_PRODUCT_ROWS = 8192


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:  # (V, H) + (V, n) @ (n, H)
    """The sum over chunks, in fp32 at least, changed in place; `total` None is 0."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == wide:
        return torch.mm(left, right) if total is None else total.addmm_(left, right)
    if left.is_cuda:
        if total is None:
            return torch.mm(left, right, out_dtype=wide)
        return torch.addmm(total, left, right, out_dtype=wide, out=total)
    first = total is None
    total = right.new_empty(left.shape[0], right.shape[1], dtype=wide) if total is None else total
    for start in range(0, left.shape[0], _PRODUCT_ROWS):
        part = slice(start, start + _PRODUCT_ROWS)
        product = torch.mm(left[part], right)
        if first:
            total[part] = product
        else:
            total[part] += product
    return total


def weighted_sum(rows: Tensor, scale: Tensor) -> Tensor:  # (n, V), (n,) fp32 or fp64 -> (V,) like scale
    """scale @ rows, what a bias's gradient takes; narrow rows are widened a few at a time."""
    if rows.dtype == scale.dtype:
        return scale @ rows
    total = scale.new_zeros(rows.shape[1])
    for start in range(0, len(rows), 64):
        total += scale[start : start + 64] @ rows[start : start + 64].to(scale.dtype)
    return total


def scaled_rows(
    rows: Tensor,  # (n, H)
    factor: Tensor,  # (n,) fp32 or fp64
    backend: str,
    *,
    in_place: bool = False,
) -> Tensor:  # (n, H) like rows
    """Each row times its factor, rounded once."""
    # not in Triton's interpreter, which truncates what it stores as bf16: that would be one time too many
    if backend == "triton" and rows.is_cuda:
        from kto_kernels.triton_scale import scaled_rows as triton_scaled_rows

        return triton_scaled_rows(rows, factor.contiguous(), in_place=in_place)
    if in_place:
        return rows.mul_(factor[:, None])
    return (rows * factor[:, None]).to(rows.dtype)


# Bytes of an fp32 sum that are scaled and rounded at a time, so that they stay in a CPU's cache.
_SCALED_BYTES = 2**20


def scaled(total: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`total`, a sum that nobody needs any more, times one number: in its own place where it has `dtype` already."""
    factor = factor.to(total.dtype)
    if total.dtype == dtype:
        return total.mul_(factor)
    if backend == "triton":
        from kto_kernels.triton_scale import scaled as triton_scaled

        return triton_scaled(total, factor, dtype)
    into = torch.empty_like(total, dtype=dtype)
    if total.is_cuda:
        return torch.mul(total, factor, out=into)
    step = max(1, _SCALED_BYTES // max(1, total[:1].nbytes))
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        into[part] = total[part].mul_(factor)
    return into

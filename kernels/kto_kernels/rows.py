"""One pass over rows of logits: log-softmax, gather, and in place the gradient of what was gathered.

In:  logits of n rows as the matmul left them, the targets.
Out: log pi(target) of each row; if asked, G = softmax - onehot(target), carried back through the transform and the
     bias: the gradient of -log pi with respect to the matmul's result, each row up to a factor that goes with it.

Two implementations of one contract: in-place torch operations over blocks of rows that stay in cache, and a Triton
kernel (`triton_rows`). A row's target logit and its normaliser always come from the same logits.
"""

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels.transform import LogitTransform

BACKENDS = ("auto", "torch", "triton")

# Rows that the torch pass takes at a time, in bytes of wide logits: several passes over them then hit the cache.
_BLOCK_BYTES = 4 * 2**20
# Above it log(softmax) is as exact as the logits are; below it the softmax underflows.
_SMALLEST_SOFTMAX = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What the pass finds out about n rows; filled in as they come."""

    logps: Tensor
    """(n,) fp32 (fp64 for fp64 logits), log pi(target | prefix)"""
    scale: Tensor | None
    """(n,) likewise, what a row of G is still to be multiplied by; None: by nothing"""
    entropy: Tensor | None
    """(n,) likewise, of the next token's distribution, where asked for"""

    @classmethod
    def empty(cls, rows: int, like: Tensor, *, scale: bool, entropy: bool) -> "Rows":
        def column() -> Tensor:
            return like.new_empty(rows, dtype=torch.promote_types(like.dtype, torch.float32))

        return cls(logps=column(), scale=column() if scale else None, entropy=column() if entropy else None)

    def part(self, rows: slice) -> "Rows":
        return Rows(
            logps=self.logps[rows],
            scale=None if self.scale is None else self.scale[rows],
            entropy=None if self.entropy is None else self.entropy[rows],
        )


def writes_apart(backend: str) -> bool:
    """Whether G needs memory of its own: the Triton kernel may read a row again after writing to it."""
    return backend == "triton"


def pick_backend(backend: str, device: torch.device) -> str:
    """`auto` is Triton on CUDA where it is installed, torch elsewhere. Raises `ValueError` for what cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend ({backend!r}) must be one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if installed and device.type == "cuda" else "torch"
    if not installed:
        raise ValueError("backend ('triton') needs the package triton: install it, or use 'auto'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend ('triton') needs a GPU, not {device}: use 'auto', or set TRITON_INTERPRET=1 to test")
    return backend


def row_pass(
    logits: Tensor,  # (n, V) fp64, fp32 or bf16; overwritten where `gradient` shares its memory
    target: Tensor,  # (n,) int64
    into: Rows,
    *,
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    gradient: Tensor | None,  # (n, V) where G goes, see `writes_apart`; None: no gradient
    backend: str,  # "torch" or "triton"
) -> None:
    """Fills `into`: its scale (which the torch pass leaves as None) only where there is a gradient."""
    if backend == "triton":
        from kto_kernels.triton_rows import row_pass as triton_row_pass

        # the kernel reads the next row's target, and the next column's bias, from the next place
        target, bias = target.contiguous(), None if bias is None else bias.contiguous()
        triton_row_pass(logits, target, bias, transform, gradient, into.logps, into.scale, into.entropy)
    else:
        assert into.scale is None
        _torch_row_pass(logits, target, bias, transform, gradient, into.logps, into.entropy)


def _torch_row_pass(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gradient: Tensor | None,
    logps: Tensor,
    entropies: Tensor | None,
) -> None:
    rows, vocabulary = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = min(rows, max(1, _BLOCK_BYTES // (vocabulary * wide.itemsize)))
    softmax = logits.new_empty(size, vocabulary, dtype=wide)
    for start in range(0, rows, max(1, size)):
        block = slice(start, start + size)
        place = target[block, None]
        z = logits[block].to(wide)  # no copy of what is wide already
        if bias is not None:
            z = z + bias
        z = transform(z)
        p = torch.softmax(z, -1, out=softmax[: z.shape[0]])
        chosen = p.gather(1, place)[:, 0]
        logps[block] = chosen.log()
        if bool((chosen < _SMALLEST_SOFTMAX).any()):
            lost = chosen < _SMALLEST_SOFTMAX
            logps[block][lost] = z[lost].log_softmax(-1).gather(1, place[lost])[:, 0]
        if entropies is not None:
            entropies[block] = torch.special.entr(p).sum(-1)
        if gradient is not None:
            p.scatter_add_(1, place, p.new_full(place.shape, -1.0))
            gradient[block] = transform.derivative_(p, z)

"""fp32 products on CPUs that MKL serves badly, by oneDNN, which torch brings along and uses for bf16 alone.

On processors that are not Intel's MKL multiplies fp32 matrices with AVX2, whatever they have. oneDNN takes AVX-512: 240
in place of 110 GFLOP/s on a core of an EPYC 9005, for the shapes of a 135 million model. Both work in fp32 throughout.
"""

import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor


def pays(tensor: Tensor) -> bool:
    """Whether products of this tensor's device and dtype are better made here than by `torch.mm`."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and _on_this_machine()


@lru_cache(maxsize=1)
def _on_this_machine() -> bool:
    if sys.platform != "linux" or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return {"AuthenticAMD", "avx512f"} <= words and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(left: Tensor, right: Tensor) -> Tensor:  # (n, k) @ (k, m) -> (n, m)
    return linear(left, right.T, None)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (n, k), (m, k), (m,) -> (n, m)
    """No autograd."""
    if not rows.numel() or not weight.numel():
        return torch.nn.functional.linear(rows, weight, bias)
    found = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    assert isinstance(found, Tensor)
    return found

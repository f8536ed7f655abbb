"""What runs on the CPU does not see the machine's GPUs, neither in this process nor in those that it starts."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
"""Asked once, with nothing hidden: CUDA keeps for good what it saw first."""


def wants_gpu(item: pytest.Item) -> bool:
    """Marked so, or a case of the Triton kernels, whose interpreter is for machines without a GPU."""
    case = getattr(item, "callspec", None)
    return item.get_closest_marker("gpu") is not None or (case is not None and case.params.get("backend") == "triton")


@contextmanager
def gpus_hidden() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@contextmanager
def deepspeed_on_gpu() -> Iterator[None]:
    """In the processes that are started inside; within this one it runs on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")
        yield

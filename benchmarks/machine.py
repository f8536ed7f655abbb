"""The machine that is measured on: its name and packages, and how seconds and memory are taken there.

Imports torch when it is first needed, so that a machine without it can still be described.
"""

import contextlib
import os
import platform
import re
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "trl", "accelerate", "liger-kernel", "cut-cross-entropy")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device_name() -> str:
    if has_gpu():
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {cores()} cores"


def device_slug() -> str:
    """As it stands in the names of result files: "nvidia-h200"; every CPU is "cpu"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-") if has_gpu() else "cpu"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if has_gpu():
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def reset_peak() -> None:
    if has_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where it cannot be reset, the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes: of the allocator on a GPU, of the process on a CPU."""
    if has_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

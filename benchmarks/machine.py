"""What every result file says of the machine that it was measured on, and how seconds and memory are taken there.

Imports torch when it is first needed, so that a machine without it can still be described.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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


MEASURED = {
    "kernels": ("kernels/kto_kernels",),
    "training": tuple(
        f"kto_dist/{wing}" for wing in ("base", "data", "store", "model", "objective", "reference", "training")
    ),
    "feedback": ("kto_dist/feedback",),
}
"""Folders of the code that results depend on."""


def digests() -> dict[str, str]:
    """Of the code itself, since a copy on another machine may have no history."""
    found = {}
    for part, folders in MEASURED.items():
        digest = hashlib.sha256()
        for folder in folders:
            for file in sorted((ROOT / folder).rglob("*.py")):
                digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes())
        found[part] = digest.hexdigest()[:16]
    return found


def commit() -> str | None:
    """Of the checkout, or what the variable COMMIT says; "+" after it: files are changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        found = git("rev-parse", "HEAD")
        return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if found else None
    except FileNotFoundError:
        return None


def code() -> dict[str, Any]:
    """Which code was measured."""
    return {"commit": commit(), "digests": digests()}


def frame(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "benchmark": benchmark,
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "code": code(),
        "versions": versions(),
        "settings": settings,
    }


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Whole or not at all; nothing without a file."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


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

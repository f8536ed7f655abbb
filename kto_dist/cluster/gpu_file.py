"""A GPU that the planner does not know, described in a file: `kto-dist plan --gpu FILE.yaml`.

In:  a YAML or JSON file. Out: `Gpu`.

    gpu:
      name: RTX-6000-Ada
      like: L40S          # a known one, whose figures hold where the file gives none
      memory_gib: 47.5
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from kto_dist.base.config import PositiveFloat, Section, Text, resolve
from kto_dist.base.errors import UserError
from kto_dist.cluster.hardware import GB, GIB, GPUS, Gpu, gpu_called

_SUFFIXES = (".yaml", ".yml", ".json")
_Share = Annotated[float, Field(gt=0, le=1)]


class Described(Section):
    """Bandwidths in one direction."""

    name: Text | None = Field(None, description="what it is called; null: as the file")
    like: Text | None = Field(None, description="a known GPU, whose figures hold where none is given here")
    tflops: PositiveFloat | None = Field(None, description="dense bf16 peak, in TFLOP/s; sparse figures are twice it")
    memory_gib: PositiveFloat | None = Field(None, description="memory in GiB, as torch shows it")
    memory_gb_per_s: PositiveFloat | None = Field(None, description="bandwidth of its memory, in GB/s")
    link_gb_per_s: PositiveFloat | None = Field(None, description="to the other GPUs of its node, in GB/s")
    network_gb_per_s: PositiveFloat | None = Field(None, description="of a node of eight of them to others, in GB/s")
    host_gb_per_s: PositiveFloat | None = Field(None, description="to the host's memory, in GB/s")
    matmul: _Share | None = Field(None, description="share of the peak that matmuls reach; null: 0.7")
    attention: _Share | None = Field(None, description="share of the peak that attention reaches; null: 0.3")


class GpuFile(Section):
    """The file: one section."""

    gpu: Described


_FIELDS: dict[str, tuple[str, float]] = {
    "tflops": ("flops", 1e12),
    "memory_gib": ("memory", GIB),
    "memory_gb_per_s": ("bandwidth", GB),
    "link_gb_per_s": ("link", GB),
    "network_gb_per_s": ("network", GB),
    "host_gb_per_s": ("host", GB),
}
"""Of the file -> those of `Gpu`, and what one of them is there."""


def is_gpu_file(name: str) -> bool:
    """Whether this is no name of a GPU."""
    return name.lower().endswith(_SUFFIXES) or "/" in name


def read_gpu(path: Path) -> Gpu:
    """Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"--gpu ({path}) is no file that exists: give one that describes a GPU (docs/planning.md)")
    section = resolve(path, kind=GpuFile)[0].gpu
    known: Gpu | None = None
    if section.like is not None:
        known = gpu_called(section.like)
        if known is None:
            raise UserError(f"{path}: gpu.like ({section.like}) is none that is known: there are {', '.join(GPUS)}")
    missing = [name for name in _FIELDS if getattr(section, name) is None]
    if missing and known is None:
        raise UserError(
            f"{path} lacks {', '.join(f'gpu.{name}' for name in missing)}: give them, or `like` with the name of a "
            "known GPU that it has them from"
        )

    def figure(name: str, own: str, unit: float) -> float:
        given = getattr(section, name)
        return float(getattr(known, own)) if given is None else given * unit

    return Gpu(
        name=section.name or path.stem,
        **{own: figure(name, own, unit) for name, (own, unit) in _FIELDS.items()},
        **{
            name: share
            for name in ("matmul", "attention")
            if (share := getattr(section, name) or getattr(known, name, None)) is not None
        },
    )

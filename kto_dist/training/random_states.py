"""The states of a process's random generators, as a file that holds numbers and no code."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kto_dist.base import comm


def save(path: Path) -> None:
    """As safetensors."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state(comm.device())
    facts = {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})


def restore(path: Path) -> None:
    """Raises `ValueError` where the file holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no states of random generators: {error}") from None
    _set(facts, tensors)


def restore_older(path: Path) -> None:
    """From the pickle of an older version, of which only numbers are read."""
    arrays: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt32DType, _reconstruct]
    with torch.serialization.safe_globals(arrays):
        states = torch.load(path, weights_only=True)
    version, internal, gauss = states["python"]
    kind, keys, *rest = states["numpy"]
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": states["torch"],
    }
    if states["cuda"] is not None:
        tensors["cuda"] = states["cuda"]
    _set({"python": [version, gauss], "numpy": [kind, *rest]}, tensors)


def _set(facts: dict[str, list[Any]], tensors: dict[str, Tensor]) -> None:
    version, gauss = facts["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = facts["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], comm.device())

"""What DeepSpeed has written to disk, read again: for the same ranks, for others, or as one model.

Its files are pickles, which can hold code. None of it runs here: `torch.load` is told to rebuild tensors, plain
values and the few classes of `_CLASSES`, whatever DeepSpeed asks of it, and refuses everything else.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kto_dist.base import agree, comm
from kto_dist.base.errors import UserError
from kto_dist.model.engines import Policy  # first: it imports deepspeed without its noise

# isort: split
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def without_code(source: Path) -> Iterator[None]:
    """Inside, loading a pickle runs none of its code. Raises `UserError` for one that would have to."""
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(_CLASSES):
            yield
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{source} holds something else than tensors and numbers, and is not loaded: {first}") from None
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def load(policy: Policy, folder: Path, tag: str) -> None:
    """Collective. Weights, optimizer states and the engine's own counters.

    Raises, on every rank, where one cannot read its files: `UserError`, unless the cause is none that a disk has.
    """

    def read() -> None:
        with without_code(folder / tag), _readable(folder / tag):
            policy.read(folder, tag)

    own, turns = (comm.local_rank(), max(comm.gather(comm.local_rank())) + 1) if policy.reads_in_turn else (0, 1)
    for turn in range(turns):
        agree.together(lambda: read() if turn == own else None)  # noqa: B023  # it is called at once
    policy.loaded()


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Inside, what a disk refuses is a `UserError`, also as torch words it."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise UserError(
            f"the checkpoint {source} cannot be read: {' '.join(str(error).split())[:300]}; check the disk or the "
            "connection to it, and the same command tries again"
        ) from error


def recut(source: Path, target: Path) -> str | None:
    """Cuts a checkpoint anew, for any number of ranks. Returns what went wrong, or None."""
    code = f"import sys; from {__name__} import recut_here; recut_here(sys.argv[1], sys.argv[2])"
    done = subprocess.run([sys.executable, "-c", code, str(source), str(target)], capture_output=True, text=True)
    return done.stderr.strip()[-500:] if done.returncode else None


def recut_here(source: str, target: str) -> None:
    """In a process of its own: it takes others to help."""
    # they have to know of `_CLASSES` as well
    multiprocessing.set_start_method("fork", force=True)
    sys.argv[1:] = ["--inject_missing_state", "--input_folder", source, "--output_folder", target]
    with without_code(Path(source)):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def consolidated(folder: Path, tag: str, stage: int, dtype: torch.dtype, *, adapted: bool = False) -> dict[str, Tensor]:
    """The whole model of a checkpoint, or with `adapted` its adapter, as it was trained in `dtype`; no process group is
    needed. Buffers keep their own: rounded, those that choose a mixture's experts would choose others."""
    with without_code(folder / tag), contextlib.redirect_stdout(io.StringIO()):
        if stage < 3:  # every rank has whole weights, and the first one has written them
            state = _written(folder / tag / "mp_rank_00_model_states.pt")["module"]
        else:
            # the optimizer's, in fp32
            whole = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag, exclude_frozen_parameters=adapted)
            beside = _written(min((folder / tag).glob("zero_pp_rank_*_model_states.pt")))  # all ranks have them
            buffers = set(beside["buffer_names"])
            state = _rounded(whole, dtype) | {n: tensor for n, tensor in beside["module"].items() if n in buffers}
    # buffers are saved along
    kept = {name: tensor for name, tensor in state.items() if ".lora_" in name} if adapted else state
    return {name.removeprefix("lm."): tensor for name, tensor in kept.items()}


def _written(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tied weights stay one tensor, and are saved once."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        if (tensor.data_ptr(), tensor.shape) not in done:
            done[tensor.data_ptr(), tensor.shape] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: done[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}

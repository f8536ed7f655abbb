"""What DeepSpeed is given: our options with the user's file merged in, and the folders that it swaps to.

In:  the `deepspeed` section. Out: a dict of DeepSpeed's options. Nothing here imports DeepSpeed.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.model.config import DeepspeedConfig, read_deepspeed_json


def zero_stage(section: DeepspeedConfig, dtype: torch.dtype) -> int:
    """The stage that is used. In bf16 without ZeRO DeepSpeed would update bf16 weights directly and lose every update
    below half an ulp, so stage 0 becomes 1 there: same results, fp32 master weights, less memory."""
    asked = section.zero_stage
    return 1 if asked == 0 and dtype == torch.bfloat16 else asked


def deepspeed_options(section: DeepspeedConfig, dtype: torch.dtype, clip: float) -> dict[str, Any]:
    """What DeepSpeed is given: our own options, then the user's file merged in.

    Raises `UserError` where the file contradicts a setting of ours; its `"auto"` values mean ours.
    """
    zero: dict[str, Any] = {"stage": zero_stage(section, dtype)}
    for target, device in (
        ("offload_optimizer", section.offload_optimizer),
        ("offload_param", section.offload_parameters),
    ):
        if device != "none":
            zero[target] = offload_options(device, section.nvme_path)
    options = {
        # Micro-batches hold as many rows as fit into their tokens, and a step as many micro-batches as it needs:
        # the boundary of a step is set by hand, and these two only have to multiply to train_batch_size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        # a look at every gradient for what is no number, twice a step: the norm shows it as well, and the run stops
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        # it waits for the device before and after every forward, and counts what we count ourselves
        "timers": {"throughput": {"enabled": False}},
    }
    if section.config:
        _merge(options, read_deepspeed_json(section.config), section.config)
    return options


def offload_options(device: str, nvme_path: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"device": device, "pin_memory": torch.cuda.is_available()}
    if device == "nvme":
        # An engine deletes what another left below its path, so each job and engine has a path of its own.
        port = os.environ["MASTER_PORT"]
        owner = os.getpid() if port == comm.NO_PORT else os.getppid()
        options["nvme_path"] = str(Path(str(nvme_path)) / f"kto-{port}-{owner}")
    return options


# Locks of this process's swap folders, held until it ends, however it ends.
_held: dict[str, int] = {}


def claim_swap_folders(options: dict[str, Any]) -> set[str]:
    """Locks the swap folders of an engine, and removes those beside them whose owners were killed.

    Raises `UserError` where they cannot be made.
    """
    zero = options["zero_optimization"]
    found = {zero[key].get("nvme_path") for key in ("offload_optimizer", "offload_param") if key in zero} - {None}
    for folder in map(Path, found):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if str(folder) not in _held:
                _held[str(folder)] = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(_held[str(folder)], fcntl.LOCK_SH)
            for lock in folder.parent.glob("kto-*.lock"):
                if lock.with_suffix("") != folder:
                    _remove_if_abandoned(lock)
        except OSError as error:
            raise UserError(f"nvme_path ({folder.parent}) cannot be used: {error}; name a folder that can") from None
    return found


def _remove_if_abandoned(lock: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another rank was faster
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


def release_swap_folder(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.lock").unlink(missing_ok=True)
    if folder in _held:
        os.close(_held.pop(folder))


_SET_BY = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.tokens_per_microbatch",
    "gradient_accumulation_steps": "train.global_batch and train.tokens_per_microbatch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "bf16.enabled": "train.dtype",
    "fp16.enabled": "train.dtype",
    "torch_autocast.enabled": "train.dtype",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], file: str, prefix: str = "") -> None:
    for key, value in theirs.items():
        name = prefix + key
        if value == "auto":
            continue
        if name in _SET_BY:
            # an absent option of ours is a "no": fp16, an offload target
            if value != ours.get(key, False):
                raise UserError(
                    f"deepspeed.config ({file}): {name} ({json.dumps(value)}) contradicts this run's "
                    f"{json.dumps(ours.get(key, 'unset'))}: remove it there and set {_SET_BY[name]}"
                )
        elif isinstance(value, dict):
            nested = ours.setdefault(key, {})
            _merge(nested, value, file, name + ".")
            if not nested:
                del ours[key]
        else:
            ours[key] = value

"""The inside of DeepSpeed's ZeRO optimizers, where what they do has to be put right: sums of gradients, and counts.

In:  an optimizer that DeepSpeed has made. Nothing here imports DeepSpeed.
"""

from typing import Any

import torch
from torch import Tensor


def own_steps(optimizer: Any) -> None:
    """A count of updates for each parameter group: after a universal load at stage 3 they share one, which every group
    would count on."""
    seen: set[int] = set()
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        step = state.get("step")
        if torch.is_tensor(step):
            if id(step) in seen:
                state["step"] = step.clone()
            seen.add(id(state["step"]))


def sum_in_place(optimizer: Any) -> None:
    """Lets a ZeRO optimizer of stage 2 add gradients straight to its flat fp32 sums, and frees each at once.

    For a rank alone, where nothing has to be packed, divided, reduced and unpacked: five passes over all gradients.
    """

    def process(parameter: Tensor, group: int) -> None:
        optimizer.setup_buckets()
        number = optimizer.get_param_id(parameter)
        total = optimizer._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        assert parameter.grad is not None
        _add_wide(total, parameter.grad.reshape(-1))
        parameter.grad = None

    optimizer.process_gradients = process
    optimizer._use_compact_grad_partition_buffer = lambda group: True


_ADDED = 2**19
"""Elements that are widened at a time: they stay in a CPU's cache."""


def _add_wide(total: Tensor, narrow: Tensor) -> None:
    """Adds in place. On a CPU a sum of two dtypes is slower than widening first."""
    if total.dtype == narrow.dtype:
        total += narrow
        return
    for part, more in zip(total.split(_ADDED), narrow.split(_ADDED), strict=True):
        part += more.to(total.dtype)


def forget_sums(optimizer: Any) -> None:
    """What a ZeRO optimizer of stage 1 or 2 has summed up, and where it stood in its backward."""
    while optimizer._backward_active_depth:
        optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if hasattr(optimizer, "clear_hp_grads"):  # bf16 at stage 1 sums in flat fp32 buffers
        optimizer.clear_hp_grads()
        return
    for group in optimizer.bit16_groups:
        for parameter in group:
            parameter.grad_accum = None
    for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for number in sums:
            sums[number] = None
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    for number in range(len(optimizer.params_already_reduced)):
        optimizer.params_already_reduced[number] = False
    optimizer.reset_partition_gradient_structures()
    optimizer._release_ipg_buffers()

"""The head's rows, a chunk at a time: logits, log-probs, and what the gradient of the logits is made of.

A chunk's G is what the second and third matmul take, so it is as large as the budget allows. Its logits are needed for
the row pass alone: where G has memory of its own they are made a part of the chunk at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels.chunks import TILE_ROWS, even_rows, evenly
from kto_kernels.matmul import logits_of
from kto_kernels.rows import Rows, row_pass, writes_apart
from kto_kernels.transform import LogitTransform

DEFAULT_BUDGET = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}

# Rows whose logits are made at once where G lies apart: enough to keep a GPU's matmul at its rate.
LOGIT_ROWS = 1024
# A buffer's rows begin at multiples of so many elements: matmuls and wide loads are slow where they do not.
_ALIGNED = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much goes through the head at a time."""

    rows: int
    """of a chunk"""
    logit_rows: int
    """of them, whose logits are there at once"""
    logits_dtype: torch.dtype
    apart: bool
    """whether G has memory of its own"""
    backend: str
    """of what is no matmul: "torch" or "triton", see `rows`"""


def plan_chunks(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    logits_dtype: torch.dtype,
    backend: str,
    budget: int | None,  # bytes of logits and G together; None: by the device
) -> Plan:
    if budget is None:
        budget = DEFAULT_BUDGET.get(hidden.device.type, DEFAULT_BUDGET["cuda"])
    of_logits, of_gradient = (weight.shape[0] * dtype.itemsize for dtype in (logits_dtype, hidden.dtype))
    apart = writes_apart(backend) or logits_dtype != hidden.dtype
    if not apart:
        rows = logit_rows = max(1, budget // of_logits)
    else:
        logit_rows = max(1, min(LOGIT_ROWS, budget // (4 * of_logits)))
        rows = max(1, (budget - logit_rows * of_logits) // of_gradient)
        if hidden.is_cuda:
            processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
            rows = even_rows(len(hidden), rows, hidden.shape[1], processors)
    return Plan(rows=rows, logit_rows=logit_rows, logits_dtype=logits_dtype, apart=apart, backend=backend)


def _matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    stride = columns if like.device.type == "cpu" else -(-columns // _ALIGNED) * _ALIGNED
    return like.new_empty(rows, stride, dtype=dtype)[:, :columns]


class LogitPass:
    """Steps 1 and 2 of the head for any chunk of its rows, in buffers that every chunk uses in turn."""

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        target: Tensor,  # (N,)
        transform: LogitTransform,
        plan: Plan,
        *,
        largest: int,  # rows of the largest chunk
        gradient: bool,
        entropy: bool = False,
    ):
        self._hidden, self._weight, self._bias, self._target = hidden, weight, bias, target
        self._transform, self._backend = transform, plan.backend
        self._rows = min(plan.logit_rows, largest)
        self._logits = _matrix(hidden, self._rows, len(weight), plan.logits_dtype)
        self._gradient: Tensor | None = None
        if gradient:
            self._gradient = _matrix(hidden, largest, len(weight), hidden.dtype) if plan.apart else self._logits
        self.rows = Rows.empty(len(hidden), hidden, scale=gradient and writes_apart(plan.backend), entropy=entropy)

    def run(self, start: int, stop: int) -> None:
        """Fills `rows` from start to stop, and G, which the next call overwrites."""
        # a matmul takes as long for the tile that it fills as for the one that it begins
        most = max(1, self._rows)
        for begin, end in evenly(start, stop, most, TILE_ROWS if most % TILE_ROWS == 0 else 1):
            logits = logits_of(self._hidden[begin:end], self._weight, self._logits[: end - begin])
            row_pass(
                logits,
                self._target[begin:end],
                self.rows.part(slice(begin, end)),
                bias=self._bias,
                transform=self._transform,
                gradient=None if self._gradient is None else self._gradient[begin - start : end - start],
                backend=self._backend,
            )

    def gradient(self, rows: int) -> Tensor:  # (rows, V)
        """G of the chunk that was run last."""
        assert self._gradient is not None
        return self._gradient[:rows]

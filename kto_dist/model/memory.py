"""Out of memory is no end: the step is done again with half the tokens a micro-batch.

The micro-batch decides nothing (promise 1), so the trajectory is that of a run with the smaller one, to rounding. What
has to be known is where ranks may wait for each other when one of them runs out:

1. KL forwards at stages 0 to 2, forwards and backwards at stages 0 and 1, and a single rank at stages 0 to 2: nobody
   waits, so all ranks throw the step's gradients away and do it again (`Memory.within`)
2. elsewhere ZeRO's hooks gather and reduce in mid-pass: the run starts again from its last checkpoint
   (`base/restart.py`)
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.restart import overrides
from kto_dist.data.batch import Cutting

Result = TypeVar("Result")


class OutOfMemory(RuntimeError):
    """Some rank ran out of memory in a phase that can be done again; raised on all ranks alike."""

    def __init__(self, phase: str):
        super().__init__(f"out of memory in {phase}")
        self.phase = phase


class NeedsRestart(RuntimeError):
    """This rank ran out of memory while others may be waiting for it: the job has to start again."""

    def __init__(self, phase: str, settings: dict[str, int | None]):
        super().__init__(
            f"out of memory in {phase}, where the ranks wait for each other: start again with "
            f"{' '.join(overrides(settings))}"
        )
        self.settings = settings
        """What has to change."""
        self.step = 0
        """Updates done, where the one who raises or passes it on knows."""


_TOLD_AS = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
"""How the CPU's allocator, CUDA's libraries, NCCL and Triton put it."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error).lower() for text in _TOLD_AS
    )


def more_room() -> str:
    """What helps where the optimizer's states take it: those of a CPU lie where offloaded ones would."""
    if comm.device().type == "cpu":
        return "take a host with more memory"
    return "offload (deepspeed.offload_optimizer: cpu)"


def ends_suddenly(device: torch.device) -> bool:
    """Whether what does not fit is refused at once, where a host begins to swap, or ends a process."""
    return device.type == "cuda"


def attempt(work: Callable[[], Result], phase: str, *, again: bool) -> Result:
    """Does the work of a phase. With `again` (collective): raises `OutOfMemory` on all ranks where it fails on one.

    Without, a failure is raised where it happens: the other ranks may be waiting for this one.
    """
    if not again:
        return work()
    result, failed = None, False
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = True
        # its frames hold the tensors that there was no room for
        error.__traceback__ = None
    if comm.any_(failed):
        raise OutOfMemory(phase)
    assert result is not None
    return result


def release() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Memory:
    """How many tokens a micro-batch has, which only ever falls."""

    cutting: Cutting
    """Of the work to come."""
    longest: int
    """Tokens of the longest row or KL pair: a micro-batch holds one at the least."""
    setting: str
    """Where the user sets the tokens."""
    warn: Callable[[str], None]
    halved: list[str] = field(default_factory=list)
    """What was said of it, for the summary."""

    def within(self, run: Callable[[Cutting], Result], forget: Callable[[], None]) -> Result:
        """Collective. `run(cutting)`, again with half the tokens as often as it runs out of memory.

        `forget` throws away what a failed try left behind. Raises `UserError` where the longest row alone is too much,
        `NeedsRestart` where other ranks may be waiting for this one.
        """
        while True:
            try:
                return run(self.cutting)
            except OutOfMemory as error:
                phase = error.phase
            except NeedsRestart:
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise NeedsRestart("a micro-batch", {self.setting: self._half("a micro-batch")}) from None
            forget()
            release()
            self.halve(phase)

    def halve(self, phase: str) -> None:
        """Raises `UserError` where there is nothing left to halve."""
        tokens, half = self.cutting.tokens, self._half(phase)
        self.cutting = replace(self.cutting, tokens=half)
        said = f"out of memory in {phase} at {tokens:,} tokens a micro-batch: going on with {half:,}"
        self.halved.append(said)
        self.warn(f"{said}. To start there, set {self.setting}={half}")

    def _half(self, phase: str) -> int:
        if self.cutting.tokens <= self.longest:
            raise UserError(
                f"out of memory in {phase}, with the longest row ({self.longest} tokens) alone in a micro-batch: lower "
                "data.max_length, turn on model.gradient_checkpointing, shard more (deepspeed.zero_stage: 3), or "
                f"{more_room()}"
            )
        return max(self.longest, self.cutting.tokens // 2)

"""What DeepSpeed reads and writes of a checkpoint, so that no rank waits for one whose disk fails.

Its `save_checkpoint` and `load_checkpoint` work through files between collectives, and a rank that raises there leaves
the others waiting. Here a rank only notes what fails, or is asked for its files alone; then all ranks meet, and hear of
it. Of an engine and nothing else: deepspeed is not imported here.

1. `writes_noted`                   inside, a save's writes fail in silence, and the failures are the caller's to raise;
                                    or they are put off, and stay in memory as they were at this moment
2. `copy_swapped`                   the part of a save that copies what an optimizer has swapped to disk
3. `gathers_put_off`, `gather`      inside the one, a load asks nothing of other ranks; the other makes up for it
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class PutOff:
    """A file that has still to be written."""

    path: Path
    content: memoryview


@contextmanager
def writes_noted(engine: Any, put_off: list[PutOff] | None = None) -> Iterator[list[Exception]]:
    """Inside, a write of DeepSpeed's that fails is noted and not raised, and what is swapped to disk is not copied.

    With `put_off` its files come there, and not to the disk. One that memory has no room for is written at once, as all
    are where `deepspeed.config` names a writer of its own.

    The scripts that it copies beside checkpoints stay away: `kto-dist export` does what they do, and rank 0 would write
    them past the one place where writes can be noted.
    """
    failures: list[Exception] = []

    def guarded(write: Callable[..., Any]) -> Callable[..., Any]:
        def try_it(*arguments: Any, **named: Any) -> Any:
            try:
                return write(*arguments, **named)
            except Exception as error:
                return failures.append(error)

        return try_it

    writer = engine.checkpoint_engine
    write = writer.save
    if type(writer).__name__ != "TorchCheckpointEngine":
        put_off = None

    def save(state_dict: Any, path: Any) -> None:
        if put_off is None:
            return write(state_dict, path)
        content = io.BytesIO()
        try:
            write(state_dict, content)
        except (MemoryError, RuntimeError):  # the latter is what torch makes of the former
            content.close()
            return write(state_dict, path)
        put_off.append(PutOff(Path(path), content.getbuffer()))

    writer.save, writer.makedirs = guarded(save), guarded(writer.makedirs)
    engine._copy_recovery_script = lambda folder: None
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield failures
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script, engine.zero_nvme_offload_optimizer


def copy_swapped(engine: Any, checkpoint: Path) -> None:
    """Of optimizer states that lie on a disk (`deepspeed.offload_optimizer: nvme`) this rank's share, to where a load
    looks for it. Does nothing where they lie in memory. Raises `OSError`."""
    if not engine.zero_nvme_offload_optimizer():
        return
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    shutil.copytree(
        engine.optimizer.optimizer_swapper.swap_folder,
        checkpoint / "offloaded_tensors" / f"rank{rank:02d}",
        ignore=lambda _, names: [name for name in names if "gradient" in name],
    )


@contextmanager
def gathers_put_off(engine: Any) -> Iterator[None]:
    """Inside, `load_checkpoint` reads this rank's files, and no rank waits for another; `gather` has to follow."""
    optimizer, zero = engine.optimizer, engine._config.zero_config
    in_turn = zero.pipeline_loading_checkpoint  # each rank would wait for the word of the one before it
    engine._optimizer_has_ckpt_event_epilogue = lambda: False
    optimizer.update_lp_params = lambda: None
    zero.pipeline_loading_checkpoint = False
    try:
        yield
    finally:
        del engine._optimizer_has_ckpt_event_epilogue, optimizer.update_lp_params
        zero.pipeline_loading_checkpoint = in_turn


def reads_in_turn(engine: Any) -> bool:
    """Whether the ranks of a host read a checkpoint one after the other, as the user's own options may ask for."""
    return bool(engine._config.zero_config.pipeline_loading_checkpoint)


def gather(engine: Any) -> None:
    """Collective. What `load_checkpoint` does when it has read: parameters that every rank holds are gathered."""
    if engine._optimizer_has_ckpt_event_epilogue():
        engine.optimizer.checkpoint_event_epilogue()
    if engine.load_universal_checkpoint() and not engine.zero_optimization_partition_weights():
        engine.optimizer.update_lp_params()

"""One rank of a run that `scaling.py` measures, started by it with RANK, LOCAL_RANK and WORLD_SIZE.

    python benchmarks/scaling_rank.py CONFIG.yaml RESULT.json STEPS

Leaves, on rank 0: seconds of each step, peaks of memory, and what the process held before the policy came.
"""

import json
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
from trainers import Enough


def main() -> None:
    config_file, result_file, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    import torch

    from kto_dist.base import comm
    from kto_dist.training.config import Config
    from kto_dist.training.loop import train

    torch.set_num_threads(1)
    comm.init()
    updates: list[float] = []
    before = _held()

    def after_step(result: Any) -> None:
        updates.append(machine.now())
        if len(updates) == 2:
            # what loading took for a moment, and the first step's own buffers, are not what training takes
            machine.reset_peak()
        if len(updates) == steps:
            raise Enough

    with suppress(Enough):
        train(Config.load(config_file), watch=after_step)
    if comm.is_main():
        seconds = [after - before for before, after in pairwise(updates[1:])]
        content = {"seconds": seconds, "peak_bytes": machine.peak(), "held_before": before}
        result_file.write_text(json.dumps(content))


def _held() -> int:
    """Bytes: of the process on a CPU; a GPU's allocator counts from nothing."""
    if machine.has_gpu():
        return 0
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    from kto_dist.base.exits import leave

    main()
    leave(0)

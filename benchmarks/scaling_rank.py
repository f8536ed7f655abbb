"""One rank of a run that `scaling.py` measures, started by it with RANK, LOCAL_RANK and WORLD_SIZE.

    python benchmarks/scaling_rank.py CONFIG.yaml RESULT.json WARM STEPS [memory]

Leaves, on rank 0: seconds of each step after the WARM first ones; with `memory` the peak of these steps, which take
longer then. What loading took for a moment, and the first step's own buffers, are not what training takes.
"""

import json
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import peaks
from trainers import Enough

BUCKETS = (2 * 5 * 10**8, 4 * 5 * 10**8)
"""Bytes of ZeRO 2's and 3's buffer for gradients, which few parameters fill in part: a rank alone on a CPU never writes
to ZeRO 2's (`model.zero_sums`)."""


def main() -> None:
    config_file, result_file, warm, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import torch

    from kto_dist.base import comm
    from kto_dist.training.config import Config
    from kto_dist.training.loop import train

    torch.set_num_threads(1)
    comm.init()
    meter = peaks.Meter(untouched=BUCKETS) if "memory" in sys.argv[5:] else None
    updates: list[float] = []
    peak: list[int] = []

    def after_step(result: Any) -> None:
        updates.append(machine.now())
        if meter is not None and len(updates) > warm:
            peak.append(meter.bytes())
        if len(updates) == steps:
            raise Enough
        if meter is not None and len(updates) >= warm:
            # each step anew: what was there before it, and goes in it, nobody counts
            meter.begin()
        if len(updates) >= warm:
            updates[-1] = machine.now()

    with suppress(Enough):
        train(Config.load(config_file), watch=after_step)
    if comm.is_main():
        seconds = [after - before for before, after in pairwise(updates[warm - 1 :])]
        content = {
            "seconds": seconds,
            "peak_bytes": max(peak, default=None),
            "held_bytes": meter.held if meter else None,
        }
        result_file.write_text(json.dumps(content))


if __name__ == "__main__":
    from kto_dist.base.exits import leave

    main()
    leave(0)

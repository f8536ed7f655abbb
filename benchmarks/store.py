"""The reference store at scale: seconds to open it, milliseconds to look up a step's rows, bytes a pair.

In:  how many pairs, and how many a shard. Out: a table, and with `--json` a file for the README's figures. The same
function serves `benchmarks/reference.py`.

1. write   random keys, as hashes are, through `Store.add`, in shards as a scoring pass would leave them
2. open    in a fresh process, which reads and checks every byte; the files are in the page cache, as they are for all
           but the first rank of a host, unless `--cold` asks the kernel to forget them first
3. look up the rows of a step, half of them in the store, in a random order; the median of many steps

Not measured here: object stores and shared file systems, whose time is that of their network.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.shards import KEY, NAME
from kto_dist.store.store import Store

IDENTITY = Fingerprint(weights="benchmark", config="none", dtype="float32", logits="float32", attention="sdpa")
STEPS, ROWS_A_STEP = 200, 1000


def measure_store(pairs: int, folder: str, pairs_a_shard: int = 65_536, *, cold: bool = False) -> dict[str, Any]:
    """Fills a store below `folder`, which should be empty, and measures it in a process of its own."""
    started = time.perf_counter()
    store = Store(folder, IDENTITY, model="benchmark")
    rng = np.random.default_rng(0)
    for start in range(0, pairs, pairs_a_shard):
        size = min(pairs_a_shard, pairs - start)
        store.add(_random_keys(rng, size), rng.normal(-50, 20, size), rng.integers(1, 500, size))
    written = time.perf_counter() - started
    files = [path for path in Path(str(store.folder)).iterdir() if NAME.fullmatch(path.name)]
    command = [sys.executable, __file__, "--child", folder, "--pairs", str(pairs), *(["--cold"] if cold else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {
        "pairs": pairs,
        "shards": len(files),
        "bytes_per_pair": sum(path.stat().st_size for path in files) / pairs,
        "write_seconds": written,
        **json.loads(done.stdout),
    }


def _random_keys(rng: np.random.Generator, size: int) -> np.ndarray:
    keys = np.empty(size, KEY)
    for half in ("high", "low"):
        keys[half] = rng.integers(0, 2**64, size, dtype=np.uint64)
    return keys


def _peak_kibibytes() -> int:
    # not getrusage, whose peak starts at that of the process which started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _measure(folder: str, pairs: int, cold: bool) -> dict[str, float]:
    if cold:
        for path in Path(folder).rglob("*.parquet"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # a reader has its keys before it opens the store
    rng = np.random.default_rng(1)
    before = _peak_kibibytes()
    started = time.perf_counter()
    store = Store(folder, IDENTITY, warn=lambda text: print(text, file=sys.stderr))
    store.lookup(_random_keys(rng, 1))
    opened = time.perf_counter() - started
    peak = _peak_kibibytes()
    assert store._known is not None and len(store._known) == pairs
    known, seconds = store._known.keys(), []
    for _ in range(STEPS):
        keys = _random_keys(rng, ROWS_A_STEP)
        keys[::2] = known[rng.integers(0, pairs, ROWS_A_STEP // 2)]
        keys = rng.permutation(keys)
        started = time.perf_counter()
        _, found = store.lookup(keys)
        seconds.append(time.perf_counter() - started)
        assert found.sum() == ROWS_A_STEP // 2
    return {
        "open_seconds": opened,
        "lookup_ms_per_1000": 1000 * statistics.median(seconds),
        "peak_bytes": 1024 * (peak - before),
    }


@click.command()
@click.option("--pairs", default=10_000_000, show_default=True)
@click.option("--pairs-a-shard", default=65_536, show_default=True)
@click.option("--cold", is_flag=True, help="Ask the kernel to forget the files before they are opened.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--child", hidden=True)
def main(pairs: int, pairs_a_shard: int, cold: bool, target: Path | None, child: str | None) -> None:
    """Measure a store of random pairs in a temporary folder."""
    if child:
        print(json.dumps(_measure(child, pairs, cold)))
        return
    with tempfile.TemporaryDirectory(prefix="kto-store-") as folder:
        figures = measure_store(pairs, folder, pairs_a_shard, cold=cold)
    for name, value in figures.items():
        click.echo(f"{name:>20}  {value:,.3f}" if isinstance(value, float) else f"{name:>20}  {value:,}")
    if target:
        target.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

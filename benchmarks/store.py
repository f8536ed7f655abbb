"""The reference store at scale: seconds and memory to look up few and many of its pairs, bytes a pair.

In:  how many pairs, and how many a shard. Out: figures, and with `--json` a file for docs/figures.md.

1. write   random keys, as hashes are, through `Store.add`, in shards as a scoring pass would leave them
2. few     a thousand pairs, half of them in the store, looked up in a fresh process, which reads and checks every byte;
           the files are in the page cache, as they are for all but the first rank of a host, unless `--cold` asks the
           kernel to forget them first
3. all     every pair of the store, in a random order, in another process

Not measured here: object stores and shared file systems, whose time is that of their network.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import records

from kto_dist.store.fingerprint import Fingerprint
from kto_dist.store.shards import KEY, NAME
from kto_dist.store.store import Store

IDENTITY = Fingerprint(weights="benchmark", config="none", dtype="float32", logits="float32", attention="sdpa")
FEW = 1000


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
    figures = {}
    for wanted in (FEW, pairs):
        command = [sys.executable, __file__, "--child", folder, "--wanted", str(wanted), *["--cold"] * cold]
        command += ["--pairs", str(pairs), "--pairs-a-shard", str(pairs_a_shard)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures["few" if wanted == FEW else "all"] = json.loads(done.stdout)
    return {
        "pairs": pairs,
        "shards": len(files),
        "bytes_per_pair": sum(path.stat().st_size for path in files) / pairs,
        "write_seconds": written,
        **figures,
    }


def _random_keys(rng: np.random.Generator, size: int) -> np.ndarray:
    keys = np.empty(size, KEY)
    for half in ("high", "low"):
        keys[half] = rng.integers(0, 2**64, size, dtype=np.uint64)
    return keys


def _kibibytes(name: str) -> int:
    """VmRSS: what this process has; VmHWM: its peak. (That of getrusage starts at the peak of whoever started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _measure(folder: str, pairs: int, wanted: int, pairs_a_shard: int, *, cold: bool) -> dict[str, float]:
    if cold:
        for path in Path(folder).rglob("*.parquet"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # a reader has its keys before it opens the store
    keys = _wanted(pairs, wanted, pairs_a_shard)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _kibibytes("VmRSS")
    started = time.perf_counter()
    _, found = Store(folder, IDENTITY, warn=lambda text: print(text, file=sys.stderr)).lookup(keys)
    seconds = time.perf_counter() - started
    assert found.sum() == (wanted if wanted == pairs else wanted // 2)
    return {"pairs": wanted, "seconds": seconds, "peak_bytes": 1024 * (_kibibytes("VmHWM") - before)}


def _wanted(pairs: int, wanted: int, pairs_a_shard: int) -> np.ndarray:
    """All of the store's keys, or so many of its first shard's and as many others; in a random order."""
    rng, found = np.random.default_rng(0), []
    for start in range(0, pairs if wanted == pairs else 1, pairs_a_shard):
        size = min(pairs_a_shard, pairs - start)
        found.append(_random_keys(rng, size))
        rng.normal(-50, 20, size), rng.integers(1, 500, size)  # as they were drawn in between
    shuffled = np.random.default_rng(1)
    if wanted < pairs:
        found = [found[0][: wanted // 2], _random_keys(shuffled, wanted - wanted // 2)]
    return shuffled.permutation(np.concatenate(found))


@click.command()
@click.option("--pairs", default=10_000_000, show_default=True)
@click.option("--pairs-a-shard", default=65_536, show_default=True)
@click.option("--cold", is_flag=True, help="Ask the kernel to forget the files before they are opened.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the figures there.")
@click.option("--child", hidden=True)
@click.option("--wanted", default=FEW, hidden=True)
def main(pairs: int, pairs_a_shard: int, cold: bool, target: Path | None, child: str | None, wanted: int) -> None:
    """Measure a store of random pairs in a temporary folder."""
    if child:
        print(json.dumps(_measure(child, pairs, wanted, pairs_a_shard, cold=cold)))
        return
    with tempfile.TemporaryDirectory(prefix="kto-store-") as folder:
        figures = measure_store(pairs, folder, pairs_a_shard, cold=cold)
    for name, value in figures.items():
        click.echo(f"{name:>20}  {value}")
    records.write_json(target, {**records.frame("store", {"pairs_a_shard": pairs_a_shard, "cold": cold}), **figures})


if __name__ == "__main__":
    main()

"""Logs of millions of rows: how fast they become tokens, how long a plan of all of their steps takes, and how much
memory of the host each stage needs.

    python benchmarks/long_log.py --rows 1000000 [--made 10000000] [--json FILE] [--folder F]

1. log        JSON lines of short prompts and answers, four answers a prompt, written as a stream
2. tokenise   `prepare`: the rows as tokens on disk; or, of `--made` rows, random tokens in the place of those of a
              small log, since tokenising takes as long for every row and no more memory for many
3. plan       from the tokens: the pairs of all steps of an epoch, and their keys
4. store      values of all pairs but those of the first steps, made up: scoring millions of pairs is not what is
              measured
5. data       what a step takes from the disk: rows, KL pairs, reference log-probs, micro-batches
6. train      a run of the whole epoch, stopped after a few steps: its plan is the long one, its steps are real

Each but the first runs in a process of its own. Its memory is what it has beyond files that are mapped and can be read
again (RssAnon), at its peak, sampled by the process that started it.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import machine
import numpy as np
import psutil
import random_model
import records

STEPS = 6
"""Of the run, whose pairs are really scored."""
LOOKED_AT = 100
"""Steps whose data is timed."""
ANSWERS = 4
_PARTS = 4096


def write_log(rows: int, words: int, file: Path) -> None:
    """Prompts of 8 to 24 and answers of 8 to 40 words of `random_model`; each prompt stands in ANSWERS rows in a row of
    their own, far apart."""
    draw = np.random.default_rng(0)

    def parts(least: int, most: int) -> list[str]:
        sizes = draw.integers(least, most + 1, _PARTS)
        return [" ".join(f"w{word}" for word in draw.integers(0, words, size)) for size in sizes]

    asked, answered = (parts(4, 12), parts(4, 12)), (parts(4, 20), parts(4, 20))
    prompts = max(2, rows // ANSWERS)
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, rows, 100_000):
            size = min(100_000, rows - start)
            prompt = (start + np.arange(size)) % prompts
            left, right = (_scattered(prompt, salt) for salt in (1, 2))
            first, second = draw.integers(0, _PARTS, (2, size))
            label = draw.random(size) < 0.6
            out.writelines(
                f'{{"prompt": "{asked[0][a]} {asked[1][b]}", "completion": " {answered[0][c]} {answered[1][d]}", '
                f'"label": {"true" if up else "false"}}}\n'
                for a, b, c, d, up in zip(
                    left.tolist(), right.tolist(), first.tolist(), second.tolist(), label.tolist(), strict=True
                )
            )


def _scattered(numbers: np.ndarray, salt: int) -> np.ndarray:
    """The same part for the same number."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(40 + salt)).astype(np.int64) % _PARTS


def config_of(model: Path, folder: Path, workers: int) -> Any:
    from kto_dist.training.config import Config

    return Config.build(
        {
            "model": {"path": str(model)},
            "reference": {"store": str(folder / "store")},
            "data": {
                "train": str(folder / "log.jsonl"),
                "max_length": 256,
                "cache": str(folder / "tokenised"),
                "workers": workers,
            },
            "train": {"output": str(folder / "run"), "global_batch": 64, "tokens_per_microbatch": 4096},
            "checkpoint": {"every_steps": None},
            "tracking": {"enabled": False, "report": False},
        }
    )


def tokenise(config: Any) -> dict[str, Any]:
    from kto_dist.base.console import Console
    from kto_dist.training.prepare import prepare

    started = time.monotonic()
    prepared = prepare(config, Console())
    seconds = time.monotonic() - started
    tokens = int(prepared.train.prompt_lengths.sum() + prepared.train.completion_lengths.sum())
    size = sum(file.stat().st_size for file in Path(config.data.cache).rglob("*.arrow"))
    return {"rows": len(prepared.train), "seconds": seconds, "tokens": tokens, "bytes": size}


def make_tokens(config: Any, rows: int) -> dict[str, Any]:
    """Puts random rows in the place of those of the log, in the batches that the encoder makes."""
    import pyarrow as pa

    from kto_dist.data.encode import COUNTS, SCHEMA, Part
    from kto_dist.data.processes import CHUNKING
    from kto_dist.data.rows import BadRows
    from kto_dist.data.split import Split

    tokenise(config)
    (about,) = Path(config.data.cache).glob("*/rows/about.json")
    shutil.rmtree(about.parent)
    draw, split, tokens = np.random.default_rng(0), Split(about.parent, 1), 0
    for start in range(0, rows, CHUNKING.rows):
        size = min(CHUNKING.rows, rows - start)
        number = start + np.arange(size)
        prompt = number % max(2, rows // ANSWERS)
        lengths = 8 + _scattered(prompt, 3) % 17, draw.integers(9, 42, size)
        sides = []
        for side, starts in zip(lengths, (_scattered(prompt, 4), draw.integers(0, _PARTS, size)), strict=True):
            offsets = np.insert(np.cumsum(side), 0, 0).astype(np.int32)
            within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], side)
            ids = (2 + (np.repeat(starts, side) * 31 + within * 7 + within**2) % 509).astype(np.int32)
            sides.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)))
            tokens += int(offsets[-1])
        up = draw.random(size) < 0.6
        text = pa.array(['"' + "x" * 58 + '"'] * size, pa.large_string())  # JSON
        columns = {
            "prompt_ids": sides[0],
            "completion_ids": sides[1],
            "desirable": pa.array(up),
            "probability": pa.array(up.astype(np.float64)),
            "weight": pa.array(np.ones(size)),
            "prompt_group": pa.array(prompt),
            "pair": pa.nulls(size, pa.int64()),
            "source": pa.array(np.zeros(size, np.int16)),
            "file": pa.array(np.zeros(size, np.int32)),
            "line": pa.array(number + 1),
            "content": pa.array(number.astype(np.uint64)),
            "cuts": pa.nulls(size, pa.large_string()),
            "prompt": text,
            "completion": text,
            "template": pa.nulls(size, pa.large_string()),
        }
        facts = np.zeros((2, len(COUNTS)), np.int64)
        facts[:, 0] = (~up).sum(), up.sum()
        split.add(
            Part(
                batch=pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA),
                digests=number.tobytes(),
                contents=number.astype(np.uint64),
                counts=facts,
                sources=np.array([[(~up).sum(), up.sum()]]),
                shortened_headers=0,
            )
        )
    split.close(BadRows())
    return {"rows": rows, "tokens": tokens, "bytes": (about.parent / "rows.arrow").stat().st_size}


def plan(config: Any) -> dict[str, Any]:
    from kto_dist.base.console import Console
    from kto_dist.reference.scoring import seek
    from kto_dist.training.prepare import find, prepare, wanted

    console, times = Console(), [time.monotonic()]
    prepared = prepare(config, console)
    times.append(time.monotonic())
    pairs = wanted(prepared, console)[0]
    times.append(time.monotonic())
    setup, _ = find(prepared, console)
    times.append(time.monotonic())
    seek(pairs.examples, pairs.prompts, pairs.completions, setup.settings.cutting)
    times.append(time.monotonic())
    opened, drawn, _, hashed = np.diff(times)
    return {
        "steps": prepared.plan.steps,
        "pairs": int(pairs.prompts.size),
        "open_seconds": float(opened),
        "pairs_seconds": float(drawn),
        "keys_seconds": float(hashed),
    }


def store(config: Any) -> dict[str, Any]:
    """Leaves out the pairs of the steps that are going to run."""
    from kto_dist.base.console import Console
    from kto_dist.data.batch import step_kl_pairs, step_rows
    from kto_dist.reference.scoring import ShardSize, seek
    from kto_dist.store.store import Store
    from kto_dist.training.prepare import find, prepare, wanted

    console = Console()
    prepared = prepare(config, console)
    pairs = wanted(prepared, console)[0]
    setup, fingerprint = find(prepared, console)
    sought = seek(pairs.examples, pairs.prompts, pairs.completions, setup.settings.cutting)
    real = np.zeros(pairs.prompts.size, dtype=bool)
    code = pairs.prompts * len(prepared.train) + pairs.completions
    for step in range(STEPS):
        rows = step_rows(prepared.plan, step)
        prompts, completions = step_kl_pairs(prepared.plan, step, rows, prepared.train.prompt_group)
        for left, right in ((rows, rows), (prompts, completions)):
            real[np.searchsorted(code, left * len(prepared.train) + right)] = True
    # rows with equal text share a key
    keys = sought.keys[~np.isin(sought.keys["high"], sought.keys["high"][real])]
    with Store(setup.store, fingerprint) as filled:
        for start in range(0, keys.size, a_shard := ShardSize().largest):
            part = keys[start : start + a_shard]
            filled.add(part, np.full(part.size, -50.0), np.ones(part.size, np.int32))
    return {"pairs": int(keys.size)}


def data(config: Any) -> dict[str, Any]:
    from kto_dist.base.console import Console
    from kto_dist.reference.pairs import RefLogps
    from kto_dist.training.prepare import prepare_training, wanted
    from kto_dist.training.step import step_work

    console = Console()
    prepared = prepare_training(config, console)
    pairs = wanted(prepared, console)[0]
    refs = RefLogps(pairs.examples, pairs.prompts, pairs.completions, np.zeros(pairs.prompts.size))
    seconds = []
    for step in np.linspace(0, prepared.plan.steps - 1, LOOKED_AT).astype(int).tolist():
        started = time.monotonic()
        work = step_work(prepared, refs, step, prepared.cutting)
        for batches in (work.batches, work.kl_batches):
            for _ in batches:
                pass
        seconds.append(time.monotonic() - started)
    return {"steps": LOOKED_AT, "seconds_per_step": statistics.median(seconds)}


def train(config: Any) -> dict[str, Any]:
    from trainers import Enough

    from kto_dist.training.loop import train as run

    started, updates = time.monotonic(), []

    def after_step(result: Any) -> None:
        updates.append(time.monotonic() - started)
        if len(updates) == STEPS:
            raise Enough

    with suppress(Enough):
        run(config, watch=after_step)
    return {"first_step_seconds": updates[0], "seconds_per_step": float(np.median(np.diff(updates)))}


STAGES = {stage.__name__: stage for stage in (tokenise, plan, store, data, train)}
_SMALL = 1000
"""Rows of the log whose place made tokens take."""


def run_stage(name: str, model: Path, folder: Path, workers: int, made: int = 0) -> dict[str, Any]:
    """What the stage says, and its peaks of memory. Raises `ClickException`."""
    words = [str(Path(__file__)), "--stage", name, "--model", str(model), "--folder", str(folder)]
    log, result = folder / f"{name}.log", folder / f"{name}.json"
    peak = peak_with_files = of_workers = 0
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *words, "--workers", str(workers), "--made", str(made)],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            own, whole = memory_of(process.pid)
            peak, peak_with_files = max(peak, own), max(peak_with_files, whole)
            of_workers = max(of_workers, sum(memory_of(child)[0] for child in children_of(process.pid)))
            time.sleep(0.05)
    if process.returncode or not result.exists():
        raise click.ClickException(f"{name} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    found = json.loads(result.read_text())
    return {**found, "peak_bytes": peak, "peak_bytes_with_files": peak_with_files, "worker_bytes": of_workers}


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes without and with mapped files; 0 of a process that has ended."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        if "RssAnon" in lines:
            own, whole = (1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS"))
            return own, whole
    return 0, 0


def children_of(pid: int) -> Iterator[int]:
    with suppress(psutil.Error):
        yield from (child.pid for child in psutil.Process(pid).children(recursive=True))


def measure(rows: int, model: Path, words: int, folder: Path, workers: int, *, made: bool) -> dict[str, Any]:
    started = time.monotonic()
    write_log(_SMALL if made else rows, words, folder / "log.jsonl")
    line: dict[str, Any] = {"rows": rows, "made": made, "log_bytes": (folder / "log.jsonl").stat().st_size}
    click.echo(f"{rows:,} rows, {line['log_bytes'] / 2**30:.2f} GiB, written in {time.monotonic() - started:.0f} s")
    for name in STAGES:
        line[name] = run_stage(name, model, folder, workers, rows if made else 0)
        click.echo(f"{name:9} " + ", ".join(f"{key} {value:,.4g}" for key, value in line[name].items()))
    return line


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1_000_000,), show_default=True, help="may be given again")
@click.option("--made", multiple=True, type=int, help="rows that are made as tokens; may be given again")
@click.option("--workers", default=0, help="processes that tokenise; 0: one a core")
@click.option("--folder", type=click.Path(path_type=Path), help="where the log and what is made of it lie for a while")
@click.option("--json", "file", type=click.Path(path_type=Path), help="write the figures to this file")
@click.option("--model", type=click.Path(path_type=Path), hidden=True)
@click.option("--stage", type=click.Choice(list(STAGES)), hidden=True)
def main(
    rows: tuple[int, ...],
    made: tuple[int, ...],
    workers: int,
    folder: Path | None,
    file: Path | None,
    model: Path | None,
    stage: str | None,
) -> None:
    """Measures tokenising, planning and training on logs of so many rows."""
    from kto_dist.base.exits import leave

    workers = workers or machine.cores()
    if stage is not None and model is not None and folder is not None:
        config = config_of(model, folder, workers)
        found = make_tokens(config, sum(made)) if stage == "tokenise" and any(made) else STAGES[stage](config)
        (folder / f"{stage}.json").write_text(json.dumps(found))
        leave(0)
    shape, lines = "tiny", []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kto-long-log-", dir=folder) as temporary:
        random = Path(temporary) / "model"
        random.mkdir()
        random_model.make_model(shape, random)
        words = random_model.SHAPES[shape].vocab_size - 2
        for count, is_made in (*((count, False) for count in rows), *((count, True) for count in made)):
            with tempfile.TemporaryDirectory(dir=temporary) as own:
                lines.append(measure(count, random, words, Path(own), workers, made=is_made))
            settings = {"model": shape, "workers": workers, "global_batch": 64}
            records.write_json(file, {**records.frame("long-log", settings), "results": lines})


if __name__ == "__main__":
    main()

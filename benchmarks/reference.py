"""The reference pass: pairs a second of kto_dist, with and without shared prompts, of a bare loop and of TRL.

In:  a model folder and a log of thumbs. Out: a table, and with `--json` a file for the README's figures.

1. rows      all rows of the log's first prompts, so that prompts have several completions, as in a thumbs log they
             have; the KL pairs of a run over them; the same pairs for all
2. runs      `throughput.py`'s own implementations, each in a fresh process that ends when its reference pass does;
             they take turns. The medians of their rates count, and of the ratios within a turn, since what else
             runs on a machine slows a turn as a whole
3. measure   from a loaded and checked model to stored log-probs, kto_dist's hashing of keys included; the bare
             loop runs the same model over the same pairs, in batches of as many tokens, with a plain head, and stores
             nothing
4. before    finding a run's pairs and hashing their keys, for a million rows of short random tokens

Not measured: several ranks, ZeRO-3, offload, GPUs.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import machine
import numpy as np
import records
from rich.console import Console
from rich.table import Table
from throughput import job_dtype, start
from trainers import Job
from workload import write_rows

NAMES = {
    "kto_dist": "kto_dist",
    "kto_dist_prefix": "kto_dist, prompts shared",
    "bare": "bare loop",
    "trl": "TRL",
}


def job_of(name: str, job: Job) -> Job:
    if not name.startswith("kto_dist"):
        return replace(job, name=name)
    return replace(job, settings={"reference": {"share_prefixes": name == "kto_dist_prefix"}})


def by_prompt(log: Path, target: Path) -> None:
    """The log's rows, those of one prompt side by side, in the order in which prompts first appear."""
    groups: dict[str, list[str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        groups.setdefault(json.dumps(json.loads(line)["prompt"]), []).append(line)
    target.write_text("".join(line + "\n" for lines in groups.values() for line in lines), encoding="utf-8")


def measure_plan(rows: int) -> dict[str, float]:
    """Seconds to find the pairs of one epoch over so many short rows, and to hash their keys, on one rank."""
    import pyarrow as pa

    from kto_dist.data.batch import Plan, pair_lengths
    from kto_dist.data.examples import ClassReport, DataReport, Examples
    from kto_dist.reference.keys import pair_keys
    from kto_dist.reference.pairs import wanted_pairs

    rng = np.random.default_rng(0)

    def column() -> pa.ChunkedArray:
        chunks = []
        for begin in range(0, rows, 1000):
            offsets = np.insert(np.cumsum(rng.integers(5, 40, min(1000, rows - begin))), 0, 0).astype(np.int32)
            chunks.append(pa.ListArray.from_arrays(offsets, rng.integers(0, 49152, offsets[-1], dtype=np.int32)))
        return pa.chunked_array(chunks)

    table = pa.table(
        {
            "prompt_ids": column(),
            "completion_ids": column(),
            "desirable": np.ones(rows, bool),
            "weight": np.ones(rows),
            # five rows a prompt; their tokens differ here, which makes hashing no cheaper
            "prompt_group": rng.integers(0, rows // 5 + 1, rows),
        }
    )
    none = ClassReport(kept=0, prompts_cut=0, completions_cut=0, dropped=0, prompt_tokens=0, completion_tokens=0)
    report = DataReport(
        rows_read=rows,
        skipped={},
        skipped_examples=[],
        unused={},
        notes={},
        first={},
        sources=[],
        shortened_headers=0,
        desirable=none,
        undesirable=none,
        duplicates=0,
        contradictions=0,
        prompt_lengths={},
        completion_lengths={},
    )
    examples = Examples(table, fingerprint="", report=report)
    plan = Plan(
        seed=0,
        rows=rows,
        global_batch=32,
        epochs=1.0,
        max_steps=None,
        kl_pairs_per_step=None,
        max_length=96,
        prompt_limit=48,
    )
    began = time.perf_counter()
    prompts, completions = wanted_pairs(plan, examples)
    found = time.perf_counter()
    pair_keys(examples, prompts, completions, *pair_lengths(examples, prompts, completions, 96, 48))
    hashed = time.perf_counter()
    return {"rows": rows, "pairs": prompts.size, "find_seconds": found - began, "hash_seconds": hashed - found}


def compared(
    runs: dict[str, list[dict[str, float]]], pairs: int, tokens: int, console: Console
) -> list[dict[str, Any]]:
    """A line for each implementation, and a table of them on the console."""
    lines = []
    table = Table("", "pairs/s", "of the runs", "tokens/s", "peak GiB", "of bare", title="reference pass")
    for name, found in runs.items():
        rates = [pairs / run["seconds"] for run in found]
        line = {
            "implementation": name,
            "rows_per_second": statistics.median(rates),
            "tokens_per_second": statistics.median(rates) * tokens / pairs,
            "peak_bytes": int(statistics.median(run["peak_bytes"] for run in found)),
            "runs": rates,
        }
        lines.append(line)
    bare = next((line["runs"] for line in lines if line["implementation"] == "bare"), None)
    for line in lines:
        if bare:
            line["of_bare"] = statistics.median(own / other for own, other in zip(line["runs"], bare, strict=True))
        table.add_row(
            NAMES[line["implementation"]],
            f"{line['rows_per_second']:.1f}",
            f"{min(line['runs']):.1f}-{max(line['runs']):.1f}",
            f"{line['tokens_per_second']:,.0f}",
            f"{line['peak_bytes'] / 2**30:.2f}",
            f"{line['of_bare']:.2f} x" if bare else "",
        )
    console.print(table)
    return lines


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True, help="Hugging Face folder (see `make demo`)")
@click.option("--log", default="launch/demo/thumbs.jsonl", show_default=True, help="rows to score")
@click.option("--rows", default=112, show_default=True, help="rows; each makes two pairs")
@click.option("--max-length", default=256, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-batch", default=4096, show_default=True, help="kto_dist's and the bare loop's")
@click.option("--trl-batch", default=8, show_default=True, help="TRL's rows a device")
@click.option("--repeats", default=3, show_default=True, help="runs of each implementation")
@click.option("--threads", default=machine.cores(), show_default="all cores", help="threads of a process")
@click.option("--plan-rows", default=1_000_000, show_default=True, help="rows to find and hash pairs of; 0: leave out")
@click.option(
    "--implementation",
    "names",
    multiple=True,
    type=click.Choice(list(NAMES)),
    default=tuple(NAMES),
    show_default=True,
    help="give it once for each",
)
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="write the figures to this file")
def main(
    model: str,
    log: str,
    rows: int,
    max_length: int,
    tokens_per_batch: int,
    trl_batch: int,
    repeats: int,
    threads: int,
    plan_rows: int,
    names: tuple[str, ...],
    file: Path | None,
) -> None:
    """Measures the reference pass on the same pairs with kto_dist, a bare loop and TRL."""
    if not Path(model, "config.json").exists():
        raise click.UsageError(f"--model ({model}) holds no model: run `make demo` once, or name a folder")
    if rows % 4:
        raise click.UsageError(f"--rows ({rows}) must be a multiple of 4: KL pairs are drawn in four steps")
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="kto-reference-") as folder:
        plan = measure_plan(plan_rows) if plan_rows else None
        job = Job(
            name="kto_dist",
            model=str(Path(model).resolve()),
            folder=folder,
            # the pairs of four steps, none of which is trained
            warmup=4,
            steps=0,
            global_batch=rows // 4,
            max_length=max_length,
            tokens_per_microbatch=tokens_per_batch,
            dtype=job_dtype(),
            threads=threads,
            # of its training, which does not come
            trl_batch=2,
            trl_reference_batch=trl_batch,
        )
        by_prompt(Path(log), Path(folder) / "log.jsonl")
        work = write_rows(f"{folder}/log.jsonl", job, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name in names:
                runs[name].append(start(job_of(name, job))["reference"])
                rate = work.reference_pairs / runs[name][-1]["seconds"]
                console.print(f"run {repeat + 1} of {repeats}, {NAMES[name]}: {rate:.1f} pairs/s")
    lines = compared(runs, work.reference_pairs, work.reference_tokens, console)
    if plan:
        console.print("finding pairs: " + ", ".join(f"{key} {value:,.4g}" for key, value in plan.items()))
    if file:
        settings = {key: value for key, value in asdict(job).items() if key not in ("folder", "model", "name")}
        settings |= {"model": Path(model).name, "log": Path(log).name, "repeats": repeats}
        settings |= {"pairs": work.reference_pairs, "tokens": work.reference_tokens}
        frame = records.frame("reference", settings)
        records.write_json(file, frame | {"results": lines, "plan": plan})


if __name__ == "__main__":
    main()

"""KTO training throughput: kto_dist, TRL's KTOTrainer and a bare PyTorch loop at the same job, side by side.

In:  a model folder and a log of thumbs, or the shapes of random ones. Out: a table, and with `--json` a file for the
figures of the docs, written again after every run.

It exists because a trainer's speed means something only beside another's on the same rows. So:

1. rows      the same rows in the same order for every step; only rows that both sides turn into the same tokens
2. runs      each in a fresh process, so that its memory peak is its own; taking turns (A B C A B C), so that a machine
             that slows down slows down all of them
3. measure   from the end of one update to the end of the next, the first left out; the reference pass from a loaded
             model to stored log-probs. Loading, tokenisation and export are in neither
4. compare   medians over the repeats; tokens are counted once, from the rows, for all

Not measured here: several ranks, ZeRO-3 and offload (see benchmarks/README.md).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import machine
import random_model
import records
from trainers import NAMES, Job, kto_dist_config, names_for, title_of
from workload import Workload, write_rows


def start(job: Job, *, limit: float | None = None) -> dict[str, Any]:
    """Runs an implementation in a fresh process. Raises `ClickException` with the end of its output if it fails."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        given, result = Path(folder) / "job.json", Path(folder) / "run.json"
        given.write_text(json.dumps(asdict(job)))
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "OMP_NUM_THREADS": str(job.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # one device, whatever this process was started under
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        script = Path(__file__).with_name("trainers.py")
        command = [sys.executable, str(script), str(given), str(result), str(time.time())]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise click.ClickException(f"{job.name} took more than {limit:.0f} s") from None
        if done.returncode:
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise click.ClickException(f"{job.name} ended with status {done.returncode}:\n{end}")
        return json.loads(result.read_text())


def pick_trl_batches(job: Job, sizes: tuple[int, ...], limit: float | None) -> Job:
    """TRL's fastest rows a device for each phase, from a step with each; sizes that do not fit are left out."""
    fitting = tuple(size for size in sizes if job.global_batch % size == 0) or (job.global_batch,)
    found = start(replace(job, trl_probe=fitting), limit=limit)["sizes"]
    for line in found:
        size, training, reference = line["size"], line["training"], line["reference"]
        click.echo(f"{job.name} with {size} rows a device: {training:.2f} s a step, reference {reference:.2f} s")
    if not found:
        raise click.ClickException(f"{job.name}: none of {fitting} rows a device fits into memory")
    best, best_reference = (min(found, key=lambda line: line[phase])["size"] for phase in ("training", "reference"))
    return replace(job, trl_batch=best, trl_reference_batch=best_reference)


def check(result: dict[str, Any], job: Job, work: Workload) -> None:
    """Raises `ClickException` when an implementation did another job than the others."""
    # rounding a log-prob to bf16 costs a nat here and there, of which beta / 4 reaches a row's loss
    tolerance = 0.02 if job.dtype == "bf16" else 1e-4
    # kto_dist leaves out a prompt without a partner, which TRL pairs with itself
    if not 0.9 * work.reference_pairs <= result["pairs"] <= work.reference_pairs:
        raise click.ClickException(f"{job.name} scored {result['pairs']} pairs of {work.reference_pairs}")
    first = result["losses"][0]
    if NAMES[job.name].trainer != "bare" and abs(first - 0.5) > tolerance:
        raise click.ClickException(f"{job.name}: the first loss ({first:.4f}) is not 0.5: the policy is its reference")


def summarise(runs: dict[str, list[dict[str, Any]]], job: Job, work: Workload) -> list[dict[str, Any]]:
    """A line an implementation and phase: medians over the runs, and each run's rows a second."""
    from kto_dist.model.devices import peak as device_peak

    flops_per_second = device_peak()
    lines = []
    for phase in ("reference", "training"):
        for name, results in runs.items():
            seconds = [_seconds(result[phase]["seconds"]) for result in results]
            if phase == "reference":
                rows, flops = [result["pairs"] for result in results], work.reference_flops
                tokens_per_row = work.reference_tokens / work.reference_pairs
            else:
                rows, flops = [work.training_rows] * len(results), work.training_flops
                tokens_per_row = work.training_tokens / work.training_rows
            rates = [count / value for count, value in zip(rows, seconds, strict=True)]
            line = {
                "implementation": name,
                "phase": phase,
                "rows_per_second": statistics.median(rates),
                "tokens_per_second": statistics.median(rates) * tokens_per_row,
                "tflops": flops / statistics.median(seconds) / 1e12,
                "peak_bytes": int(statistics.median(result[phase]["peak_bytes"] for result in results)),
                "runs": rates,
                "about": results[0]["about"],
            }
            if phase == "training":
                steps = [step for result in results for step in result[phase]["seconds"]]
                first = [result[phase]["seconds_to_first_step"] for result in results]
                line |= {"seconds_per_step": statistics.median(seconds) / job.steps, "steps": steps}
                line |= {"seconds_to_first_step": statistics.median(first)}
            if flops_per_second:
                line["mfu"] = flops / statistics.median(seconds) / flops_per_second
            lines.append(line)
    return lines


def _seconds(value: float | list[float]) -> float:
    return sum(value) if isinstance(value, list) else value


def show(lines: list[dict[str, Any]], adapter: str) -> None:
    from rich.console import Console
    from rich.table import Table

    for phase, unit in (("reference", "pairs"), ("training", "rows")):
        columns = (f"{unit}/s", "of the runs", "tokens/s", "TFLOP/s", "s/step", "first step", "peak GiB", "kto_dist")
        table = Table("", *columns, title=phase)
        for column in table.columns[1:]:
            column.justify = "right"
        of_phase = {line["implementation"]: line for line in lines if line["phase"] == phase}
        own = of_phase.get("kto_dist")
        for name, line in of_phase.items():
            ratio = "" if own in (None, line) else f"{own['rows_per_second'] / line['rows_per_second']:.2f} x"
            table.add_row(
                title_of(name, adapter),
                f"{line['rows_per_second']:.2f}",
                f"{min(line['runs']):.2f}-{max(line['runs']):.2f}",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['tflops']:.3g}",
                f"{line['seconds_per_step']:.3f}" if "seconds_per_step" in line else "",
                f"{line['seconds_to_first_step']:.1f}" if "seconds_to_first_step" in line else "",
                f"{line['peak_bytes'] / 2**30:.2f}",
                ratio,
            )
        Console(highlight=False, soft_wrap=True, width=140).print(table)


def known(name: str, job: Job) -> str | None:
    """Why this version of kto_dist cannot run an implementation; None where it can."""
    from kto_dist.base.errors import UserError

    if NAMES[name].trainer == "trl":
        return None
    try:
        kto_dist_config(replace(job, name=name), Path(job.folder))
    except UserError as error:
        return str(error)
    return None


def measure(
    job: Job,
    work: Workload,
    *,
    names: tuple[str, ...],
    repeats: int,
    probed: dict[str, tuple[int, ...]],
    write: Any,
    limit: float | None = None,
) -> None:
    """Runs the implementations in turns, and calls `write(results, losses, left out)` after each run.

    `probed`: the sizes among which a TRL looks for its best. What fails is said, left out from then on, and ends
    nobody else's measurement.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    jobs = {name: replace(job, name=name, trl_batch=0 if name in probed else job.trl_batch) for name in names}
    left_out = {name: why for name in names if (why := known(name, job))}
    for repeat in range(repeats):
        for name in names:
            if name in left_out:
                continue
            try:
                if name in probed and not jobs[name].trl_batch:
                    jobs[name] = pick_trl_batches(jobs[name], probed[name], limit)
                found = start(jobs[name], limit=limit)
                check(found, jobs[name], work)
            except click.ClickException as error:
                left_out[name] = error.message
                click.echo(f"left out: {error.message}")
                write(summarise(runs, job, work), _losses(runs), left_out)
                continue
            runs.setdefault(name, []).append(found)
            rate = work.training_rows / sum(found["training"]["seconds"])
            losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
            title = title_of(name, job.adapter)
            click.echo(f"run {repeat + 1} of {repeats}, {title}: {rate:.2f} rows/s, losses {losses}")
            write(summarise(runs, job, work), _losses(runs), left_out)
    for name, why in left_out.items():
        click.echo(f"left out: {name}: {why.splitlines()[0]}")
    show(summarise(runs, job, work), job.adapter)


def _losses(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[float]]]:
    return {name: [result["losses"] for result in results] for name, results in runs.items()}


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True, help="Hugging Face folder (see `make demo`)")
@click.option("--log", default="launch/demo/thumbs.jsonl", show_default=True, help="rows to train on")
@click.option(
    "--random", "shape", type=click.Choice(list(random_model.SHAPES)), help="a model of random weights instead"
)
@click.option("--lengths", type=click.Choice(list(random_model.LENGTHS)), default="mixed", help="its rows' lengths")
@click.option("--random-folder", type=click.Path(path_type=Path), help="keep the random model here, or find it here")
@click.option("--steps", default=2, show_default=True, help="timed optimizer steps of a run")
@click.option("--warmup", default=1, show_default=True, help="steps before these")
@click.option("--global-batch", default=16, show_default=True, help="rows of a step")
@click.option("--max-length", default=256, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-microbatch", default=4096, show_default=True, help="kto_dist's and the bare loop's")
@click.option("--trl-batch", type=int, help="rows a device of `trl`; by default the fastest of --trl-probe")
@click.option("--trl-probe", default="4,8,16", show_default=True, help="sizes among which TRL's best is looked for")
@click.option("--repeats", default=3, show_default=True, help="runs of each implementation")
@click.option(
    "--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", help="in which matrices are multiplied"
)
@click.option(
    "--adapter", type=click.Choice(["none", "lora", "dora"]), default="none", help="train an adapter, in all of them"
)
@click.option("--rank", default=16, show_default=True, help="of the adapter")
@click.option("--threads", default=machine.cores(), show_default="all cores", help="threads of a process")
@click.option("--limit", type=float, help="most seconds of a run; it is left out then")
@click.option(
    "--implementation",
    "names",
    multiple=True,
    type=click.Choice(list(NAMES)),
    help="give it once for each [default: kto_dist, trl, bare; with --adapter trl-bf16 as well]",
)
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="write the figures to this file")
def main(
    model: str,
    log: str,
    shape: str | None,
    lengths: str,
    random_folder: Path | None,
    steps: int,
    warmup: int,
    global_batch: int,
    max_length: int,
    tokens_per_microbatch: int,
    trl_batch: int | None,
    trl_probe: str,
    repeats: int,
    dtype: str,
    adapter: str,
    rank: int,
    threads: int,
    limit: float | None,
    names: tuple[str, ...],
    file: Path | None,
) -> None:
    """Measures KTO's throughput with kto_dist, TRL and a bare loop on the same rows."""
    if min(steps, warmup, repeats) < 1:
        raise click.UsageError("--steps, --warmup and --repeats must be at least 1: the first step is never timed")
    if trl_batch is not None and (trl_batch < 2 or global_batch % trl_batch):
        raise click.UsageError(f"--trl-batch ({trl_batch}) must be above 1 and divide --global-batch ({global_batch})")
    began = time.monotonic()
    with ExitStack() as stack:
        if shape:
            needed = 2 * random_model.weight_bytes(shape)
            fast = random_model.fast_folder(needed)
            made = random_folder or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=fast)))
            click.echo(f"random model: {random_model.make_model(shape, made):.1f} s")
            model, log = str(made), str(made / f"{lengths}.jsonl")
            random_model.write_log(shape, lengths, (warmup + steps) * global_batch, max_length, Path(log))
        elif not Path(model, "config.json").exists():
            raise click.UsageError(f"--model ({model}) holds no model: run `make demo` once, or give --random")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kto-throughput-"))
        job = Job(
            name="kto_dist",
            model=str(Path(model).resolve()),
            folder=folder,
            warmup=warmup,
            steps=steps,
            global_batch=global_batch,
            max_length=max_length,
            tokens_per_microbatch=tokens_per_microbatch,
            dtype=job_dtype() if dtype == "auto" else dtype,
            adapter=adapter,
            rank=rank,
            threads=threads,
            trl_batch=trl_batch or 0,
            trl_reference_batch=trl_batch or 0,
        )
        names = names or names_for(adapter)
        names = tuple(name for name in names if NAMES[name].weights == "float32" or job.dtype == "bf16")
        work = write_rows(log, job, Path(folder))
        sizes = tuple(int(size) for size in trl_probe.split(","))
        probed = {name: sizes for name in names if NAMES[name].trainer == "trl" and not (name == "trl" and trl_batch)}
        jobs = f"{steps} steps of {global_batch} rows, {work.training_tokens:,} tokens"
        click.echo(f"{machine.device_name()}, {threads} threads, {job.dtype}: {jobs}")
        settings = {key: value for key, value in asdict(job).items() if key not in ("folder", "model", "name")}
        settings |= {"model": shape or Path(model).name, "log": lengths if shape else Path(log).name}
        frame = records.frame("throughput", settings | {"repeats": repeats} | asdict(work))

        def write(results: list[dict[str, Any]], losses: dict[str, Any], left_out: dict[str, str]) -> None:
            records.write_json(file, frame | {"results": results, "losses": losses, "left_out": left_out})

        measure(job, work, names=names, repeats=repeats, probed=probed, write=write, limit=limit)
    click.echo(f"took {time.monotonic() - began:.0f} s")


def job_dtype() -> str:
    import torch

    from kto_dist.model.causal_lm import DTYPES, pick_dtype

    device = torch.device("cuda" if machine.has_gpu() else "cpu")
    return next(name for name, kind in DTYPES.items() if kind == pick_dtype("auto", device))


if __name__ == "__main__":
    main()

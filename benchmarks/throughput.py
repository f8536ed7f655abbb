"""KTO training throughput: kto_dist, TRL's KTOTrainer and a bare PyTorch loop at the same job, side by side.

In:  a model folder and a log of thumbs. Out: a table, and with `--json` a file for the README's figures.

It exists because a trainer's speed means something only beside another's on the same rows. So:

1. rows      the same rows in the same order for every step; only rows that both sides turn into the same tokens
2. runs      each in a fresh process, so that its memory peak is its own; taking turns (A B C A B C), so that a machine
             that slows down slows down all of them
3. measure   from the end of one update to the end of the next, the first left out; the reference pass from a loaded
             model to stored log-probs. Loading, tokenisation and export are in neither
4. compare   medians over the repeats; tokens are counted once, from the rows, for all

Not measured here: several ranks, ZeRO-3, packing with flash attention on a CPU (see benchmarks/README.md).
"""

import contextlib
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch

ROWS = "rows.jsonl"
# conversational, as kto_dist's users have them
ORDERED = "ordered.jsonl"
# the same rows as text, in the order in which kto_dist's steps take them, with the tokens they have to become
NAMES = {"kto_dist": "kto_dist", "trl": "TRL", "trl-bf16": "TRL, no master weights", "bare": "bare loop"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one child process does; every implementation gets the same but for `trl_*`."""

    model: str
    folder: str
    # holds ROWS and ORDERED; each run writes below it
    warmup: int
    steps: int
    # timed ones, after the warm-up
    global_batch: int
    max_length: int
    tokens_per_microbatch: int
    dtype: str
    # bf16 or fp32
    attention: str
    threads: int
    trl_batch: int
    trl_reference_batch: int
    # rows a device takes at a time

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


class Clock:
    """Seconds and memory peaks of a run's two phases, taken the same way whoever trains."""

    def __init__(self, job: Job):
        self.job = job
        self.reference: dict[str, float] = {}
        self.peak = 0
        self._started = 0.0
        self._updates: list[float] = []

    def start_reference(self) -> None:
        _reset_peak()
        self._started = _now()

    def end_reference(self) -> None:
        self.reference = {"seconds": _now() - self._started, "peak_bytes": _peak()}

    def updated(self) -> None:
        """Called right after each optimizer update."""
        self._updates.append(_now())
        if len(self._updates) == self.job.warmup:
            # what loading the model took for a moment is not what training takes
            _reset_peak()
        self.peak = _peak()

    def result(self, losses: list[float], **more: Any) -> dict[str, Any]:
        assert len(self._updates) == len(losses) == self.job.all_steps, (len(self._updates), len(losses))
        timed = self._updates[self.job.warmup - 1 :]
        training = {"seconds": [end - start for start, end in pairwise(timed)], "peak_bytes": self.peak}
        return {"reference": self.reference, "training": training, "losses": losses, **more}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where it cannot be reset, the peak is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the implementations; each runs in a process of its own ---


def _kto_dist_config(job: Job, output: Path) -> Any:
    from kto_dist.training.config import Config

    return Config.build(
        {
            "model": {"path": job.model},
            "reference": {
                "store": str(output / "store"),
                "dtype": job.dtype,
                "tokens_per_batch": job.tokens_per_microbatch,
            },
            "data": {
                "train": f"{job.folder}/{ROWS}",
                "max_length": job.max_length,
                "cache": f"{job.folder}/tokenised",
                "workers": 1,
            },
            # no class weights: the loss of the first step is 0.5 then, whoever computes it
            "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
            "train": {
                "output": str(output),
                "global_batch": job.global_batch,
                "max_steps": job.all_steps,
                "tokens_per_microbatch": job.tokens_per_microbatch,
                "dtype": job.dtype,
                "schedule": "constant",
                "warmup": 0,
            },
            "tracking": {"enabled": False},
        }
    )


def run_kto_dist(job: Job, output: Path) -> dict[str, Any]:
    """`kto_dist.training.loop` with its two engines replaced by ones that look at the clock."""
    score = importlib.import_module("kto_dist.reference.scores")
    train = importlib.import_module("kto_dist.training.loop")
    clock = Clock(job)

    class Reference(score.Reference):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            clock.start_reference()

        def close(self, **settings: Any) -> None:
            clock.end_reference()
            super().close(**settings)

    class Policy(train.Policy):
        def step(self, lr: float) -> float:
            norm = super().step(lr)
            clock.updated()
            return norm

    score.Reference, train.Policy = Reference, Policy
    summary = train.train(_kto_dist_config(job, output))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return clock.result([line["loss"] for line in lines], pairs=summary["reference"]["scored"])


def run_trl(job: Job, output: Path, *, weights: str) -> dict[str, Any]:
    """TRL's KTOTrainer; `weights` is their dtype, and the matrices are multiplied in the job's either way."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    rows = [json.loads(line) for line in Path(job.folder, ORDERED).read_text().splitlines()]
    clock = Clock(job)

    class Trainer(KTOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            clock.start_reference()
            result = super()._precompute_ref_logps(*args, **kwargs)
            clock.end_reference()
            return result

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.updated()

    arguments = KTOConfig(
        output_dir=str(output),
        per_device_train_batch_size=job.trl_batch,
        gradient_accumulation_steps=job.global_batch // job.trl_batch,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=job.trl_reference_batch,
        max_length=job.max_length,
        max_steps=job.all_steps,
        bf16=job.dtype == "bf16",
        model_init_kwargs={"dtype": weights, "attn_implementation": job.attention},
        gradient_checkpointing=False,
        learning_rate=5e-6,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=job.model,
        args=arguments,
        # held in memory: rows from a file would find the log-probs of an earlier run in a cache beside it
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "label")} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Watch()],
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        assert row["tokens"] == [theirs["prompt_ids"], theirs["completion_ids"]], "the rows became other tokens"
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return clock.result(losses, pairs=2 * len(rows))


def run_bare(job: Job, output: Path) -> dict[str, Any]:
    """A floor: kto_dist's micro-batches through the same model, with a plain head and cross-entropy for a loss.

    The passes are those of KTO (a forward over the KL pairs, forward and backward over the rows, AdamW), but nothing
    comes of them: no reference, no loss of KTO, no master weights, no clipping, no engine, no metrics.
    """
    from kto_dist.base import comm
    from kto_dist.base.console import Console
    from kto_dist.data.batch import microbatches, step_kl_pairs, step_rows
    from kto_dist.model.causal_lm import DTYPES, load_model
    from kto_dist.reference.scoring import wanted_pairs
    from kto_dist.training.prepare import prepare_training

    comm.init()
    prepared = prepare_training(_kto_dist_config(job, output), Console())
    device, examples, cutting = comm.device(), prepared.train, prepared.cutting
    model = load_model(job.model, gguf_file=None, dtype=DTYPES[job.dtype], attention=prepared.attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, fused=True)
    clock = Clock(job)

    def loss_of(batch: Any) -> torch.Tensor:
        batch = batch.to(device)
        hidden = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )[0]
        logits = model.lm_head(hidden.flatten(0, 1)[batch.gather])
        return torch.nn.functional.cross_entropy(logits.float(), batch.target, reduction="sum")

    clock.start_reference()
    with torch.no_grad():
        pairs = wanted_pairs(prepared.plan, examples)
        for batch in microbatches(examples, *pairs, cutting, rank=0, ranks=1):
            loss_of(batch).item()
    clock.end_reference()

    losses = []
    for step in range(job.all_steps):
        rows = step_rows(prepared.plan, step)
        with torch.no_grad():
            kl = step_kl_pairs(prepared.plan, step, rows, examples.prompt_group)
            for batch in microbatches(examples, *kl, cutting, rank=0, ranks=1):
                loss_of(batch).item()
        tokens = int(examples.completion_lengths[rows].sum())
        total = 0.0
        for batch in microbatches(examples, rows, rows, cutting, rank=0, ranks=1):
            loss = loss_of(batch) / tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
        clock.updated()
    return clock.result(losses, pairs=len(pairs[0]))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def child(name: str, job: Job, result: Path) -> None:
    torch.set_num_threads(job.threads)
    output = result.with_suffix("")
    output.mkdir(parents=True)
    if name == "kto_dist":
        found = run_kto_dist(job, output)
    elif name == "bare":
        found = run_bare(job, output)
    else:
        found = run_trl(job, output, weights="bfloat16" if name == "trl-bf16" else "float32")
    result.write_text(json.dumps(found))


def start(name: str, job: Job) -> dict[str, Any]:
    """Runs an implementation in a fresh process. Raises `ClickException` with the end of its output if it fails."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        result = Path(folder) / "run.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(job.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # one device and no launcher, whatever this process was started under
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(variable, None)
        command = [sys.executable, __file__, "--child", name, json.dumps(asdict(job)), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise click.ClickException(f"{name} ended with status {done.returncode}:\n{end}")
        return json.loads(result.read_text())


# --- the rows ---


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What there is to do, counted from the rows alone."""

    reference_pairs: int
    # a row with itself and a KL pair, for each row
    reference_tokens: int
    # every prompt and every completion is in one pair of each kind
    training_rows: int
    # of the timed steps
    training_tokens: int
    # prompt and completion of these rows; the KL pairs' are not counted, though they cost a forward


def write_rows(log: str, job: Job, folder: Path) -> Workload:
    """Writes ROWS and ORDERED. Raises `ClickException` when the log has too few rows for the job."""
    from kto_dist.data import examples
    from kto_dist.data import tokenise as data
    from kto_dist.data.batch import Plan, step_rows
    from kto_dist.data.config import DataConfig
    from kto_dist.model.causal_lm import load_tokenizer

    tokenizer = load_tokenizer(job.model)

    def load(path: str, max_length: int) -> examples.Examples:
        section = DataConfig(train=path, max_length=max_length, cache=str(folder / "tokenised"), workers=1)
        return examples.load(data.prepare(section, tokenizer)[0])

    wanted = job.all_steps * job.global_batch
    # long enough to cut nothing: the two cut long rows at different ends
    every = load(log, 10**9)
    rows, seen = [], set()
    for row in range(len(every)):
        tokens = every.prompt(row).tolist() + every.completion(row).tolist()
        # the store scores equal pairs once, which would count as speed here
        if len(rows) < wanted and len(tokens) <= job.max_length and tuple(tokens) not in seen:
            prompt, completion = _as_text(tokenizer, *every.original(row))
            if tokenizer(prompt + completion)["input_ids"] == tokens:
                seen.add(tuple(tokens))
                rows.append((row, prompt, completion))
    if len(rows) < wanted:
        raise click.ClickException(
            f"{log} has {len(rows)} different rows of at most {job.max_length} tokens that both sides tokenise alike, "
            f"and {job.all_steps} steps of {job.global_batch} need {wanted}: lower --steps or --global-batch"
        )
    lines = []
    for row, _, _ in rows:
        prompt, completion = every.original(row)
        lines.append({"prompt": prompt, "completion": completion, "label": bool(every.desirable[row])})
    _write_lines(folder / ROWS, lines)

    chosen = load(str(folder / ROWS), job.max_length)
    assert len(chosen) == wanted
    plan = Plan(
        seed=0,
        rows=wanted,
        global_batch=job.global_batch,
        epochs=1.0,
        max_steps=job.all_steps,
        kl_pairs_per_step=None,
        max_length=job.max_length,
        prompt_limit=job.max_length // 2,
    )
    order = [int(row) for step in range(job.all_steps) for row in step_rows(plan, step)]
    ordered = []
    for row in order:
        _, prompt, completion = rows[row]
        tokens = [chosen.prompt(row).tolist(), chosen.completion(row).tolist()]
        label = bool(chosen.desirable[row])
        ordered.append({"prompt": prompt, "completion": completion, "label": label, "tokens": tokens})
    _write_lines(folder / ORDERED, ordered)
    lengths = chosen.prompt_lengths + chosen.completion_lengths
    return Workload(
        reference_pairs=2 * wanted,
        reference_tokens=2 * int(lengths.sum()),
        training_rows=job.steps * job.global_batch,
        training_tokens=int(lengths[order[job.warmup * job.global_batch :]].sum()),
    )


def _as_text(tokenizer: Any, prompt: Any, completion: Any) -> tuple[str, str]:
    """A row as TRL takes it without a template of its own: that would train on what follows the final EOS as well."""
    if isinstance(prompt, str):
        return prompt, completion + tokenizer.eos_token
    before = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    return before, whole[len(before) : end]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# --- the comparison ---


def pick_trl_batches(job: Job, say: Any) -> Job:
    """TRL's fastest rows a device for each phase, from a run of one timed step with each."""
    sizes = [size for size in (4, 8, 16) if job.global_batch % size == 0] or [job.global_batch]
    training, reference = {}, {}
    for size in sizes:
        found = start("trl", replace(job, steps=1, trl_batch=size, trl_reference_batch=size))
        training[size] = sum(found["training"]["seconds"])
        reference[size] = found["reference"]["seconds"]
        say(f"TRL with {size} rows a device: {training[size]:.2f} s a step, reference {reference[size]:.2f} s")
    return replace(
        job, trl_batch=min(training, key=training.get), trl_reference_batch=min(reference, key=reference.get)
    )


def check(name: str, result: dict[str, Any], job: Job, work: Workload) -> None:
    """Raises `ClickException` when an implementation did another job than the others."""
    # rounding a log-prob to bf16 costs a nat here and there, of which beta / 4 reaches a row's loss
    tolerance = 0.02 if job.dtype == "bf16" else 1e-4
    # kto_dist leaves out a prompt without a partner, which TRL pairs with itself
    if not 0.9 * work.reference_pairs <= result["pairs"] <= work.reference_pairs:
        raise click.ClickException(f"{name} scored {result['pairs']} pairs of {work.reference_pairs}")
    first = result["losses"][0]
    if name != "bare" and abs(first - 0.5) > tolerance:
        raise click.ClickException(f"{name}: the first loss ({first:.4f}) must be 0.5: the policy is its reference yet")


def summarise(runs: dict[str, list[dict[str, Any]]], job: Job, work: Workload) -> list[dict[str, Any]]:
    """One line an implementation and phase: medians over the runs, and each run's rows a second."""
    lines = []
    for phase in ("reference", "training"):
        for name, results in runs.items():
            seconds = [_seconds(result[phase]["seconds"]) for result in results]
            if phase == "reference":
                rows, steps = [result["pairs"] for result in results], job.all_steps
                tokens_per_row = work.reference_tokens / work.reference_pairs
            else:
                rows, steps = [work.training_rows] * len(results), job.steps
                tokens_per_row = work.training_tokens / work.training_rows
            rates = [count / value for count, value in zip(rows, seconds, strict=True)]
            lines.append(
                {
                    "implementation": name,
                    "phase": phase,
                    "rows_per_second": statistics.median(rates),
                    "tokens_per_second": statistics.median(rates) * tokens_per_row,
                    "seconds_per_step": statistics.median(seconds) / steps,
                    "peak_bytes": int(statistics.median(result[phase]["peak_bytes"] for result in results)),
                    "runs": rates,
                }
            )
    return lines


def _seconds(value: float | list[float]) -> float:
    return sum(value) if isinstance(value, list) else value


def show(lines: list[dict[str, Any]], console: Any) -> None:
    from rich.table import Table

    for phase, unit in (("reference", "pairs"), ("training", "rows")):
        table = Table("", f"{unit}/s", "of the runs", "tokens/s", "s/step", "peak GiB", "kto_dist", title=phase)
        for column in table.columns[1:]:
            column.justify = "right"
        of_phase = {line["implementation"]: line for line in lines if line["phase"] == phase}
        own = of_phase.get("kto_dist")
        for name, line in of_phase.items():
            ratio = "" if own in (None, line) else f"{own['rows_per_second'] / line['rows_per_second']:.2f} x"
            table.add_row(
                NAMES[name],
                f"{line['rows_per_second']:.2f}",
                f"{min(line['runs']):.2f}-{max(line['runs']):.2f}",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['seconds_per_step']:.2f}",
                f"{line['peak_bytes'] / 2**30:.2f}",
                ratio,
            )
        console.print(table)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {_cores()} cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True, help="Hugging Face folder (see `make demo`)")
@click.option("--log", default="launch/demo/thumbs.jsonl", show_default=True, help="rows to train on")
@click.option("--steps", default=2, show_default=True, help="timed optimizer steps of a run, after one to warm up")
@click.option("--global-batch", default=16, show_default=True, help="rows of a step")
@click.option("--max-length", default=256, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-microbatch", default=4096, show_default=True, help="kto_dist's and the bare loop's")
@click.option("--trl-batch", default=None, type=int, help="TRL's rows a device; by default the fastest of 4, 8 and 16")
@click.option("--repeats", default=3, show_default=True, help="runs of each implementation")
@click.option("--threads", default=_cores(), show_default="all cores", help="threads of a process")
@click.option(
    "--implementation",
    "names",
    multiple=True,
    type=click.Choice(list(NAMES)),
    default=("kto_dist", "trl", "bare"),
    show_default=True,
    help="give it once for each",
)
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="write the figures to this file")
def main(
    model: str,
    log: str,
    steps: int,
    global_batch: int,
    max_length: int,
    tokens_per_microbatch: int,
    trl_batch: int | None,
    repeats: int,
    threads: int,
    names: tuple[str, ...],
    file: Path | None,
) -> None:
    """Measures KTO's throughput with kto_dist, TRL and a bare loop on the same rows."""
    from rich.console import Console

    from kto_dist.model.causal_lm import DTYPES, pick_attention, pick_dtype

    if not Path(model, "config.json").exists():
        raise click.UsageError(f"--model ({model}) holds no model: run `make demo` once, or name a folder")
    if trl_batch is not None and (trl_batch < 2 or global_batch % trl_batch):
        raise click.UsageError(f"--trl-batch ({trl_batch}) must be above 1 and divide --global-batch ({global_batch})")
    console = Console(highlight=False, soft_wrap=True)
    dtype = next(name for name, kind in DTYPES.items() if kind == pick_dtype("auto", _device()))
    names = tuple(name for name in names if name != "trl-bf16" or dtype == "bf16")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kto-throughput-") as folder:
        job = Job(
            model=str(Path(model).resolve()),
            folder=folder,
            warmup=1,
            steps=steps,
            global_batch=global_batch,
            max_length=max_length,
            tokens_per_microbatch=tokens_per_microbatch,
            dtype=dtype,
            attention=pick_attention("auto", _device(), DTYPES[dtype]),
            threads=threads,
            trl_batch=trl_batch or 0,
            trl_reference_batch=trl_batch or 0,
        )
        if trl_batch is None and any(name.startswith("trl") for name in names):
            (Path(folder) / "probe").mkdir()
            probe = replace(job, steps=1, folder=f"{folder}/probe")
            write_rows(log, probe, Path(probe.folder))
            picked = pick_trl_batches(probe, console.print)
            job = replace(job, trl_batch=picked.trl_batch, trl_reference_batch=picked.trl_reference_batch)
        work = write_rows(log, job, Path(folder))
        console.print(
            f"{device_name()}, {threads} threads, {dtype}: {steps} steps of {global_batch} rows, "
            f"{work.training_tokens:,} tokens; {work.reference_pairs} reference pairs, {work.reference_tokens:,} tokens"
        )
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name in names:
                found = start(name, job)
                check(name, found, job, work)
                runs[name].append(found)
                rate = work.training_rows / sum(found["training"]["seconds"])
                console.print(
                    f"run {repeat + 1} of {repeats}, {NAMES[name]}: {rate:.2f} rows/s, "
                    f"losses {', '.join(f'{loss:.4f}' for loss in found['losses'])}"
                )
    lines = summarise(runs, job, work)
    show(lines, console)
    console.print(f"took {time.monotonic() - started:.0f} s")
    if file:
        settings = {key: value for key, value in asdict(job).items() if key not in ("folder", "model")}
        settings |= {"model": Path(model).name, "log": Path(log).name, "repeats": repeats, **asdict(work)}
        packages = ("torch", "transformers", "deepspeed", "trl", "accelerate")
        report = {
            "device": device_name(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "settings": settings,
            "results": lines,
            "losses": {name: [result["losses"] for result in results] for name, results in runs.items()},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Job(**json.loads(sys.argv[3])), Path(sys.argv[4]))
    else:
        main()

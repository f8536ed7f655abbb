"""The trainers that `throughput.py` and `reference.py` compare, each in a process of its own.

    python benchmarks/trainers.py JOB.json RESULT.json STARTED

1. kto_dist   its reference pass, then `train`, whose hook looks at the clock after every step
2. TRL        `KTOTrainer`, whose own methods and callbacks do
3. bare       the same micro-batches through the same model, a plain head and AdamW: what the hardware gives
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import records
import torch

ROWS = "rows.jsonl"
"""As kto_dist's users have them."""
ORDERED = "ordered.jsonl"
"""The same rows as text, in the order in which kto_dist's steps take them, with the tokens they have to become."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """A line of the tables."""

    title: str
    trainer: str
    """kto_dist, trl or bare."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of kto_dist's config, which the bare loop reads too."""
    weights: str = "float32"
    """TRL's; its matrices are multiplied in the job's precision either way."""
    liger: bool = False
    """Liger's layer kernels in TRL."""


NAMES = {
    "kto_dist": Implementation(title="kto_dist", trainer="kto_dist"),
    "kto_dist-liger": Implementation(
        title="kto_dist, Liger's layers",
        trainer="kto_dist",
        settings={"model": {"kernels": "liger"}, "reference": {"kernels": "liger"}},
    ),
    "kto_dist-eager": Implementation(
        title="kto_dist, plain layers",
        trainer="kto_dist",
        settings={"model": {"kernels": "none"}, "reference": {"kernels": "none"}},
    ),
    "kto_dist-stage1": Implementation(
        title="kto_dist, ZeRO stage 1", trainer="kto_dist", settings={"deepspeed": {"zero_stage": 1}}
    ),
    "kto_dist-sdpa": Implementation(
        title="kto_dist, padded sdpa",
        trainer="kto_dist",
        settings={"model": {"attention": "sdpa"}, "reference": {"attention": "sdpa"}},
    ),
    "kto_dist-deterministic": Implementation(
        title="kto_dist, deterministic", trainer="kto_dist", settings={"train": {"deterministic": True}}
    ),
    "trl": Implementation(title="TRL", trainer="trl"),
    "trl-bf16": Implementation(title="TRL, no master weights", trainer="trl", weights="bfloat16"),
    "trl-liger": Implementation(
        title="TRL, no master weights, Liger's layers", trainer="trl", weights="bfloat16", liger=True
    ),
    "bare": Implementation(title="bare loop, plain layers", trainer="bare", settings={"model": {"kernels": "none"}}),
    "bare-liger": Implementation(
        title="bare loop, Liger's layers", trainer="bare", settings={"model": {"kernels": "liger"}}
    ),
}


def title_of(name: str, adapter: str = "none") -> str:
    """Of an implementation. Beside an adapter, which peft keeps in fp32, the other weights need no master copy."""
    title = NAMES[name].title
    return title if adapter == "none" else title.replace("no master weights", "base in bf16")


def names_for(adapter: str) -> tuple[str, ...]:
    """Whom to compare, where nobody says. An adapter's base lies in memory in bf16, in TRL too where its user says so:
    that one has the setting of kto_dist, and the other is TRL's default."""
    return ("kto_dist", "trl", "bare") if adapter == "none" else ("kto_dist", "trl", "trl-bf16", "bare")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process does; every implementation gets the same but for `trl_*` and `settings`."""

    name: str
    """The implementation."""
    model: str
    folder: str
    """Holds ROWS and ORDERED; each run writes below it."""
    warmup: int
    steps: int
    """Timed ones, after the warm-up; 0: the reference pass alone."""
    global_batch: int
    max_length: int
    tokens_per_microbatch: int
    dtype: str
    """bf16 or fp32."""
    threads: int
    trl_batch: int
    trl_reference_batch: int
    """Rows a device takes at a time."""
    trl_probe: tuple[int, ...] = ()
    """Try these sizes, a timed step each, instead of training."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of kto_dist's config, beside those of the implementation."""
    adapter: str = "none"
    """lora or dora: on all linear layers, alpha twice the rank, without dropout."""
    rank: int = 16
    """Of the adapter."""

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


class Clock:
    """Seconds and memory peaks of a run's two phases, taken the same way whoever trains."""

    def __init__(self, job: Job, started: float):
        """`started`: when the process began, by `time.time`."""
        self.job = job
        self.reference: dict[str, float] = {}
        self._born = started
        self._peak = 0
        self._first = 0.0
        self._updates: list[float] = []

    @contextmanager
    def scoring(self) -> Iterator[None]:
        machine.reset_peak()
        started = machine.now()
        yield
        self.reference = {"seconds": machine.now() - started, "peak_bytes": machine.peak()}

    def updated(self) -> None:
        """Called right after each optimizer update."""
        self._updates.append(machine.now())
        if len(self._updates) == 1:
            self._first = time.time() - self._born
        if len(self._updates) == self.job.warmup:
            # what loading the model took for a moment is not what training takes
            machine.reset_peak()
        self._peak = machine.peak()

    @property
    def done(self) -> bool:
        return len(self._updates) == self.job.all_steps

    def result(self, losses: list[float], **more: Any) -> dict[str, Any]:
        found = {"reference": self.reference, "losses": losses, **more}
        if self.job.steps:
            assert len(self._updates) == len(losses) == self.job.all_steps, (len(self._updates), len(losses))
            seconds = [end - start for start, end in pairwise(self._updates[self.job.warmup - 1 :])]
            found["training"] = {
                "seconds": seconds,
                "peak_bytes": self._peak,
                "seconds_to_first_step": self._first,
            }
        return found


def kto_dist_config(job: Job, output: Path) -> Any:
    """Raises `UserError` where this version of kto_dist does not know a setting."""
    from kto_dist.training.config import Config

    tree: dict[str, dict[str, Any]] = {
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
        "objective": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
        "train": {
            "output": str(output),
            "global_batch": job.global_batch,
            "max_steps": max(1, job.all_steps),
            "tokens_per_microbatch": job.tokens_per_microbatch,
            "dtype": job.dtype,
            "schedule": "constant",
            "warmup": 0,
        },
        "tracking": {"enabled": False},
    }
    if job.adapter != "none":
        tree["adapter"] = {"type": job.adapter, "rank": job.rank}
    for changes in (NAMES[job.name].settings, job.settings):
        for section, values in changes.items():
            tree.setdefault(section, {}).update(values)
    return Config.build(tree)


class Enough(Exception):
    """Ends a run once its last step is timed: the export is in nobody's figures."""


def run_kto_dist(
    job: Job, output: Path, started: float, watch: Callable[[Any], None] = lambda result: None
) -> dict[str, Any]:
    """`watch` is called after every step, once its time is taken."""
    from kto_dist import train
    from kto_dist.base import comm
    from kto_dist.base.console import Console
    from kto_dist.objective.metrics import step_metrics
    from kto_dist.reference.logps import score_reference
    from kto_dist.training.prepare import find, prepare_training, wanted

    comm.init()
    config, console, clock = kto_dist_config(job, output), Console(), Clock(job, started)
    prepared = prepare_training(config, console)
    setup, identity = find(prepared, console)
    machine.reset_peak()
    outcome = score_reference(wanted(prepared, console), setup, identity, console).outcome
    clock.reference = {"seconds": outcome.scoring_seconds, "peak_bytes": machine.peak()}
    losses: list[float] = []

    def after_step(result: Any) -> None:
        clock.updated()
        losses.append(step_metrics(result.sums, result.kl)["loss"])
        watch(result)
        if clock.done:
            raise Enough

    if job.steps:
        with suppress(Enough):
            train(config, watch=after_step)
    about = {"attention": prepared.attention, "kernels": prepared.kernels, "packed": prepared.cutting.packed}
    return clock.result(losses, pairs=outcome.scored_once, about=about)


def run_trl(job: Job, output: Path, started: float) -> dict[str, Any]:
    if not job.trl_probe:
        return _run_trl(job, output, started, job.all_steps, job.trl_batch, job.trl_reference_batch)
    found = []
    for size in job.trl_probe:
        line = _try_trl(job, output, started, size)
        # what the trial before held, were it out of memory or not
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if line is not None:
            found.append(line)
    return {"sizes": found}


def _try_trl(job: Job, output: Path, started: float, size: int) -> dict[str, Any] | None:
    """Seconds of one step after one to warm up; None where the device has too little memory."""
    short = replace(job, warmup=1, steps=1)
    try:
        found = _run_trl(short, output / str(size), started, 2, size, size)
    except torch.cuda.OutOfMemoryError:
        return None
    return {
        "size": size,
        "training": sum(found["training"]["seconds"]),
        "reference": found["reference"]["seconds"],
        "peak_bytes": found["training"]["peak_bytes"],
    }


def _run_trl(job: Job, output: Path, started: float, steps: int, batch: int, reference_batch: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    of_kind = NAMES[job.name]
    lines = Path(job.folder, ORDERED).read_text().splitlines()
    rows = [json.loads(line) for line in lines[: max(1, steps) * job.global_batch]]
    clock = Clock(job, started)

    class Trainer(KTOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with clock.scoring():
                return super()._precompute_ref_logps(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.updated()

    arguments = KTOConfig(
        output_dir=str(output),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=job.global_batch // batch,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=reference_batch,
        max_length=job.max_length,
        max_steps=max(1, steps),
        bf16=job.dtype == "bf16",
        model_init_kwargs={"dtype": of_kind.weights, "attn_implementation": _trl_attention(job)},
        use_liger_kernel=of_kind.liger,
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
        peft_config=_peft_config(job),
        callbacks=[Watch()],
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        assert row["tokens"] == [theirs["prompt_ids"], theirs["completion_ids"]], "the rows became other tokens"
    if job.steps:
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    about = {"attention": _trl_attention(job), "rows_a_device": batch, "reference_rows_a_device": reference_batch}
    return clock.result(losses, pairs=2 * len(rows), about=about)


def _peft_config(job: Job) -> Any:
    """The same adapter as kto_dist's; None for all weights."""
    if job.adapter == "none":
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        use_dora=job.adapter == "dora",
        task_type="CAUSAL_LM",
    )


def _trl_attention(job: Job) -> str:
    """The best of those that are installed, as its users would choose."""
    from transformers.utils import is_flash_attn_2_available

    possible = torch.cuda.is_available() and job.dtype == "bf16"
    return "flash_attention_2" if possible and is_flash_attn_2_available() else "sdpa"


def run_bare(job: Job, output: Path, started: float) -> dict[str, Any]:
    """What the hardware gives: kto_dist's micro-batches through the same model, a plain head and cross-entropy.

    The passes are those of KTO (a forward over the KL pairs, forward and backward over the rows, AdamW), but nothing
    comes of them: no reference, no loss of KTO, no master weights, no clipping, no engine, no metrics.
    """
    from kto_dist.base import comm
    from kto_dist.base.console import Console
    from kto_dist.data.batch import microbatches, step_kl_pairs, step_rows
    from kto_dist.model.adapters import put_in
    from kto_dist.model.causal_lm import DTYPES, ScoringModel, score
    from kto_dist.model.loading import load_model
    from kto_dist.reference.pairs import wanted_pairs
    from kto_dist.training.prepare import prepare_training

    comm.init()
    prepared = prepare_training(kto_dist_config(job, output), Console())
    device, examples, cutting = comm.device(), prepared.train, prepared.cutting
    lm = load_model(
        job.model,
        gguf_file=None,
        dtype=DTYPES[job.dtype],
        attention=prepared.attention,
        kernels=prepared.kernels,
    )
    if prepared.adapter is not None:
        put_in(lm, prepared.adapter)
    model = ScoringModel(lm).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6, fused=True)
    clock = Clock(job, started)

    def loss_of(batch: Any) -> torch.Tensor:
        batch = batch.pinned().to(device)

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            return torch.nn.functional.cross_entropy(logits.float(), batch.target, reduction="sum")

        return score(model, batch, head)

    with torch.no_grad(), clock.scoring():
        pairs = wanted_pairs(prepared.plan, examples)
        for batch in microbatches(examples, *pairs, cutting, rank=0, ranks=1):
            loss_of(batch)

    losses = []
    for step in range(job.all_steps if job.steps else 0):
        rows = step_rows(prepared.plan, step)
        with torch.no_grad():
            kl = step_kl_pairs(prepared.plan, step, rows, examples.prompt_group)
            for batch in microbatches(examples, *kl, cutting, rank=0, ranks=1):
                loss_of(batch)
        tokens = int(examples.completion_lengths[rows].sum())
        total = torch.zeros((), device=device)
        for batch in microbatches(examples, rows, rows, cutting, rank=0, ranks=1):
            loss = loss_of(batch) / tokens
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        clock.updated()
        losses.append(float(total))
    about = {"attention": prepared.attention, "kernels": prepared.kernels, "packed": cutting.packed}
    return clock.result(losses, pairs=len(pairs[0]), about=about)


RUN = {"kto_dist": run_kto_dist, "trl": run_trl, "bare": run_bare}


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    result = Path(sys.argv[2])
    torch.set_num_threads(job.threads)
    output = result.with_suffix("")
    output.mkdir(parents=True)
    found = RUN[NAMES[job.name].trainer](job, output, float(sys.argv[3]))
    records.write_json(result, found)


if __name__ == "__main__":
    main()

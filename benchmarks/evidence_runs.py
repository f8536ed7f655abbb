"""The runs of `evidence.py`, one after the other: train, then score the held-out rows under start and result.

    python benchmarks/evidence_runs.py      a line of JSON [JOB.json, RESULT.json] a run comes in, DONE a line goes out

Whoever trained, the measure is one: what `kto-dist evaluate` does with a model, which is to score it as a reference is
scored. TRL gets the rows of kto_dist's steps in their order, a micro-batch a step, so that its z0 is of the same rows.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process does."""

    model: str
    train: str
    """JSONL or Parquet."""
    heldout: str
    """JSONL."""
    folder: str
    """The run's own; is deleted."""
    store: str
    cache: str
    loss: str
    weigh: bool
    """By the paper's rule; else every row weighs as its file says."""
    trainer: str
    """kto_dist or trl."""
    dtype: str
    """bf16 or fp32, of the run and of the measure."""
    seed: int
    steps: int
    global_batch: int
    lr: float
    beta: float
    max_length: int


def config_of(job: Job) -> Any:
    from kto_dist.training.config import Config

    weights = {} if job.weigh else {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    return Config.build(
        {
            "model": {"path": job.model},
            "reference": {"store": job.store, "dtype": job.dtype, "tokens_per_batch": 2048},
            "data": {"train": job.train, "max_length": job.max_length, "cache": job.cache, "workers": 1},
            "objective": {"loss": job.loss, "beta": job.beta, **weights},
            "train": {
                "output": f"{job.folder}/run",
                "global_batch": job.global_batch,
                "max_steps": job.steps,
                "tokens_per_microbatch": 4096,
                "lr": job.lr,
                "schedule": "constant",
                "warmup": 0,
                "seed": job.seed,
                "dtype": job.dtype,
            },
            "tracking": {"enabled": False, "report": False},
        }
    )


def by_kto_dist(job: Job) -> dict[str, Any]:
    from kto_dist import train

    summary = train(config_of(job))
    lines = [json.loads(line) for line in Path(job.folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "model": summary["export"],
        "rows": summary["data"]["train"]["rows"],
        "class_weights": summary["data"]["class_weights"],
        "loss": [line["loss"] for line in lines],
        # after the first, which pays for what is done once
        "step_seconds": float(np.median([line["seconds"] for line in lines[1:]] or [0.0])),
        "kl_raw": [line["kl_raw"] for line in lines if "kl_raw" in line],
        "scored": summary["reference"]["scored"],
    }


def by_trl(job: Job) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    from kto_dist.base import comm
    from kto_dist.base.console import Console
    from kto_dist.data.batch import step_rows
    from kto_dist.training.prepare import prepare_training

    comm.init()
    prepared = prepare_training(config_of(job), Console())
    order = np.concatenate([step_rows(prepared.plan, step) for step in range(job.steps)])
    rows = [_as_trl_reads(prepared, int(row)) for row in order]
    undesirable, desirable = prepared.class_weights
    output = Path(job.folder, "run")
    arguments = KTOConfig(
        output_dir=str(output),
        per_device_train_batch_size=job.global_batch,
        gradient_accumulation_steps=1,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=job.global_batch,
        max_length=job.max_length,
        max_steps=job.steps,
        bf16=job.dtype == "bf16",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
        loss_type=job.loss,
        beta=job.beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = KTOTrainer(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "label")} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        assert row["tokens"] == [theirs["prompt_ids"], theirs["completion_ids"]], "the rows became other tokens"
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    trainer.save_model(str(output / "export"))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "model": str(output / "export"),
        "rows": len(prepared.train),
        "class_weights": {"undesirable": undesirable, "desirable": desirable},
        "loss": [line["loss"] for line in lines],
        "step_seconds": seconds / job.steps,
        # clamped at 0, which is what it logs
        "kl": [line["kl"] for line in lines],
    }


def _as_trl_reads(prepared: Any, row: int) -> dict[str, Any]:
    """A row as text, with the tokens that it has to become."""
    from workload import as_text

    prompt, completion = as_text(prepared.tokenizer, *prepared.train.original(row))
    tokens = [prepared.train.prompt(row).tolist(), prepared.train.completion(row).tolist()]
    return {
        "prompt": prompt,
        "completion": completion,
        "label": bool(prepared.train.desirable[row]),
        "tokens": tokens,
    }


def log_ratios(job: Job, model: str) -> dict[str, Any]:
    """Of the held-out rows, in nats, under the trained model and the one that it began as; and what else they are."""
    from kto_dist.base.console import Console
    from kto_dist.data import tokenise
    from kto_dist.data.examples import load
    from kto_dist.model.loading import load_tokenizer
    from kto_dist.reference.logps import score_reference
    from kto_dist.reference.pairs import evaluation_pairs
    from kto_dist.reference.setup import find_reference

    config, console = config_of(job), Console()
    data = config.data.model_copy(update={"train": (job.heldout,)})
    examples = load(tokenise.prepare(data, load_tokenizer(job.model))[0])
    rows = np.arange(len(examples))
    logps = {}
    for path in (model, job.model):
        setup, fingerprint = find_reference(
            config.reference.model_copy(update={"path": path}),
            config.model,
            max_length=data.max_length,
            prompt_limit=data.prompt_limit,
            console=console,
        )
        pairs = evaluation_pairs(0, examples, with_z0=False)
        logps[path] = score_reference([pairs], setup, fingerprint, console).train(rows, rows)
    prompts = np.unique(examples.prompt_group, return_inverse=True)[1].ravel()
    # in one line each: a file of results is read by people too
    return {
        "ratios": " ".join(f"{ratio:.3f}" for ratio in logps[model] - logps[job.model]),
        "heldout": {
            "desirable": " ".join(str(int(value)) for value in examples.desirable),
            "prompts": " ".join(str(prompt) for prompt in prompts),
        },
    }


TRAINERS = {"kto_dist": by_kto_dist, "trl": by_trl}


DONE = "the run is done"


def main() -> None:
    for line in sys.stdin:
        given, taken = map(Path, json.loads(line))
        one(Job(**json.loads(given.read_text(encoding="utf-8"))), taken)
        print(f"\n{DONE}", flush=True)


def one(job: Job, result: Path) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)  # of a benchmark that was killed after training
    started = time.monotonic()
    found = TRAINERS[job.trainer](job)
    trained = time.monotonic() - started
    found |= log_ratios(job, found.pop("model"))
    shutil.rmtree(job.folder)
    found["seconds"] = {"training": trained, "all": time.monotonic() - started}
    records.write_json(result, found)


if __name__ == "__main__":
    main()

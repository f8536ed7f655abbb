"""The rows that all trainers take: chosen from a log, in the order in which kto_dist's steps take them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from trainers import ORDERED, ROWS, Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What there is to do, counted from the rows alone."""

    reference_pairs: int
    """A row with itself and a KL pair, for each row."""
    reference_tokens: int
    """Every prompt and every completion is in one pair of each kind."""
    training_rows: int
    """Of the timed steps."""
    training_tokens: int
    """Prompt and completion of these rows; the KL pairs' are not counted, though they cost a forward."""
    training_flops: float
    """Of the timed steps, KL forwards included: what they must do, whoever does it."""
    reference_flops: float


def write_rows(log: str, job: Job, folder: Path) -> Workload:
    """Writes ROWS and ORDERED. Raises `ClickException` when the log has too few rows for the job."""
    from kto_dist.data import examples
    from kto_dist.data import tokenise as data
    from kto_dist.data.batch import Plan, step_rows
    from kto_dist.data.config import DataConfig
    from kto_dist.model.loading import load_tokenizer

    tokenizer = load_tokenizer(job.model)

    def load(path: str, max_length: int) -> examples.Examples:
        section = DataConfig(train=path, max_length=max_length, cache=str(folder / "tokenised"), workers=1)
        return examples.load(data.prepare(section, tokenizer)[0])

    wanted = job.all_steps * job.global_batch
    # long enough to cut nothing: the two cut long rows at different ends
    every = load(log, 10**9)
    rows, seen = [], set()
    for row in range(len(every)):
        if len(rows) == wanted:
            break
        tokens = every.prompt(row).tolist() + every.completion(row).tolist()
        # the store scores equal pairs once, which would count as speed here
        if len(tokens) <= job.max_length and tuple(tokens) not in seen:
            prompt, completion = as_text(tokenizer, *every.original(row))
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
    return _count(chosen, np.array(order), job)


def _count(chosen: Any, order: np.ndarray, job: Job) -> Workload:
    import torch
    from transformers import AutoModelForCausalLM

    from kto_dist.model.devices import cost_of
    from kto_dist.model.loading import load_config

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(load_config(job.model))
    if job.adapter != "none":
        # what an adapter's own few weights take is not counted
        lm.requires_grad_(False)
    cost = cost_of(lm)
    lengths = chosen.prompt_lengths + chosen.completion_lengths
    timed = order[job.warmup * job.global_batch :]
    of_steps = lengths[timed], int(chosen.completion_lengths[timed].sum())
    once = cost.forward(lengths, int(chosen.completion_lengths.sum()))
    return Workload(
        reference_pairs=2 * len(order),
        reference_tokens=2 * int(lengths.sum()),
        training_rows=job.steps * job.global_batch,
        training_tokens=int(lengths[timed].sum()),
        # forward, backward, and the KL pairs' forward, whose lengths are those of the rows in the sum
        training_flops=2 * cost.forward(*of_steps) + cost.backward(*of_steps),
        reference_flops=2 * once,
    )


def as_text(tokenizer: Any, prompt: Any, completion: Any) -> tuple[str, str]:
    """A row as TRL takes it without a template of its own: that would train on what follows the final EOS as well."""
    if isinstance(prompt, str):
        return prompt, completion + tokenizer.eos_token
    before = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    return before, whole[len(before) : end]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

"""The run, read top to bottom.

1. prepare     checks; rows -> tokens, once; the plan of every step; class weights
2. reference   what the store lacks is scored by the reference's own engine, which then leaves memory
3. policy      the ZeRO engine; a checkpoint of this run, if there is one
4. loop        per step: KL forwards -> z0, then main forwards and backwards -> one update, one line of metrics
5. end         held-out figures, export in Hugging Face layout, summary and report

Run it under the `deepspeed` launcher (`launch/train.py`), from `kto-dist train`, or call `train(config)`.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from kto_dist.base import agree, comm
from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.data.audited import Audited, audit_files, audit_tags, describes_all, find_audits
from kto_dist.data.batch import microbatches, step_kl_pairs, step_rows
from kto_dist.evaluation.heldout import evaluate_rows
from kto_dist.model.causal_lm import ROUNDING, check_scoring
from kto_dist.model.engines import AdamW, Policy, zero_stage
from kto_dist.objective import metrics
from kto_dist.objective.objective import kl_sums, labels_of, loss_and_sums
from kto_dist.record import report, tracking, tracking_uri
from kto_dist.record.environment import environment_tags
from kto_dist.reference.record import PassRecord
from kto_dist.reference.scores import Scores, score_reference
from kto_dist.store.fingerprint import Fingerprint
from kto_dist.training import checkpoint
from kto_dist.training.config import Config
from kto_dist.training.health import Monitor
from kto_dist.training.prepare import PreparedTraining, counts, find, prepare_training, wanted


class Stopped(RuntimeError):
    """The run ended before its last step: a signal, or a rule of `health`. A checkpoint was saved first."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def train(config: Config) -> dict[str, Any]:
    """Runs all of it; returns the summary on every rank (it is also `<output>/summary.json`).

    Raises `UserError` for what the user can fix, `Stopped` when a signal or a health rule ended the run.
    """
    comm.init()
    console = Console()
    found = _find_checkpoint(config, console)
    audits = find_audits(config.data.train, console.warn) if comm.is_main() else []
    prepared = prepare_training(config, console)
    if not describes_all(audits, config.data.train):
        for doubt in prepared.train.report.doubts():
            console.warn(doubt)
    setup, identity = find(prepared, console)
    run = _start(prepared, identity, audits, found, console)
    record = PassRecord(lambda: _open(prepared, run, console))
    status: tracking.Status = "FAILED"
    try:
        with record.ended_by_sigterm():
            scores = score_reference(wanted(prepared), setup, identity, console, record.watch, record.open)
        agree.together(record.open)
        run.tracker = record.tracker
        if found is None or scores.outcome.hits < scores.outcome.pairs:
            record.end(scores.outcome)
        summary = _train(prepared, scores, run, console)
        status = "FINISHED"
    except (Stopped, KeyboardInterrupt) as stop:
        status = "KILLED" if not isinstance(stop, Stopped) or stop.exit_code != 1 else "FAILED"
        raise
    finally:
        record.finish(status)
    return summary


@dataclass(kw_only=True)
class Run:
    """What a run goes on from, and what it writes to."""

    output: Path
    state: checkpoint.State
    # of the checkpoint that was found, or of step 0
    found: Path | None
    reference: Fingerprint
    audits: list[Audited]
    # of the training data; on rank 0
    tracker: Any = field(default_factory=tracking.NullTracker)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Of the update that makes step `step` (from 0): linear warm-up, then the schedule down to 0 at the end."""
    section = config.train
    warmup = round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    if section.schedule == "linear":
        return section.lr * max(0.0, 1 - progress)
    return section.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _find_checkpoint(config: Config, console: Console) -> Path | None:
    """Collective. The checkpoint to go on from. Raises `UserError` where the output folder must not be used."""
    output = Path(config.train.output)
    found = checkpoint.find(output, console.warn)
    if found is not None and config.checkpoint.resume is False:
        raise UserError(
            f"train.output ({output}) holds checkpoints and checkpoint.resume is false: give another folder, "
            "delete its checkpoints, or let the run go on from them (checkpoint.resume: auto)"
        )
    if found is None and config.checkpoint.resume is True:
        raise UserError(f"checkpoint.resume is true and train.output ({output}) holds no whole checkpoint: use auto")
    if found is None and comm.broadcast((output / "summary.json").exists()):
        raise UserError(
            f"train.output ({output}) holds a finished run, which this one would overwrite: give another folder, or "
            "delete that one"
        )
    return found


def _start(
    prepared: PreparedTraining, reference: Fingerprint, audits: list[Audited], found: Path | None, console: Console
) -> Run:
    """Checks the checkpoint to go on from; writes nothing. Raises `UserError` where it is another run's."""
    config = prepared.config
    output = Path(config.train.output)
    stage = zero_stage(config.deepspeed, prepared.dtype)
    identity = checkpoint.identity(config, data=prepared.train.fingerprint, policy=reference.weights, zero_stage=stage)
    state = checkpoint.State(
        step=0,
        world_size=comm.world_size(),
        zero_stage=stage,
        identity=identity,
        mlflow_run=None,
    )
    if found is not None:
        state = checkpoint.read_state(found)
        checkpoint.check_same_run(state, identity, str(output))
        console.say(f"going on from {found.name} of {prepared.plan.steps} steps")
    return Run(output=output, state=state, found=found, reference=reference, audits=audits)


def _open(prepared: PreparedTraining, run: Run, console: Console) -> tracking.Tracker | tracking.NullTracker:
    """Writes the config, and opens the MLflow run with its datasets and audits. Raises `UserError`."""
    config, output = prepared.config, run.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "config.yaml", to_yaml(config).encode())
        _keep_lines_until(output / "metrics.jsonl", run.state.step)
        # the last evaluation is made again, from the same weights
        _keep_lines_until(output / "heldout.jsonl", min(run.state.step, prepared.plan.steps - 1))
    except OSError as error:
        raise UserError(f"train.output ({output}) cannot be written: {error}; give a folder with room") from None
    tracker = tracking.start(
        config.tracking,
        settings=config,
        name=output.resolve().name,
        folder=output.resolve().parent,
        run_id=run.state.mlflow_run,
        tags={
            **environment_tags(),
            "reference_fingerprint": run.reference.digest,
            "world_size": str(comm.world_size()),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "dataset_fingerprint": prepared.train.fingerprint,
            **audit_tags(run.audits),
        },
        default_uri=f"sqlite:///{output.resolve().parent / 'mlflow.db'}",
        warn=console.warn,
    )
    for name, examples in (("training", prepared.train), ("heldout", prepared.heldout)):
        if examples is not None:
            apart = name == "heldout" and isinstance(config.data.heldout, str)
            source = str(config.data.heldout) if apart else ", ".join(config.data.train)
            tags = audit_tags(run.audits) if name == "training" else {}
            tracker.log_dataset(name, name, examples.fingerprint, counts(examples), source, tags)
    for path, folder in audit_files(run.audits):
        tracker.log_artifact(path, folder)
    return tracker


def _train(prepared: PreparedTraining, scores: Scores, run: Run, console: Console) -> dict[str, Any]:
    config, plan, objective = prepared.config, prepared.plan, prepared.objective
    console.phase("policy")
    if zero_stage(config.deepspeed, prepared.dtype) != config.deepspeed.zero_stage:
        console.say("deepspeed.zero_stage 0 becomes 1 in bf16: it keeps the fp32 master weights that stage 0 lacks")
    universal = checkpoint.to_universal(run.found, run.state) if run.found else None
    policy = Policy(
        config.model,
        config.deepspeed,
        AdamW(
            lr=config.train.lr,
            betas=config.train.betas,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
            clip=config.train.clip,
        ),
        model_config=prepared.model_config,
        dtype=prepared.dtype,
        attention=prepared.attention,
        universal=universal is not None,
    )
    check_scoring(policy.forward, policy.model, comm.device(), packed=prepared.cutting.packed)
    if run.found:
        checkpoint.load(policy, run.found, universal)
        if universal and comm.is_main():
            shutil.rmtree(universal)
    mlflow_run = comm.broadcast(getattr(run.tracker, "run_id", None))

    def save(step: int) -> None:
        console.phase("checkpoint")
        state = checkpoint.State(
            step=step,
            world_size=comm.world_size(),
            zero_stage=zero_stage(config.deepspeed, prepared.dtype),
            identity=run.state.identity,
            mlflow_run=mlflow_run,
        )
        checkpoint.save(policy, run.output, state, config.checkpoint.keep)
        console.phase("training")

    def heldout(step: int) -> dict[str, float] | None:
        if prepared.heldout is None or scores.heldout is None:
            return None
        console.phase("evaluation")
        figures = evaluate_rows(
            policy.forward,
            prepared.heldout,
            scores.heldout,
            seed=config.train.seed,
            objective=objective,
            cutting=prepared.cutting,
            class_weights=prepared.class_weights,
        )
        if comm.is_main():
            _append(run.output / "heldout.jsonl", {"step": step, **figures})
            run.tracker.log(step, {f"heldout/{name}": value for name, value in figures.items()})
        console.phase("training")
        return figures

    same_reference = config.reference.path is None
    monitor = Monitor(config.health)
    console.phase("training")
    before = heldout(0) if run.state.step == 0 else _first_line(run.output / "heldout.jsonl")
    last, tokens_seen = {}, 0
    with _sigterm_noted() as terminated, console.steps("training", run.state.step, plan.steps) as show:
        for step in range(run.state.step, plan.steps):
            started = time.monotonic()
            sums, kl, tokens, norm, lr = _step(prepared, scores, policy, step, check_start=step == 0 and same_reference)
            seconds = time.monotonic() - started
            tokens_seen += tokens
            last = {
                "step": step + 1,
                "epoch": (step + 1) / plan.steps_per_epoch,
                **metrics.step_metrics(sums, kl),
                "grad_norm": norm,
                "learning_rate": lr,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                **_mfu(policy.parameters, tokens, seconds),
            }
            if comm.is_main():
                _append(run.output / "metrics.jsonl", last)
                run.tracker.log(step + 1, {name: value for name, value in last.items() if name != "step"})
            show(
                step + 1,
                f"loss {last['loss']:.4f}  kl_raw {last.get('kl_raw', 0.0):+.2f}  {tokens / seconds:,.0f} tokens/s",
            )

            done = step + 1
            advice = monitor.check(done, last)
            for item in advice:
                console.warn(item.message)
            stopping = [item for item in advice if item.stop]
            signalled = comm.any_(terminated())
            if config.evaluate.every_steps and done % config.evaluate.every_steps == 0 and done < plan.steps:
                heldout(done)
            due = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
            # a broken step must not push a sound checkpoint out
            if (due or signalled or stopping) and all(math.isfinite(value) for value in last.values()):
                save(done)
            if signalled:
                raise Stopped(
                    f"stopped by a signal after step {done} of {plan.steps}; the same command goes on from there", 143
                )
            if stopping:
                raise Stopped(stopping[0].message, 1)

    after = heldout(plan.steps)
    console.phase("export")
    weights = policy.weights()
    generation = getattr(policy.model.lm, "generation_config", None)
    console.end()
    summary = {
        "steps": plan.steps,
        "training": last or _last_line(run.output / "metrics.jsonl"),
        "heldout": {"before": before, "after": after},
        "data": {
            "train": {**counts(prepared.train), "fingerprint": prepared.train.fingerprint},
            "heldout": None if prepared.heldout is None else counts(prepared.heldout),
            "audits": [audit.to_dict() for audit in run.audits],
            "class_weights": {"undesirable": prepared.class_weights[0], "desirable": prepared.class_weights[1]},
        },
        "reference": {
            "fingerprint": run.reference.digest,
            "pairs": scores.outcome.pairs,
            "from_store": scores.outcome.hits,
            "scored": scores.outcome.pairs - scores.outcome.hits,
        },
        "world_size": comm.world_size(),
        "precision": str(prepared.dtype).removeprefix("torch."),
        "attention": prepared.attention,
        "packing": prepared.cutting.packed,
        "versions": environment_tags(),
        "tokens": tokens_seen,
        "seconds": console.seconds,
        "export": str(run.output / "export"),
        "mlflow": {"uri": getattr(run.tracker, "uri", None), "run_id": mlflow_run},
    }
    policy.close()
    agree.on_main(lambda: _finish(weights, generation, prepared, run, summary) if weights is not None else None)
    _say_outcome(summary, run.output, console)
    return comm.broadcast(summary)


def _step(prepared: PreparedTraining, scores: Scores, policy: Policy, step: int, *, check_start: bool):
    """One optimizer step: (2, Q) sums, (2,) KL sum and count, tokens, gradient norm and learning rate, all global."""
    config, plan, objective, examples = prepared.config, prepared.plan, prepared.objective, prepared.train
    device = comm.device()
    rows = step_rows(plan, step)
    kl_prompts, kl_completions = step_kl_pairs(plan, step, rows, examples.prompt_group)

    # z0 belongs to the whole step: every KL forward of every rank comes before the first main forward.
    kl_batches = (
        microbatches(examples, kl_prompts, kl_completions, prepared.cutting, rank=comm.rank(), ranks=comm.world_size())
        if kl_prompts.size
        else []
    )
    kl_refs = torch.from_numpy(scores.train(kl_prompts, kl_completions)).to(device)
    kl = comm.sum_(kl_sums(policy.forward, kl_batches, kl_refs, objective))
    z0 = metrics.clamp_kl(kl)

    labels = labels_of(examples, rows, scores.train(rows, rows), prepared.class_weights, device)
    batches = microbatches(examples, rows, rows, prepared.cutting, rank=comm.rank(), ranks=comm.world_size())
    sums = metrics.empty_sums(device)
    tokens = torch.zeros(1, dtype=torch.int64)
    worst = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        loss, batch_sums, ratios = loss_and_sums(policy.forward, batch, labels, z0, objective)
        policy.backward(loss / rows.size, last=number == len(batches) - 1)
        sums += batch_sums
        tokens += batch.tokens
        if check_start and ratios.numel():
            worst = torch.maximum(worst, (ratios.abs() / batch.lengths.to(device).clamp(min=1).sqrt()).max())
    comm.sum_(sums)
    if check_start:
        _refuse_unless_reference(comm.gather(float(worst)), prepared, scores)
    comm.sum_(tokens)
    lr = learning_rate(step, plan.steps, config)
    return sums, kl, int(tokens[0]), policy.step(lr), lr


def _refuse_unless_reference(worst_of_ranks: list[float], prepared: PreparedTraining, scores: Scores) -> None:
    """Before the first update every reward is 0; anything else means a wrong reference, template or precision."""
    limit = max(ROUNDING[prepared.dtype], ROUNDING[getattr(torch, scores.identity.dtype)])
    if not all(worst <= limit for worst in worst_of_ranks):
        raise UserError(
            "before the first update the policy must equal its reference, but a row's log-prob differs by "
            f"{max(worst_of_ranks):.3g} nats per square root of its tokens (limit {limit}: policy in "
            f"{str(prepared.dtype).removeprefix('torch.')}, reference in {scores.identity.dtype}). The reference store "
            f"({prepared.config.reference.store}) holds values of other text or weights, the reference is another "
            "model (then name it in reference.path), or the policy runs with dropout: check these, and delete the "
            "store's folder of this model to score again"
        )


def _finish(
    weights: dict[str, torch.Tensor],
    generation: GenerationConfig | None,
    prepared: PreparedTraining,
    run: Run,
    summary: dict[str, Any],
) -> None:
    """Rank 0: export, summary, report, artifacts."""
    target = run.output / "export"
    checkpoint.export(
        weights,
        target,
        model_config=prepared.model_config,
        generation_config=generation,
        tokenizer=prepared.tokenizer,
        card=_model_card(prepared.config, summary),
    )
    write_whole(run.output / "summary.json", json.dumps(summary, indent=1).encode())
    page = report.write_report(run.output)
    for path in (run.output / "config.yaml", run.output / "summary.json", page, run.output / "plots"):
        run.tracker.log_artifact(path)
    if prepared.config.tracking.log_model or prepared.config.tracking.register_as:
        run.tracker.log_model(target)


def _say_outcome(summary: dict[str, Any], output: Path, console: Console) -> None:
    """The held-out figures that matter most, and where everything lies."""
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    if before and after:
        for name in ("accuracy/all", "auc", "rewards/desirable", "rewards/undesirable", "kl_raw"):
            if name in before and name in after:
                console.say(f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after")
    console.say(f"model:  {summary['export']}")
    console.say(f"report: {output / 'report.html'}")
    if summary["mlflow"]["uri"]:
        console.say(f"MLflow: {tracking_uri.ui_command(summary['mlflow']['uri'])}")


def _model_card(config: Config, summary: dict[str, Any]) -> str:
    rows = summary["data"]["train"]
    figures = summary["heldout"]["after"] or summary["training"]
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if isinstance(value, float))
    return (
        f"---\nbase_model: {config.model.path}\nlibrary_name: transformers\ntags: [kto, kto_dist]\n---\n\n"
        f"# {Path(config.train.output).name}\n\n"
        f"{config.model.path} aligned by Kahneman-Tversky Optimization (arXiv 2402.01306, loss `{config.kto.loss}`, "
        f"beta {config.kto.beta}) from {rows['desirable']:,} desirable and {rows['undesirable']:,} undesirable "
        f"answers, {summary['steps']} steps of {config.train.global_batch} rows, peak learning rate "
        f"{config.train.lr}.\n\n"
        f"| {'held-out' if summary['heldout']['after'] else 'last step'} | value |\n|---|---|\n{table}\n"
    )


# Dense bf16 peak of one device in FLOP/s, from the makers' datasheets.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "MI300X": 1307e12, "B200": 2250e12}


def _mfu(parameters: int, tokens: int, seconds: float) -> dict[str, float]:
    """Model FLOP utilisation: 6 FLOP a parameter and trained token, over the devices' peak; absent where unknown."""
    if not torch.cuda.is_available():
        return {}
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in _PEAK.items() if key in name), None)
    return {} if peak is None else {"mfu": 6 * parameters * tokens / seconds / (peak * comm.world_size())}


@contextmanager
def _sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM is only taken note of; yields the question whether it has come."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a crash cut short
            break
    return lines


def _keep_lines_until(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint that it goes on from; everything when it starts anew."""
    kept = [line for line in _lines(path) if step and line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _first_line(path: Path) -> dict[str, Any] | None:
    return next(({k: v for k, v in line.items() if k != "step"} for line in _lines(path)), None)


def _last_line(path: Path) -> dict[str, Any]:
    return next(iter(reversed(_lines(path))), {})

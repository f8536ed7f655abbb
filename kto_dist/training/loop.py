"""The run, read top to bottom.

1. prepare     checks; rows -> tokens, once; the plan of every step; class weights
2. reference   what the store lacks is scored by the reference's own engine, which then leaves memory
3. policy      the ZeRO engine; a checkpoint of this run, if there is one
4. loop        per step: KL forwards -> z0, then main forwards and backwards -> one update, one line of metrics
5. end         held-out figures, export in Hugging Face layout, summary and report

Run it under the `deepspeed` launcher (`--module kto_dist.commands.train`), by `kto-dist train`, or call `train`.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kto_dist.base import agree, comm, restart
from kto_dist.base.console import Console
from kto_dist.base.exits import FAILED, TERMINATED, Stopped
from kto_dist.base.signals import Interrupted, before_sigterm, sigterm_noted
from kto_dist.data.audited import describes_all, find_audits
from kto_dist.model import ops
from kto_dist.model.checks import Rounding, check_scoring
from kto_dist.model.devices import cost_of, make_deterministic
from kto_dist.model.engines import AdamW, Policy
from kto_dist.model.memory import NeedsRestart
from kto_dist.model.options import zero_stage
from kto_dist.record.tracker import Status
from kto_dist.reference.logps import ReferenceLogps, score_reference
from kto_dist.reference.record import PassRecord
from kto_dist.training import checkpoint
from kto_dist.training.agreement import begin_together
from kto_dist.training.ahead import ahead
from kto_dist.training.config import Config
from kto_dist.training.evaluations import Evaluations
from kto_dist.training.figures import FEW, due, is_sound, line_of, long_way, part_figures, step_figures
from kto_dist.training.finish import Outcome, finish, report_so_far
from kto_dist.training.heavy import heavy_rows, warning
from kto_dist.training.prepare import PreparedTraining, find, prepare_training, wanted
from kto_dist.training.preview import preview
from kto_dist.training.profile import profiled
from kto_dist.training.run import Goodbye, Run, alone_in, find_checkpoint, open_run, start_run
from kto_dist.training.saves import Saves
from kto_dist.training.step import StepResult
from kto_dist.training.stepper import Stepper
from kto_dist.training.trends import own_rules
from kto_dist.training.watching import Watching

Watch = Callable[[StepResult], None]
"""Is called on every rank after each step, once its line of metrics is written."""


def train(config: Config, watch: Watch | None = None) -> dict[str, Any]:
    """Runs all of it; returns the summary on every rank (it is also `<output>/summary.json`).

    Raises `UserError` for what the user can fix, `Stopped` when a signal or a health rule ended the run.
    """
    comm.init()
    begin_together("train", config)
    if config.train.deterministic:
        make_deterministic()
    goodbye = Goodbye()
    with alone_in(Path(config.train.output)), before_sigterm(goodbye):
        return _run(config, Console(), watch, goodbye)


def _run(config: Config, console: Console, watch: Watch | None, goodbye: Goodbye) -> dict[str, Any]:
    agree.together(lambda: own_rules(config.health.rules))  # a mistake in them shows before long work
    found = find_checkpoint(config, console)
    audits = agree.on_main(lambda: find_audits(config.data.train_paths, console.warn))
    prepared = prepare_training(config, console)
    if not describes_all(audits, config.data.train_paths):
        for doubt in prepared.train.report.doubts():
            console.warn(doubt)
    if heavy := heavy_rows(prepared.plan, prepared.train, prepared.class_weights):
        console.warn(warning(heavy))
    for line in preview(prepared, prepared.class_weights):
        console.say(line)
    setup, fingerprint = find(prepared, console)
    run = start_run(prepared, fingerprint, audits, found, console)
    record = goodbye.record = PassRecord(lambda: open_run(prepared, run, console))
    goodbye.where = (
        f"before step {run.state.step + 1}: what was scored is in reference.store ({config.reference.store}), and the "
        "same command goes on from there"
    )
    status: Status = "FAILED"
    try:
        with restart.before(record.last_words):
            refs = score_reference(wanted(prepared, console), setup, fingerprint, console, record.watch, record.open)
        agree.together(record.open)
        run.tracker = record.tracker
        if found is None or refs.outcome.hits < refs.outcome.pairs:
            record.end(refs.outcome)
        with restart.before(record.last_words):
            summary = _train(prepared, refs, run, console, watch, goodbye)
        status = "FINISHED"
    except (Stopped, NeedsRestart, KeyboardInterrupt) as stop:
        status = "FAILED" if isinstance(stop, Stopped) and stop.exit_code == FAILED else "KILLED"
        if status == "FAILED":
            report_so_far(prepared, run, console)
        raise
    finally:
        record.finish(status)
    return summary


def _train(
    prepared: PreparedTraining,
    refs: ReferenceLogps,
    run: Run,
    console: Console,
    watch: Watch | None,
    goodbye: Goodbye,
) -> dict[str, Any]:
    config, plan = prepared.config, prepared.plan
    console.phase("policy")
    policy, rounding = _load_policy(prepared, run, console)
    cost = cost_of(policy.model.lm)
    watching = Watching(prepared, run, console)
    stepper = Stepper(prepared, refs, policy, console, rounding)
    stepper.try_largest()
    first = done = run.state.step
    last, tokens = run.last_line(), 0
    console.phase("training")
    evaluations, saves = Evaluations(stepper, run, console, watching), Saves(policy, prepared, run, console)
    before = evaluations.begin(first)
    with (
        saves,
        sigterm_noted() as terminated,
        console.steps("training", first, plan.steps) as show,
        profiled(config.train.profile, plan.steps - first, run.folder.path, console) as profiling,
    ):
        started = time.monotonic()
        for work in ahead(profiling.making_of(stepper.work), range(first, first if evaluations.ended else plan.steps)):
            result = stepper.run(work)
            profiling.tick()
            seconds, started = time.monotonic() - started, time.monotonic()
            done, tokens = result.step, tokens + result.tokens
            last = step_figures(result, work, cost, seconds, steps_per_epoch=plan.steps_per_epoch, unit=plan.unit)
            last |= part_figures(result, prepared.train, config.data.source_names)
            run.log(last)
            show(done, line_of(last))
            if watch is not None:
                watch(result)

            stopping = [item for item in watching.after(result, last) if item.stop]
            signalled = comm.any_(terminated())
            # with the time that a signal leaves the step is saved: the same command evaluates it
            if done < plan.steps and not signalled and evaluations.due(done):
                with suppress(Interrupted):
                    evaluations.at(done, terminated)
                signalled, started = comm.any_(terminated()), time.monotonic()
            saving = due(config.checkpoint.every_steps, done) or evaluations.wants_checkpoint(done)
            at_once = done == plan.steps or signalled or bool(stopping)
            # a broken step must not push a sound checkpoint out
            if (saving or at_once) and is_sound(last):
                saves.save(done, evaluations.best, last["seconds"], at_once=at_once)
                started = time.monotonic()
            saves.finish() if at_once else saves.look()
            if signalled or (done == plan.steps and comm.any_(terminated())):
                raise Stopped(run.stopped_by_signal(done, plan.steps), TERMINATED)
            if stopping:
                raise Stopped(stopping[0].message, FAILED)
            if done - first == FEW and (long := long_way(plan.steps - done, seconds)):
                console.warn(long)
            if evaluations.ended:
                break
        saves.finish()
    if comm.any_(terminated()):  # since the last step, when it was only taken note of
        raise Stopped(run.stopped_by_signal(done, plan.steps), TERMINATED)

    goodbye.where = "after the last step; the same command evaluates and exports the model of its checkpoint"
    if done == plan.steps:
        evaluations.at(done)
    console.phase("export")
    weights = evaluations.model(policy, done)
    outcome = Outcome(
        steps=done,
        last=last,
        before=before,
        after=evaluations.last,
        best=evaluations.best,
        tokens=tokens,
        memory=stepper.memory.halved,
    )
    return finish(policy, weights, prepared, refs, run, console, outcome, goodbye)


def _load_policy(prepared: PreparedTraining, run: Run, console: Console) -> tuple[Policy, Rounding]:
    """Collective. The engine, with the state of the checkpoint that the run goes on from."""
    config = prepared.config
    if zero_stage(config.deepspeed, prepared.dtype) != config.deepspeed.zero_stage:
        console.say("deepspeed.zero_stage 0 becomes 1 in bf16: it keeps the fp32 master weights that stage 0 lacks")
    agree.once_per_host(lambda: ops.compile_ops(ops.needed(config.deepspeed), console.say))
    universal = checkpoint.to_universal(run.found, run.state) if run.found else None
    section = config.train
    policy = Policy(
        config.model,
        config.deepspeed,
        AdamW(
            lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, clip=section.clip
        ),
        model_config=prepared.model_config,
        dtype=prepared.dtype,
        attention=prepared.attention,
        kernels=prepared.kernels,
        adapter=prepared.adapter,
        universal=universal is not None,
        warn=console.warn,
    )
    cutting = prepared.cutting
    rounding = agree.together(
        lambda: check_scoring(
            policy.forward, policy.model, comm.device(), packed=cutting.packed, max_length=cutting.max_length
        )
    )
    if run.found:
        checkpoint.load(policy, run.found, universal)
        if universal and comm.local_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)  # the next start clears what is left
    run.mlflow_run = comm.broadcast(run.tracker.run_id)
    return policy, rounding

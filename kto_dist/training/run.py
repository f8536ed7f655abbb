"""What a run goes on from and what it writes to: its folder, its checkpoint, its MLflow run."""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kto_dist.base import agree, comm, disks, restart
from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data.audited import Audited, audit_files, audit_tags
from kto_dist.model.options import zero_stage
from kto_dist.record import tracking
from kto_dist.record.environment import environment_tags
from kto_dist.record.run_folder import RunFolder, append_line, read_lines
from kto_dist.record.tracker import NullTracker, Tracker
from kto_dist.reference.record import PassRecord
from kto_dist.reference.setup import local_folder
from kto_dist.store.fingerprint import Fingerprint, adapter_digest, weights_digest
from kto_dist.training import checkpoint, resume
from kto_dist.training.config import Config
from kto_dist.training.health import Advice
from kto_dist.training.lock import RunLock
from kto_dist.training.prepare import PreparedTraining, counts


@dataclass(kw_only=True)
class Run:
    """One run's state outside the model."""

    folder: RunFolder
    state: checkpoint.State
    """Of the checkpoint that was found, or of step 0."""
    now: checkpoint.State
    """As the checkpoints of this process say, but for their step."""
    found: Path | None
    """The checkpoint to go on from."""
    reference: Fingerprint
    audits: list[Audited]
    """Of the training data; on rank 0."""
    tracker: Tracker = field(default_factory=NullTracker)
    mlflow_run: str | None = None
    """The id of the MLflow run, on every rank."""
    saved: int = 0
    """The step of the newest checkpoint."""

    def stopped_by_signal(self, done: int, steps: int) -> str:
        """What is said of it, and what the same command will do."""
        if self.saved == done:
            return f"stopped by a signal after step {done} of {steps}; the same command goes on from there"
        where = f"goes on from step {self.saved}" if self.saved else "starts from the beginning"
        return (
            f"stopped by a signal after step {done} of {steps}, whose figures are not finite: it was not saved, and "
            f"the same command {where}"
        )

    def write(self, path: Path, line: dict[str, Any]) -> None:
        """Collective. Rank 0 writes one more line of metrics. Raises `UserError`, on every rank."""
        self.put_down(f"the line of step {line['step']}", lambda: append_line(path, line))

    def put_down(self, what: str, work: Callable[[], None]) -> None:
        """Collective. Rank 0 writes to the run's folder, which takes no time. Raises `UserError`, on every rank."""

        def try_it() -> None:
            if comm.is_main():
                with disks.refusals(what, "train.output", self.folder.path):
                    work()

        agree.together(try_it)

    def log(self, figures: dict[str, Any]) -> None:
        """Collective. A step's line of metrics, in the folder and in MLflow. Raises `UserError`."""
        self.write(self.folder.metrics, figures)
        if comm.is_main():
            self.tracker.log(figures["step"], {name: value for name, value in figures.items() if name != "step"})

    def last_line(self) -> dict[str, Any]:
        """Of the metrics of a run that goes on; {} of one that begins."""
        lines = self.lines()
        return lines[-1] if lines else {}

    def lines(self) -> list[dict[str, Any]]:
        """The metrics of a run that goes on, a line a step."""
        return read_lines(self.folder.metrics)

    def advise(self, step: int, advice: Sequence[Advice], console: Console) -> None:
        """Collective. What rules of health say, the same on every rank: for people, as a line in the folder, as points
        and tags in MLflow. Raises `UserError`."""
        for item in advice:
            console.warn(item.message)
            line = {"step": step, "rule": item.rule, "stop": item.stop, "message": item.message}
            self.write(self.folder.health, line)
            if comm.is_main():
                name = re.sub(r"[^\w./ -]", "_", item.rule)  # what MLflow takes
                self.tracker.log(step, {f"health/{name}": 1.0})
                self.tracker.tag({f"health.{name}": item.message, **self.health_tags()})

    def health_tags(self) -> dict[str, str]:
        """For MLflow: what the rules of health have said so far, in order."""
        lines = read_lines(self.folder.health)
        said = ", ".join(f"{line['rule']} at step {line['step']}" for line in lines)
        stopped = any(line["stop"] for line in lines)
        return {"health": f"{'stopped' if stopped else 'warned'}: {said}" if said else "sound"}


@dataclass(kw_only=True)
class Goodbye:
    """The last words of a process that SIGTERM ends where nothing has to be saved."""

    where: str = "before the first step; nothing was scored or trained yet"
    record: PassRecord | None = None
    """What tells MLflow."""

    def __call__(self) -> None:
        if comm.is_main():
            # not through `print`: whoever was interrupted may be in the middle of one
            os.write(2, f"stopped by a signal {self.where}\n".encode())
        if self.record is not None:
            self.record.finish("KILLED")


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Collective. Inside, the folder is this run's alone. Raises `UserError` where another one is at work there."""
    lock = RunLock(output, comm.broadcast(uuid.uuid4().hex), Console().say)
    try:
        agree.once_per_host(lock.take)
        yield
    finally:
        lock.release()


def find_checkpoint(config: Config, console: Console) -> Path | None:
    """Collective. The checkpoint to go on from. Raises `UserError` where the output folder must not be used."""
    output = Path(config.train.output)
    agree.once_per_host(lambda: checkpoint.clear(output))
    damaged: list[str] = []
    found = checkpoint.find(output, damaged.append)
    if found is None and damaged:
        raise UserError(
            f"train.output ({output}) holds no whole checkpoint: {'; '.join(damaged)}. Put a copy in its place, or "
            "delete the folder's checkpoints to start from the beginning"
        )
    for text in damaged:
        console.warn(f"{text}, and the run goes on from {found}")
    if found is not None and config.checkpoint.resume is False:
        raise UserError(
            f"train.output ({output}) holds checkpoints and checkpoint.resume is false: give another folder, "
            "delete its checkpoints, or let the run go on from them (checkpoint.resume: auto)"
        )
    if found is None and config.checkpoint.resume is True:
        raise UserError(f"checkpoint.resume is true and train.output ({output}) holds no whole checkpoint: use auto")
    if found is None and comm.broadcast(RunFolder(output).summary.exists()):
        raise UserError(
            f"train.output ({output}) holds a finished run, which this one would overwrite: give another folder, or "
            "delete that one"
        )
    return found


def start_run(
    prepared: PreparedTraining, reference: Fingerprint, audits: list[Audited], found: Path | None, console: Console
) -> Run:
    """Collective. Checks the checkpoint to go on from; writes nothing. Raises `UserError` where it is another run's."""
    config = prepared.config
    output = Path(config.train.output)
    stage = zero_stage(config.deepspeed, prepared.dtype)
    identity = resume.identity(
        config,
        data=prepared.train.fingerprint,
        policy=_policy_weights(config, reference),
        reference=reference.weights if config.reference.path else None,
        zero_stage=stage,
        dtype=prepared.dtype,
        adapter=prepared.adapter,
        start=_adapters_start(prepared),
        router_loss=0.0 if prepared.objective.routing is None else prepared.objective.routing.coefficient,
    )
    now = state = checkpoint.State(
        step=0,
        world_size=comm.world_size(),
        zero_stage=stage,
        identity=identity,
        mlflow_run=None,
        settings=resume.settings_of(
            config,
            steps=prepared.plan.steps,
            heldout=None if prepared.heldout is None else prepared.heldout.fingerprint,
        ),
    )
    if found is not None:
        state = checkpoint.read_state(found)
        resume.check_same_run(state, now, str(output))
        console.say(f"going on from {found.name} of {prepared.plan.steps} steps")
        if changed := resume.changes(state, now):
            console.warn(f"other settings from step {state.step + 1} on: {'; '.join(changed)}")
    if (again := restart.order()) is not None:
        console.warn(
            f"{again.reason}. Started again by itself with {' '.join(restart.overrides(again.settings))}: "
            f"{max(0, again.step - state.step)} steps are done once more"
        )
    folder, saved = RunFolder(output), state.step if found else 0
    return Run(folder=folder, state=state, now=now, found=found, reference=reference, audits=audits, saved=saved)


def _policy_weights(config: Config, reference: Fingerprint) -> str:
    """Collective. Of the weights that the policy starts from; they are hashed here where the reference has others."""
    if not config.reference.path:
        return reference.weights
    model = config.model

    def folder() -> Path:
        return local_folder(model.path, model.gguf_file, code=model.trust_remote_code)

    digest = agree.once_per_host(lambda: weights_digest(folder(), model.gguf_file))
    return agree.same_everywhere(digest, "the weights in model.path", "copy the model to each of them again")


def _adapters_start(prepared: PreparedTraining) -> str | None:
    """Collective. The fingerprint of the values that an adapter starts from; None for a fresh one."""
    if prepared.adapter is None or prepared.adapter.start is None:
        return None
    folder = prepared.adapter.start
    digest = agree.once_per_host(lambda: adapter_digest(folder))
    return agree.same_everywhere(digest, "the adapter in adapter.start", "copy it to each of them again")


def open_run(prepared: PreparedTraining, run: Run, console: Console) -> Tracker:
    """Writes the config, and opens the MLflow run with its datasets and audits. Raises `UserError`."""
    config, output = prepared.config, run.folder.path
    with disks.refusals("the run", "train.output", output):
        lost = run.folder.begin(to_yaml(config), step=run.state.step, last=run.state.step == prepared.plan.steps)
    for text in lost:
        console.warn(text)
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
        keep_in=output,
        step=run.state.step,
        same=not resume.changes(run.state, run.now),
    )
    for name, examples in (("training", prepared.train), ("heldout", prepared.heldout)):
        if examples is not None:
            apart = name == "heldout" and bool(config.data.heldout_sources)
            paths = config.data.heldout_paths if apart else config.data.train_paths
            source = ", ".join(paths)
            tags = audit_tags(run.audits) if name == "training" else {}
            tracker.log_dataset(name, name, examples.fingerprint, counts(examples), source, tags)
    for path, folder in audit_files(run.audits):
        tracker.log_artifact(path, folder)
    return tracker

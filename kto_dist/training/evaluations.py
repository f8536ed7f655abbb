"""A run's evaluations on held-out rows: each is a line in the folder, and points in MLflow; the best one of them.

The first, the last, and that of the weights which are exported look at all rows. Those between may look at a part
(`evaluate.tokens`): their lines say so (`part`), and lines of all rows have the part's figures as well (`of_part`), by
which the best one is chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kto_dist.base import agree, comm
from kto_dist.base.console import Console
from kto_dist.evaluation import kept
from kto_dist.evaluation.figures import Evaluated, Findings, figures_of, findings
from kto_dist.evaluation.slices import sets_of, slices_of
from kto_dist.model.engines import Policy
from kto_dist.model.memory import NeedsRestart
from kto_dist.record.run_folder import read_lines
from kto_dist.training import checkpoint
from kto_dist.training.best import Best, weights_of
from kto_dist.training.figures import due
from kto_dist.training.run import Run
from kto_dist.training.samples import Samples
from kto_dist.training.stepper import HeldOut, Stepper
from kto_dist.training.watching import Watching


@dataclass
class Evaluations:
    """What a loop asks for its evaluations."""

    stepper: Stepper
    run: Run
    console: Console
    watching: Watching
    best: Best | None = field(init=False)
    """None where `checkpoint.best` is."""
    last: dict[str, Any] | None = field(default=None, init=False)
    """What the last evaluation found."""
    slices: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    """On rank 0: column -> (N,) value of each held-out row."""

    samples: Samples = field(init=False)

    def __post_init__(self) -> None:
        """Collective."""
        self.samples = Samples(self.stepper, self.run, self.console)
        self.best = Best.of(self.stepper.prepared.config)
        heldout, data = self.stepper.prepared.heldout, self.stepper.prepared.config.data
        if heldout is not None and comm.is_main():
            # rows held out by a fraction come from the training rows' sources
            sources = data.heldout_sources or data.train_sources
            self.slices = slices_of(heldout, [name for name, _ in sources])
        lines = comm.broadcast(read_lines(self.run.folder.heldout))
        if lines:
            self.last = {name: value for name, value in lines[-1].items() if name != "step"}
        if self.best is not None:
            self.best.remember(lines, comm.broadcast(checkpoint.steps(self.run.folder.path)))

    @property
    def ended(self) -> bool:
        """Whether `train.stop_after` evaluations have been no better."""
        return self.best is not None and self.best.exhausted

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the policy after `step` updates is the best so far, or the last one."""
        return self.best is not None and (self.best.step == step or self.best.exhausted)

    def due(self, step: int) -> bool:
        """Whether anything is looked at after `step` updates."""
        return self._figures_due(step) or self.samples.due(step)

    def at(self, step: int, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
        """Collective. Does what is due after `step` updates: held-out figures, answers. The figures, on rank 0 with
        intervals; None where none are due, or there are no such rows.

        Raises `Interrupted` where `stop` becomes true on a rank: then nothing is noted.
        """
        line = self._figures(step, stop) if self._figures_due(step) else None
        if self.samples.due(step):
            self._answer(step, stop)
        return line

    def _figures_due(self, step: int) -> bool:
        prepared = self.stepper.prepared
        return step in (0, prepared.plan.steps) or due(prepared.config.evaluate.every_steps, step)

    def _figures(self, step: int, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
        line = self._look(step, whole=step in (0, self.stepper.prepared.plan.steps), stop=stop)
        if line is not None and self.best is not None:
            self.best.note(step, line.get("of_part", line))
        return line

    def _answer(self, step: int, stop: Callable[[], bool] | None = None) -> None:
        self.samples.at(step, stop)
        self.watching.answered(step, self.samples.lines)

    def _look(self, step: int, *, whole: bool, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
        self.console.phase("evaluation")
        try:
            found = self.stepper.evaluate(step, whole=whole, stop=stop)
        except NeedsRestart as failure:
            failure.step = step
            raise
        line = None if found is None else self._note(step, found)
        self.console.phase("training")
        return line

    def begin(self, step: int) -> dict[str, Any] | None:
        """Collective. The figures of the run's first evaluation, made now where it begins.

        What was due after `step` is made up for, where a signal has left no time for it.
        """
        if step == 0:
            return self.at(0)
        lines = read_lines(self.run.folder.heldout), self.samples.lines
        noted, told = comm.broadcast([{line["step"] for line in each} for each in lines])
        if step < self.stepper.prepared.plan.steps:
            if noted and step not in noted and self._figures_due(step):
                self._figures(step)
            if told and step not in told and self.samples.due(step):
                self._answer(step)
        return self.first()

    def first(self) -> dict[str, Any] | None:
        """Of a run that goes on: the figures of its first evaluation."""
        lines = read_lines(self.run.folder.heldout)
        return {name: value for name, value in lines[0].items() if name != "step"} if lines else None

    def _findings(self, rows: Evaluated, among: np.ndarray | None) -> Findings:
        """`among`: the held-out rows that `rows` are; None: all."""
        data, heldout = self.stepper.prepared.config.data, self.stepper.prepared.heldout
        assert heldout is not None
        among = np.arange(len(heldout)) if among is None else among
        sets = sets_of(heldout, data.heldout_names)
        sets = None if sets is None else sets[among]
        if not comm.is_main():
            return Findings(figures=figures_of(rows, sets))
        return findings(rows, sets=sets, slices={name: values[among] for name, values in self.slices.items()})

    def _note(self, step: int, found: HeldOut) -> dict[str, Any]:
        """Collective."""
        part, path = self.stepper.part, self.run.folder.heldout_rows
        few, whole, told = found.part, found.whole, None
        if few is not None:
            told = agree.together(lambda: self._findings(few, part))
        beside: dict[str, Any] = {}
        if whole is not None:
            beside = {} if told is None else {"of_part": told.figures}
            self.run.put_down(f"the held-out rows of step {step}", lambda: kept.write(path, whole))
            told = agree.together(lambda: self._findings(whole, None))
        else:
            assert part is not None and self.stepper.prepared.heldout is not None
            groups = self.stepper.prepared.heldout.prompt_group
            beside = {"part": {"prompts": np.unique(groups[part]).size, "of": np.unique(groups).size}}
        assert told is not None
        self.last = {**told.to_dict(), **beside}
        self.run.write(self.run.folder.heldout, {"step": step, **self.last})
        if comm.is_main():
            self.run.tracker.log(step, {f"heldout/{name}": value for name, value in told.figures.items()})
        return self.last

    def model(self, policy: Policy, done: int) -> dict[str, Tensor] | None:
        """Collective. The weights to export, on rank 0; `last` is about them from here on, and the policy is done with.

        They are those of the best evaluation, where one is asked for and its checkpoint is whole.
        """
        best, say = self.best, self.console.say
        if best is None or best.step is None:
            return policy.weights()
        if best.worse_than_the_start:
            self.console.warn(
                f"no evaluation has a better {best.name} than the model before training: what is exported is the best "
                "after an update, and the model that training began with may be the better one"
            )
        if best.step == done:
            self._look_at_all(done)
            return policy.weights()
        saved = checkpoint.folder(self.run.folder.path) / checkpoint.name_of(best.step)
        if wrong := checkpoint.damage(saved):
            self.console.warn(f"the best checkpoint {saved} is damaged ({wrong[0]}): the last step is exported")
            best.lost |= {step for step, _ in best.noted} - {done}
            self._look_at_all(done)
            return policy.weights()
        say(f"the best {best.name} ({best.value:.4g}) was that of step {best.step}: its checkpoint is exported")
        lines = comm.broadcast(read_lines(self.run.folder.heldout))
        self.last = {n: v for line in lines if line["step"] == best.step for n, v in line.items() if n != "step"}
        step = best.step
        return weights_of(policy, saved, self.stepper.prepared.dtype, lambda: self._look_at_all(step))

    def _look_at_all(self, step: int) -> None:
        """Collective. The policy has the weights that are exported: those of `step`."""
        if self.last is not None and "part" in self.last:
            self._look(step, whole=True)
        if comm.broadcast(all(line["step"] != step for line in self.samples.lines)):
            self.samples.at(step)
        self.console.phase("export")

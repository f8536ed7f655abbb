"""A run's evaluations on held-out rows: each is a line in the folder, and points in MLflow."""

from dataclasses import dataclass
from typing import Any

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.evaluation.figures import Evaluated, Findings, figures_of, findings
from kto_dist.evaluation.slices import sets_of, slices_of
from kto_dist.model.memory import NeedsRestart
from kto_dist.record.run_folder import read_lines
from kto_dist.training.run import Run
from kto_dist.training.stepper import Stepper


@dataclass
class Evaluations:
    """What a loop asks for its evaluations."""

    stepper: Stepper
    run: Run
    console: Console

    def at(self, step: int) -> dict[str, Any] | None:
        """Collective. The held-out figures after `step` updates, on rank 0 with intervals; None without such rows."""
        self.console.phase("evaluation")
        try:
            rows = self.stepper.evaluate(step)
        except NeedsRestart as failure:
            failure.step = step
            raise
        line = None if rows is None else self._note(step, self._findings(rows))
        self.console.phase("training")
        return line

    def first(self) -> dict[str, Any] | None:
        """Of a run that goes on: the figures of its first evaluation."""
        lines = read_lines(self.run.folder.heldout)
        return {name: value for name, value in lines[0].items() if name != "step"} if lines else None

    def _findings(self, rows: Evaluated) -> Findings:
        data, heldout = self.stepper.prepared.config.data, self.stepper.prepared.heldout
        assert heldout is not None
        sets = sets_of(heldout, data.heldout_names)
        if not comm.is_main():
            return Findings(figures=figures_of(rows, sets))
        # rows held out by a fraction come from the training rows' sources
        sources = data.heldout_sources or data.train_sources
        return findings(rows, sets=sets, slices=slices_of(heldout, [name for name, _ in sources]))

    def _note(self, step: int, found: Findings) -> dict[str, Any]:
        if comm.is_main():
            self.run.write(self.run.folder.heldout, {"step": step, **found.to_dict()})
            self.run.tracker.log(step, {f"heldout/{name}": value for name, value in found.figures.items()})
        return found.to_dict()

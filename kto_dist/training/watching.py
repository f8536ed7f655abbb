"""What a loop asks after each step: the rules of health, and which rows a figure came from that is no number."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kto_dist.base import agree, comm, disks
from kto_dist.base.console import Console
from kto_dist.data.audited import desirable_share
from kto_dist.record.run_folder import read_lines
from kto_dist.training.figures import is_sound
from kto_dist.training.health import Advice, Monitor
from kto_dist.training.prepare import PreparedTraining
from kto_dist.training.run import Run
from kto_dist.training.step import StepResult
from kto_dist.training.suspects import note, suspects
from kto_dist.training.trends import Figures, kept


class Watching:
    """The rules of one run, with what they need beside its metrics."""

    def __init__(self, prepared: PreparedTraining, run: Run, console: Console) -> None:
        """Collective. Raises `UserError` where a rule of the user's own cannot be had."""
        self._prepared, self._run, self._console = prepared, run, console
        # an audit counts rows by the likelier label, and a step counts probabilities
        counts_rows = prepared.objective.loss.takes == "all" and not prepared.train.is_soft
        past, said, audited = comm.broadcast(
            (
                kept(run.lines()),
                {line["rule"] for line in read_lines(run.folder.health)},
                desirable_share(run.audits) if counts_rows else None,
            )
        )
        self.monitor = Monitor(prepared.config.health, past=past, said=said, audited=audited)

    def after(self, result: StepResult, figures: Figures) -> list[Advice]:
        """Collective. What the rules say of the step, once it was told everywhere. Raises `UserError`."""
        advice = self.monitor.check(result.step, figures)
        if not is_sound(figures):
            advice = [self._with_rows(item, result) if item.rule == "finite" else item for item in advice]
        self._run.advise(result.step, advice, self._console)
        return advice

    def answered(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Collective. `lines`: of answers.jsonl so far, on rank 0. Raises `UserError`."""
        tokens = [[answer["tokens"] for answer in line["answers"]] for line in lines]
        lengths = comm.broadcast([sum(each) / len(each) for each in tokens if each])
        self._run.advise(step, self.monitor.answered(step, lengths), self._console)

    def _with_rows(self, advice: Advice, result: StepResult) -> Advice:
        found = suspects(result, self._prepared)

        def written() -> str:
            with disks.refusals(f"the rows of step {result.step}", "train.output", self._run.folder.path):
                return note(found, result, self._prepared, self._run.folder)

        rows = agree.on_main(written)
        return replace(advice, message=f"{advice.message}. {rows}")

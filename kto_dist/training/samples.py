"""A handful of held-out prompts, answered by the policy with every evaluation of a run.

In:  the policy as it is. Out: a line in answers.jsonl, a table and points in MLflow; the report shows the first answers
beside the last ones. The prompts are the same every time, and nothing of the training changes by it.

Whole weights: the ranks divide the prompts among them. ZeRO-3: all of them run the same forwards, without keys and
values kept, so that a token takes a forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.signals import Interrupted
from kto_dist.data.examples import Examples
from kto_dist.evaluation.answers import Answer, in_words, pick_prompts, repeated
from kto_dist.evaluation.generate import Decoding, Generated, extend, generate, stops_of
from kto_dist.model.loading import one_line
from kto_dist.model.memory import is_out_of_memory, release
from kto_dist.record.run_folder import read_lines
from kto_dist.training.run import Run
from kto_dist.training.stepper import Stepper

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, MemoryError)
"""What a family's own code raises where it cannot generate."""
COLUMNS = ("step", "prompt", "before", "answer", "finished", "tokens")


@dataclass
class Samples:
    """What a run asks for its answers."""

    stepper: Stepper
    run: Run
    console: Console
    rows: np.ndarray = field(init=False)
    """(P,) held-out rows whose prompts are answered."""
    lines: list[dict[str, Any]] = field(init=False)
    """Of answers.jsonl, on rank 0."""

    def __post_init__(self) -> None:
        config, heldout = self.stepper.prepared.config, self.stepper.prepared.heldout
        wanted = 0 if heldout is None else config.answers.while_training
        self.rows = np.zeros(0, np.int64) if heldout is None else pick_prompts(heldout, wanted, config.train.seed)
        self.lines = read_lines(self.run.folder.answers) if comm.is_main() else []

    def at(self, step: int, stop: Callable[[], bool] | None = None) -> None:
        """Collective. Answers after `step` updates. A family that cannot generate is told of once.

        Where `stop` becomes true on a rank this step has none: they are no part of what a run comes to.
        """
        if not self.rows.size:
            return
        heldout = self.stepper.prepared.heldout
        assert heldout is not None
        self.console.phase("answers")
        try:
            answers = self._answers(heldout, stop)
        except Interrupted:
            return
        finally:
            self.console.phase("training")
        if answers is None:
            self.rows = self.rows[:0]
        else:
            self._tell(step, [heldout.prompt_text(int(row)) for row in self.rows], answers)

    def _answers(self, heldout: Examples, stop: Callable[[], bool] | None) -> list[Answer] | None:
        """Collective. Raises `Interrupted`."""
        prepared, policy = self.stepper.prepared, self.stepper.policy
        section = prepared.config.answers
        decoding = Decoding(
            max_tokens=section.max_tokens,
            stops=stops_of(prepared.tokenizer, policy.model.lm.generation_config),
            temperature=section.temperature,
            top_p=section.top_p,
            seed=prepared.config.train.seed,
        )
        prompts = [heldout.prompt(int(row)) for row in self.rows]
        if policy.waits_in_forward:
            made: list[Generated] | None = extend(
                policy.forward, policy.model, prompts, decoding, self.stepper.memory.cutting, stop=stop
            )
        else:
            made = self._divided(prompts, decoding, stop)
        return None if made is None else in_words(prepared.tokenizer, made)

    def _divided(
        self, prompts: list[np.ndarray], decoding: Decoding, stop: Callable[[], bool] | None
    ) -> list[Generated] | None:
        """Collective. Each rank answers its share; None, and told, where one could not. Raises `Interrupted`."""
        lm, batch = self.stepper.policy.model.lm, self.stepper.prepared.config.answers.batch
        rank, ranks = comm.rank(comm.DATA), comm.size(comm.DATA)
        own: list[Generated] = []
        why, interrupted = None, False
        try:
            own = generate(lm, prompts[rank::ranks], decoding, batch=batch, stop=stop)
        except Interrupted:
            interrupted = True
        except _FAILURES as error:
            why = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}"
            error.__traceback__ = None  # its frames hold what there was no room for
        if why is not None:
            release()
        if comm.any_(interrupted):
            raise Interrupted
        shares = comm.gather((own, why))
        failures = [failure for _, failure in shares if failure is not None]
        if failures:
            self.console.warn(
                f"{type(lm).__name__} answers no prompts ({failures[0]}), and the run goes on without answers: lower "
                "answers.batch or answers.max_tokens where memory ran out; answers.while_training=0 leaves them out"
            )
            return None
        return [shares[place % ranks][0][place // ranks] for place in range(len(prompts))]

    def _tell(self, step: int, prompts: list[str], answers: list[Answer]) -> None:
        """Collective."""
        tokens = [len(answer.ids or ()) for answer in answers]
        line = {
            "step": step,
            "answers": [
                {"prompt": prompt, "answer": answer.text, "finished": answer.finished, "tokens": count}
                for prompt, answer, count in zip(prompts, answers, tokens, strict=True)
            ],
        }
        self.lines = [*(other for other in self.lines if other["step"] != step), line]
        self.run.write(self.run.folder.answers, line)
        if not comm.is_main():
            return
        figures = {
            "answers/tokens": float(np.mean(tokens)),
            "answers/finished": float(np.mean([answer.finished for answer in answers])),
            "answers/repeated": float(np.mean([repeated(answer.text) for answer in answers])),
        }
        self.run.tracker.log(step, figures)
        self.run.tracker.log_table("answers.json", COLUMNS, table_of(self.lines))


def table_of(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row an answer, by `COLUMNS`: the newest step first; `before` is the first step's answer to the same prompt."""
    first = {entry["prompt"]: entry["answer"] for entry in lines[0]["answers"]} if lines else {}
    return [
        (line["step"], entry["prompt"], first.get(entry["prompt"]), entry["answer"], entry["finished"], entry["tokens"])
        for line in reversed(lines)
        for entry in line["answers"]
    ]

"""A handful of held-out prompts, answered by the policy with every evaluation of a run, or at steps of their own.

In:  the policy as it is. Out: a line in answers.jsonl, a table and points in MLflow; the report shows the first answers
beside the last ones. The prompts are the same every time, and nothing of the training changes by it.

Whole weights: the ranks divide the prompts among them. ZeRO-3: all of them run the same forwards, without keys and
values kept, so that a token takes a forward.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kto_dist.base import agree, comm
from kto_dist.base.console import Console
from kto_dist.base.signals import Interrupted
from kto_dist.data.examples import Examples
from kto_dist.evaluation.answers import Answer, asked_of, in_words, pick_prompts, repeated
from kto_dist.evaluation.decoding import Decoding, Generated
from kto_dist.evaluation.generate import AtOnce, Tried, extend, stops_of, tried
from kto_dist.model.memory import NeedsRestart
from kto_dist.record.run_folder import read_lines
from kto_dist.training.config import Config
from kto_dist.training.figures import due
from kto_dist.training.run import Run
from kto_dist.training.stepper import Stepper

Stop = Callable[[], bool]
"""Whether a signal has come, and there is no time."""
LONG = 60.0
"""Seconds that answers may take before that is said."""
IN_TABLE = 50
"""Steps whose answers MLflow's table has."""
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
    at_once: AtOnce = field(init=False)
    """Of each rank's prompts."""

    def __post_init__(self) -> None:
        config, heldout = self.stepper.prepared.config, self.stepper.prepared.heldout
        wanted = 0 if heldout is None else config.answers.while_training
        self.rows = np.zeros(0, np.int64) if heldout is None else pick_prompts(heldout, wanted, config.train.seed)
        self.lines = read_lines(self.run.folder.answers) if comm.is_main() else []
        self.at_once = AtOnce(config.answers.batch, self.console.warn)

    def due(self, step: int) -> bool:
        """Whether prompts are answered after `step` updates."""
        config, steps = self.stepper.prepared.config, self.stepper.prepared.plan.steps
        every = config.answers.every_steps or config.evaluate.every_steps
        return bool(self.rows.size) and (step in (0, steps) or due(every, step))

    def at(self, step: int, stop: Stop | None = None) -> None:
        """Collective. Answers after `step` updates. A family that cannot generate is told of once.

        Where `stop` becomes true on a rank this step has none: they are no part of what a run comes to.
        """
        if not self.rows.size:
            return
        heldout = self.stepper.prepared.heldout
        assert heldout is not None
        self.console.phase("answers")
        started = time.monotonic()
        try:
            answers = self._answers(heldout, step, stop)
        except Interrupted:
            return
        finally:
            self.console.phase("training")
        seconds = time.monotonic() - started
        if answers is None:
            self.rows = self.rows[:0]
            return
        self._tell(step, [asked_of(heldout, int(row)) for row in self.rows], answers)
        if step == 0 and seconds > LONG:
            self.console.warn(
                f"answering {len(answers)} prompts took {seconds:,.0f} s, and comes again "
                f"{_how_often(self.stepper.prepared.config)}: answers.max_tokens and answers.while_training lower it, "
                "answers.every_steps says how often, and answers.while_training=0 leaves them out"
            )

    def _answers(self, heldout: Examples, step: int, stop: Stop | None) -> list[Answer] | None:
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
            made: list[Generated] | None = self._extended(prompts, decoding, step, stop)
        else:
            made = self._divided(prompts, decoding, stop)
        return None if made is None else in_words(prepared.tokenizer, made)

    def _extended(self, prompts: list[np.ndarray], decoding: Decoding, step: int, stop: Stop | None) -> list[Generated]:
        """Collective. All ranks together; one that runs out of memory starts the job again. Raises `Interrupted`."""
        policy, cutting, batch = self.stepper.policy, self.stepper.memory.cutting, self.at_once.prompts
        try:
            return extend(policy.forward, policy.model, prompts, decoding, cutting, batch=batch, stop=stop)
        except NeedsRestart as failure:
            failure.step = step
            raise

    def _divided(self, prompts: list[np.ndarray], decoding: Decoding, stop: Stop | None) -> list[Generated] | None:
        """Collective. Each rank answers its share; None, and told, where one could not. Raises `Interrupted`."""
        lm = self.stepper.policy.model.lm
        rank, ranks = comm.rank(comm.DATA), comm.size(comm.DATA)

        def work() -> Tried | None:
            if lm.device.type == "cuda":
                torch.cuda.set_device(lm.device)  # each thread has its own
            with suppress(Interrupted):
                return tried(lm, prompts[rank::ranks], decoding, batch=self.at_once.prompts, stop=stop)
            return None

        # a rank with fewer prompts may have to wait for longer than a collective may last
        found = agree.side_by_side(work)
        shares = [share for share in found if share is not None]
        if len(shares) < len(found):
            raise Interrupted
        if said := self.at_once.lower(min(share.batch for share in shares)):
            self.stepper.memory.halved.append(said)
        failures = [share.why for share in shares if share.why is not None]
        if failures:
            self.console.warn(
                f"{type(lm).__name__} answers no prompts ({failures[0]}), and the run goes on without answers: lower "
                "answers.max_tokens where memory ran out; answers.while_training=0 leaves them out"
            )
            return None
        return [shares[place % ranks].made[place // ranks] for place in range(len(prompts))]

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


def _how_often(config: Config) -> str:
    every = config.answers.every_steps or config.evaluate.every_steps
    return "at the end" if every is None else f"every {every:,} steps and at the end"


def table_of(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row an answer, by `COLUMNS`: the newest step first; `before` is the first step's answer to the same prompt.

    Of many steps the first and the newest, since all of the table is sent each time; answers.jsonl has all of them.
    """
    first = {entry["prompt"]: entry["answer"] for entry in lines[0]["answers"]} if lines else {}
    lines = lines if len(lines) <= IN_TABLE else [lines[0], *lines[1 - IN_TABLE :]]
    return [
        (line["step"], entry["prompt"], first.get(entry["prompt"]), entry["answer"], entry["finished"], entry["tokens"])
        for line in reversed(lines)
        for entry in line["answers"]
    ]

"""The best evaluation of a run so far, by one held-out figure, and the weights that it belongs to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kto_dist.base import agree, comm
from kto_dist.base.errors import UserError
from kto_dist.evaluation.config import better_way
from kto_dist.model import engine_files
from kto_dist.model.engines import Policy
from kto_dist.training import checkpoint
from kto_dist.training.config import Config


@dataclass
class Best:
    """Which of a run's evaluations is the best; a start that nothing beats is named and never exported."""

    name: str
    """heldout/<figure>"""
    higher: bool
    """Whether more is better."""
    patience: int | None
    """`train.stop_after`"""
    noted: list[tuple[int, float]] = field(default_factory=list)
    """(step, value), in order; that of step 0 is the model as it was."""
    lost: set[int] = field(default_factory=set)
    """Steps among them whose checkpoints are gone or were never made."""

    @classmethod
    def of(cls, config: Config) -> "Best | None":
        name = config.checkpoint.best
        if name is None:
            return None
        higher = better_way(name, config.data.heldout_names) == "higher"
        return cls(name=name, higher=higher, patience=config.train.stop_after)

    def remember(self, lines: Iterable[Mapping[str, Any]], saved: set[int]) -> None:
        """What a run that goes on has evaluated before, and of which steps it has checkpoints."""
        # one that was looked at twice has all of its rows in the last line
        for step, line in {line["step"]: line for line in lines}.items():
            figures = line.get("of_part", line)
            if self._value(figures) is not None:  # a log of the past, which may be damaged, does not stop a run
                self.note(step, figures)
        self.lost |= {step for step, _ in self.noted} - saved

    def note(self, step: int, figures: Mapping[str, Any]) -> None:
        """Raises `UserError` where the figure is not among them."""
        value = self._value(figures)
        if value is None:
            raise UserError(
                f"checkpoint.best ({self.name}) has no value on these held-out rows: it may need rows of both classes, "
                "a set of that name, or more evaluate.tokens"
            )
        self.noted.append((step, float(value)))

    @property
    def step(self) -> int | None:
        """After which the policy was at its best; None before its first evaluation."""
        trained = [(step, value) for step, value in self.noted if step and step not in self.lost]
        return self._first_of_the_best(trained)[0] if trained else None

    @property
    def value(self) -> float | None:
        return next((value for step, value in self.noted if step == self.step), None)

    @property
    def worse_than_the_start(self) -> bool:
        """Whether no evaluation was better than the one before the first update."""
        return bool(self.noted) and self.step is not None and self._first_of_the_best(self.noted)[0] == 0

    @property
    def waited(self) -> int:
        """Evaluations since the best one, the start being one."""
        if not self.noted:
            return 0
        return len(self.noted) - 1 - self.noted.index(self._first_of_the_best(self.noted))

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def to_dict(self) -> dict[str, Any]:
        """For the summary."""
        return {"figure": self.name, "step": self.step, "value": self.value}

    def _value(self, figures: Mapping[str, Any]) -> Any:
        return figures.get(self.name.removeprefix("heldout/"))

    def _first_of_the_best(self, noted: list[tuple[int, float]]) -> tuple[int, float]:
        # `max` and `min` keep the first of equals: as good is not better
        return (max if self.higher else min)(noted, key=lambda each: each[1])


def weights_of(
    policy: Policy, saved: Path, dtype: torch.dtype, loaded: Callable[[], None] = lambda: None
) -> dict[str, Tensor] | None:
    """Collective. What is trained, of a checkpoint of the run on rank 0, None elsewhere; the policy is done with.

    `loaded` is called once the policy has these weights, which it gets on the checkpoint's number of ranks alone.
    """
    state = checkpoint.read_state(saved)
    if state.world_size == comm.world_size():
        checkpoint.load(policy, saved, None)
        loaded()
        return policy.weights()
    # the engine was not made for files of another number of ranks; these lie on a disk that all share
    found: list[dict[str, Tensor]] = []

    def read() -> None:
        stage = state.zero_stage
        found.append(engine_files.consolidated(saved.parent, saved.name, stage, dtype, adapted=policy.adapted))

    agree.on_main(read)
    return found[0] if found else None

"""A run's folder: the files that a run writes line by line, and what a resumed run keeps of them.

    config.yaml  metrics.jsonl  heldout.jsonl  heldout-rows.npz  answers.jsonl  checkpoints/  export/  merged/
    summary.json  report.html

Rank 0 alone writes here; checkpoints have a module of their own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.base.files import write_whole


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`train.output`, and the names of what lies in it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def heldout(self) -> Path:
        """One line an evaluation."""
        return self.path / "heldout.jsonl"

    @property
    def heldout_rows(self) -> Path:
        """Log-probs of the held-out rows at the last evaluation."""
        return self.path / "heldout-rows.npz"

    @property
    def answers(self) -> Path:
        """One line an evaluation: answers to a handful of held-out prompts; absent where none are asked for."""
        return self.path / "answers.jsonl"

    @property
    def health(self) -> Path:
        """One line a message of a rule of health; absent where none has spoken."""
        return self.path / "health.jsonl"

    @property
    def bad_rows(self) -> Path:
        """One line a row behind a figure that was no number; absent where there was none."""
        return self.path / "bad-rows.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def export(self) -> Path:
        """The model, or the adapter where one was trained."""
        return self.path / "export"

    @property
    def merged(self) -> Path:
        """The model with its adapter merged in, where `adapter.merged` asks for it."""
        return self.path / "merged"

    def begin(self, config: str, *, step: int, last: bool) -> list[str]:
        """Writes the config, and drops what a run wrote after the checkpoint of `step` that it goes on from.

        `last`: no step is left, so the last evaluation is made again, from the same weights. Returns what was lost
        because it could not be read: a log of the past does not stop a run. Raises `OSError`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, config.encode())
        lost = [_keep_until(self.metrics, step), _keep_until(self.heldout, step - 1 if last else step)]
        if self.answers.exists():
            lost.append(_keep_until(self.answers, step - 1 if last else step, _holds_answers))
        if self.health.exists():
            lost.append(_keep_until(self.health, step, _is_a_message))
        if self.bad_rows.exists():
            lost.append(_keep_until(self.bad_rows, step))
        return [text for text in lost if text]


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole, which a line that a crash cut short is not; none where there is no file."""
    return [line for line in map(_parsed, _texts(path)) if line is not None]


def _texts(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _holds_answers(line: dict[str, Any]) -> bool:
    wanted, answers = {"prompt", "answer", "finished", "tokens"}, line.get("answers")
    return isinstance(answers, list) and all(isinstance(each, dict) and wanted <= each.keys() for each in answers)


def _is_a_message(line: dict[str, Any]) -> bool:
    return {"rule", "stop", "message"} <= line.keys()


def _keep_until(path: Path, step: int, is_whole: Callable[[dict[str, Any]], bool] = bool) -> str | None:
    """What is said where lines of kept steps could not be read. `is_whole`: whether a line has what is read of it: one
    in which a bit of a name is another one can still be read as JSON."""
    parsed = [_parsed(text) for text in _texts(path)]
    lines = [line if line is not None and is_whole(line) else None for line in parsed]
    kept = [line for line in lines if line is not None and step and line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    # the last one may be what a crash cut short, after the checkpoint
    broken = sum(line is None for line in lines[:-1])
    return f"{broken:,} lines of {path} could not be read, and are left out" if broken and step else None

"""A run's folder: the files that a run writes line by line, and what a resumed run keeps of them.

    config.yaml  metrics.jsonl  heldout.jsonl  checkpoints/  export/  summary.json  report.html

Rank 0 alone writes here; checkpoints have a module of their own.
"""

import json
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
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def begin(self, config: str, *, step: int, last: bool) -> None:
        """Writes the config, and drops what a run wrote after the checkpoint of `step` that it goes on from.

        `last`: no step is left, so the last evaluation is made again, from the same weights. Raises `OSError`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, config.encode())
        _keep_until(self.metrics, step)
        _keep_until(self.heldout, step - 1 if last else step)


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a crash cut short
            break
    return lines


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read_lines(path) if step and line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

"""What a run tells while it goes on: to MLflow, or to nobody, so that the loop never asks which.

Only rank 0 tracks; other ranks, a run with `tracking.enabled=false` and one whose MLflow cannot be reached hold a
`NullTracker`. Trackers are opened by `tracking.start`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(ABC):
    """One run's record. Its methods return soon, and never raise because of MLflow."""

    run_id: str | None
    """Of the MLflow run; a tracker that cannot reach it keeps the id, so that a later resume finds it."""
    uri: str | None
    """Where the run is, without a password; None where nothing is tracked."""

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of a step."""

    @abstractmethod
    def tag(self, tags: dict[str, str]) -> None:
        """What is true of the run from now on; a later value of a name takes the place of the one before."""

    @abstractmethod
    def log_dataset(
        self,
        name: str,
        context: str,
        digest: str,
        counts: dict[str, int],
        source: str,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Which rows a run read, what for (`context`: training, heldout), and rows per class."""

    @abstractmethod
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file, kept in `folder`; or a folder's content, kept as `folder` (default: its own name)."""

    @abstractmethod
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of plain values, in place of an earlier one of this name (`<word>.json`)."""

    @abstractmethod
    def log_model(self, export_dir: str | Path) -> None:
        """The exported model, where `tracking.log_model` or `.register` asks for it."""

    @abstractmethod
    def adopt(self, children: list[str]) -> None:
        """Ids of runs that have ended: they are shown below this one from now on."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Closes the run. A second call does nothing."""


class NullTracker(Tracker):
    """Tracks nothing."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id, self.uri = run_id, None

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def tag(self, tags: dict[str, str]) -> None: ...

    def log_dataset(
        self,
        name: str,
        context: str,
        digest: str,
        counts: dict[str, int],
        source: str,
        tags: dict[str, str] | None = None,
    ) -> None: ...

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None: ...

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def log_model(self, export_dir: str | Path) -> None: ...

    def adopt(self, children: list[str]) -> None: ...

    def finish(self, status: Status) -> None: ...

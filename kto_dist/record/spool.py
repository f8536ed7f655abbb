"""What MLflow is still to be told: operations in order, in the run's folder until they have arrived.

    <run>/.mlflow/spool.jsonl   an operation a line; the first ones have arrived
    <run>/.mlflow/state.json    which MLflow run, and how many have

An operation keeps the time of its making, so that one that is sent twice, because the answer to the first was lost, is
the same point to MLflow. A run that goes on from a checkpoint does some steps again: points of theirs that MLflow has
are not sent once more, and those that it lacks are made anew.
"""

import contextlib
import errno
import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kto_dist.base.files import write_whole

Operation = dict[str, Any]
"""`kind`, and what that kind needs; `kind: metrics` has step, time (ms) and values by name."""

FOLDER = ".mlflow"


class Spool:
    """Of one run; without a folder it lives in memory, and ends with the process."""

    def __init__(self, run: Path | None, warn: Callable[[str], None] = lambda text: None) -> None:
        """`run`: the run's folder. Nothing is made in it until there is something to keep."""
        self._folder = None if run is None else run / FOLDER
        self._warn = warn
        # one thread adds, another one sends; a signal's handler adds in the middle of either
        self._lock = threading.RLock()
        self._sent: list[Operation] = []
        self._waiting: list[Operation] = []
        self._again: set[tuple[int, str]] = set()
        state = self._state()
        self.key: str = state.get("key") or uuid.uuid4().hex
        """Of the MLflow run to be made: it is looked for before it is made, since an answer may have been lost."""
        self.run_id: str | None = state.get("run_id")
        self.status: str | None = state.get("status")
        """That MLflow was told at the end; None while the run goes on."""
        self.uri: str | None = state.get("uri")
        operations = self._read()
        done = min(int(state.get("sent", 0)), len(operations))
        self._sent, self._waiting = (
            [op for op in part if op is not None] for part in (operations[:done], operations[done:])
        )
        self._count = done

    @property
    def folder(self) -> Path | None:
        return self._folder

    def path_of(self, file: Path) -> str:
        """As an operation names it: within the run's folder by its name there, which may be another one later."""
        path = file.absolute()
        run = None if self._folder is None else self._folder.parent.absolute()
        return str(path.relative_to(run)) if run is not None and path.is_relative_to(run) else str(path)

    def place_of(self, name: str) -> Path:
        """Of a file that an operation names."""
        return Path(name) if self._folder is None else self._folder.parent.absolute() / name

    @property
    def waiting(self) -> list[Operation]:
        with self._lock:
            return list(self._waiting)

    def begin(self, *, step: int, same: bool) -> None:
        """A process starts, from the checkpoint after `step` steps; `same`: with settings that give the same values.

        From step 0 it is another MLflow run, and nothing of the one before is told any more but that it has ended.
        """
        with self._lock:
            if step == 0:
                ended = [] if self.run_id is None or self.status else [{"kind": "close", "run": self.run_id}]
                self._sent, self._waiting, self._count = [], list(ended), 0
                self.key, self.run_id, self.status = uuid.uuid4().hex, None, None
            else:
                # all of it: the next checkpoint that a run goes on from may be an older one
                self._sent = [op for op in self._sent if same or not _made_anew(op, step)]
                self._waiting = [op for op in self._waiting if not _made_anew(op, step)]
                self._count = len(self._sent)
                self._again = {
                    (op["step"], name)
                    for op in [*self._sent, *self._waiting]
                    if _steps_from(op, step)
                    for name in op["values"]
                }
            if self._folder is not None and (self._sent or self._waiting or self._folder.exists()):
                self._try(self._rewrite)
            self._sent = []  # they lie in the file

    def add(self, operation: Operation) -> None:
        """At the end. Points that MLflow has, or is going to have, are left out."""
        with self._lock:
            if operation["kind"] == "metrics" and self._again:
                step = operation["step"]
                values = {key: value for key, value in operation["values"].items() if (step, key) not in self._again}
                operation = {**operation, "values": values}
                if not values:
                    return
            self._waiting.append(operation)
            self._try(lambda: self._append(operation))

    def first(self, values: int) -> list[Operation]:
        """What is to be sent next: one operation, or points that hold so many values together."""
        with self._lock:
            found: list[Operation] = []
            room = values
            for operation in self._waiting:
                if operation["kind"] != "metrics":
                    return found or [operation]
                room -= len(operation["values"])
                if found and room < 0:
                    break
                found.append(operation)
            return found

    def arrived(self, count: int) -> None:
        """The first ones that waited have."""
        with self._lock:
            del self._waiting[:count]
            self._count += count
            self.keep()

    def keep(self) -> None:
        """Writes down which MLflow run it is, and what it has."""
        content = {
            "key": self.key,
            "run_id": self.run_id,
            "uri": self.uri,
            "status": self.status,
            "sent": self._count,
        }
        folder = self._folder
        if folder is not None:
            self._try(lambda: write_whole(_made(folder) / "state.json", json.dumps(content, indent=1).encode()))

    def empty(self) -> None:
        """Of a run that has ended, and of which everything has arrived: nothing has to be known of it any more."""
        with self._lock:
            if self._folder is not None and not self._waiting:
                self._count, self._sent = 0, []
                with contextlib.suppress(OSError):
                    (self._folder / "spool.jsonl").unlink()
                self.keep()

    def _append(self, operation: Operation) -> None:
        if self._folder is None:
            return
        descriptor = os.open(_made(self._folder) / "spool.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = (json.dumps(operation) + "\n").encode()
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def _rewrite(self) -> None:
        """The file holds what is in memory. The state comes first: lines that it does not count are sent again."""
        assert self._folder is not None
        count, self._count = self._count, 0
        self.keep()
        lines = "".join(json.dumps(operation) + "\n" for operation in [*self._sent, *self._waiting])
        write_whole(_made(self._folder) / "spool.jsonl", lines.encode())
        self._count = count
        self.keep()

    def _read(self) -> list[Operation | None]:
        """A line each; None for one that is damaged, as the last one may be that a crash cut short."""
        found: list[Operation | None] = []
        if self._folder is None:
            return found
        path = self._folder / "spool.jsonl"
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            found = [_parsed(line) for line in file]
        if lost := sum(operation is None for operation in found[:-1]):
            self._warn(f"{lost:,} lines of {path} could not be read: what they say, MLflow may lack")
        return found

    def _state(self) -> dict[str, Any]:
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / "state.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _try(self, write: Callable[[], None]) -> None:
        """The run goes on where its folder does not take this; it stops by itself where nothing else fits either."""
        try:
            write()
        except OSError as error:
            self._warn(f"what MLflow is to get cannot be kept in {self._folder}: {error}; it waits in memory")
            self._folder = None


_NEEDED = {
    "open": {"experiment", "artifacts", "name", "params", "tags"},
    "metrics": {"step", "time", "values"},
    "tags": {"tags"},
    "dataset": {"name", "context", "digest", "counts", "source", "tags"},
    "artifact": {"path", "folder"},
    "table": {"name", "table"},
    "model": {"path", "name", "register", "step"},
    "adopt": {"children"},
    "status": {"status"},
    "close": {"run"},
}
"""What is read of each kind. With a flipped bit in a name, a line is JSON all the same."""


def _parsed(line: str) -> Operation | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    needed = _NEEDED.get(str(found.get("kind"))) if isinstance(found, dict) else None
    return found if needed is not None and needed <= found.keys() else None


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _steps_from(operation: Operation, step: int) -> bool:
    """Points of training at this step (whose evaluation may be made again) or a later one."""
    return operation["kind"] == "metrics" and operation["step"] >= step and not _of_reference(operation)


def _made_anew(operation: Operation, step: int) -> bool:
    if operation["kind"] == "metrics":
        return bool(operation["step"] > step) and not _of_reference(operation)
    return bool(operation["kind"] == "status")


def _of_reference(operation: Operation) -> bool:
    """Its step counts pairs."""
    return all(name.startswith("reference/") for name in operation["values"])

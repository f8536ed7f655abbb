"""Checkpoints that are whole or absent, checked byte by byte, and found again by the run that wrote them.

    <output>/checkpoints/step-00000040/   DeepSpeed's files, rng-rank-*.safetensors, state.json, and manifest.json,
                                          which lists every file with its checksum

A checkpoint is written below a hidden name, flushed to disk, and renamed when every rank is done, so one that a crash
cut short is never seen; nor is one that a thread still writes while training goes on. One that is found is read whole
and compared with its manifest; where a byte is another one, the checkpoint before it counts. On hosts without a shared
file system each keeps its own part, and the newest step that all of them have is resumed; a host that has none, where
others do, is named.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kto_dist.base import agree, comm, disks, hosts
from kto_dist.base.errors import UserError
from kto_dist.base.files import TEMPORARY, flush, write_whole
from kto_dist.model import engine_files
from kto_dist.model.engine_io import PutOff
from kto_dist.model.engines import Policy
from kto_dist.objective.config import ObjectiveConfig
from kto_dist.training import manifest, random_states, scattered

STATE = "state.json"
_PIECE = 64 * 2**20
"""Bytes that are written before it is asked whether they are still wanted."""
_NAME = re.compile(r"step-\d{8,}")
NO_ADAPTER: dict[str, Any] = {
    "model.quantization": "none",
    "adapter.type": "none",
    **{f"adapter.{name}": None for name in ("rank", "alpha", "targets", "start")},
}
"""What an older version, which knew no adapters, did not note."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a resumed run must know beside the engine's own states."""

    step: int
    """Optimizer steps done."""
    world_size: int
    zero_stage: int
    identity: dict[str, Any]
    """What decides the trajectory: another value means another run."""
    mlflow_run: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    """Others that the steps until here were made with; changed ones are applied, and said."""


def folder(output: str | Path) -> Path:
    return Path(output) / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


class Saving:
    """A checkpoint on its way to the disk."""

    def __init__(
        self,
        policy: Policy,
        output: str | Path,
        state: State,
        keep: int,
        best: int | None = None,
        *,
        background: bool = False,
    ):
        """Collective. Beside the `keep` newest checkpoints, that of step `best` is going to stay.

        `background`: this rank's part is copied to memory, and a thread writes it, so that the policy may go on at
        once. Raises `UserError` where a disk does not take it.
        """
        self.step, self._keep, self._best = state.step, keep, best
        self._began = time.monotonic()
        self.seconds = 0.0
        """That it has taken: to copy, to write and to commit, but not to wait until it was asked for."""
        self._root = folder(output)
        self._name = name_of(state.step)
        self._partial = self._root / f".partial-{self._name}"
        self._written: dict[str, manifest.Entry] = {}
        self._given_up = threading.Event()
        self._failed: Exception | None = None
        put_off: list[PutOff] = []
        partial = self._partial

        def describe() -> None:
            write_whole(partial / STATE, json.dumps(asdict(state), indent=1).encode())

        with self._refusals():
            agree.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            agree.once_per_host(lambda: partial.mkdir(parents=True, exist_ok=True))
            # One rank of those that share a folder: on a network file system another host's view of what it has done
            # may be half a minute old, and it would do it again.
            self._first = first = manifest.neighbours(self._root)[0] == comm.rank()
            first_of = None if state.zero_stage == 3 else first
            policy.save(self._root, partial.name, first=first_of, put_off=put_off if background else None)
            agree.side_by_side(lambda: random_states.save(partial / f"rng-rank-{comm.rank()}.safetensors"))
            agree.side_by_side(lambda: describe() if first else None)
        self._thread = threading.Thread(target=self._write, args=(put_off,), daemon=True, name="checkpoint")
        self._thread.start()

    def is_written(self) -> bool:
        """Collective. Whether all ranks have, so that `commit` waits for none."""
        return not comm.any_(self._thread.is_alive())

    def commit(self) -> Path:
        """Collective. Waits for what is still to be written; returns the finished checkpoint's folder.

        Until then there is none: a run that is killed goes on from the one before. Raises `UserError` where a disk does
        not take it.
        """
        with self._refusals():
            made = agree.side_by_side(self._wait)
            began = time.monotonic()
            manifest.write(self._partial, made)
            agree.side_by_side(lambda: self._finish() if self._first else None)
        self.seconds += time.monotonic() - began
        return self._root / self._name

    def give_up(self) -> None:
        """Of a run that ends otherwise: when this returns, nothing more is written. What there is of it is cleared by
        the next start."""
        self._given_up.set()
        self._thread.join()

    def _refusals(self) -> AbstractContextManager[None]:
        return disks.refusals(f"the checkpoint of step {self.step}", "train.output", self._root)

    def _write(self, files: list[PutOff]) -> None:
        try:
            while files:
                file = files.pop()  # its memory is free again when it is written
                with file.path.open("wb") as disk:
                    for start in range(0, len(file.content), _PIECE):
                        if self._given_up.is_set():
                            return
                        disk.write(file.content[start : start + _PIECE])
                    disk.flush()
                    os.fsync(disk.fileno())
                entry = manifest.Entry(size=len(file.content), sha256=hashlib.sha256(file.content).hexdigest())
                self._written[str(file.path.relative_to(self._partial))] = entry
        except Exception as error:  # raised on all ranks by `commit`
            self._failed = error
        self.seconds = time.monotonic() - self._began

    def _wait(self) -> dict[str, manifest.Entry]:
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._written

    def _finish(self) -> None:
        root, name = self._root, self._name
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(self._partial, root / name)
        flush(root)
        # what lies beyond was passed over, as damaged or not on all hosts, and is done anew
        beyond = [old for old in _names(root) if _number(old) > self.step]
        known = [old for old in _names(root) if _number(old) <= self.step]
        for old in [*beyond, *known[self._keep :]]:
            if self._best is None or old != name_of(self._best):
                # one that is no longer needed may stay where it is being read; a later one would be gone on from
                shutil.rmtree(root / old, ignore_errors=old in known)


def save(policy: Policy, output: str | Path, state: State, keep: int, best: int | None = None) -> Path:
    """Collective. `Saving`, at once."""
    return Saving(policy, output, state, keep, best).commit()


def find(output: str | Path, warn: Callable[[str], None]) -> Path | None:
    """Collective. The newest checkpoint that is whole on every host, to the last byte.

    Raises `UserError` where hosts have checkpoints, and none in common.
    """
    root = folder(output)
    everyone = comm.gather(_names(root) if comm.local_rank() == 0 else None)
    seen = {rank: set(names) for rank, names in enumerate(everyone) if names is not None}
    common, newest = set.intersection(*seen.values()), max(set.union(*seen.values()), key=_number, default=None)
    lack = [rank for rank, names in seen.items() if newest is not None and newest not in names]
    if lack:
        by_rank = hosts.by_rank()
        _refuse_lost(seen, common, by_rank, output)
        warn(
            f"checkpoint {root / str(newest)} is not on {hosts.named(lack, by_rank)}, and is passed over: the newest "
            "that all hosts have counts"
        )
    for name in sorted(common, key=_number, reverse=True):
        wrong = damage(root / name)
        if not wrong:
            return root / name
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        warn(f"checkpoint {root / name} is damaged: {wrong[0]}{more}; it is passed over")
    return None


def _refuse_lost(seen: dict[int, set[str]], common: set[str], by_rank: list[hosts.Host], output: str | Path) -> None:
    """Raises `UserError` where some hosts have checkpoints, and none that all have."""
    if common:
        return
    have = ", ".join(
        f"{hosts.named([rank], by_rank)}: {', '.join(sorted(names))}" for rank, names in seen.items() if names
    )
    empty = [rank for rank, names in seen.items() if not names]
    lost = f"{hosts.named(empty, by_rank)} has none" if empty else "they have none in common"
    raise UserError(
        f"train.output ({output}) has checkpoints on some hosts, each its own part ({have}), and {lost}: "
        "bring back the folder of that host or its disk, or delete the folder on every host to start from the beginning"
    )


def damage(checkpoint: Path) -> list[str]:
    """Collective. What is wrong with it, the same on every rank; empty where nothing is."""
    if not agree.on_main(lambda: _is_older(checkpoint)):
        return manifest.damage(checkpoint)
    return agree.on_main(lambda: _damage_of_older(checkpoint))


def read_state(checkpoint: Path) -> State:
    """Of a checkpoint that is whole."""
    content = json.loads((checkpoint / STATE).read_text())
    content.pop("files", None)
    state = State(**content)
    return replace(state, identity=_current(state.identity))


def _current(identity: dict[str, Any]) -> dict[str, Any]:
    """An older version called the section `kto`, and had no setting that was not there to be noted."""
    identity = {**NO_ADAPTER, **identity}
    older = {key: value for key, value in identity.items() if key.startswith("kto.")}
    if not older:
        return identity
    defaults = ObjectiveConfig().model_dump(mode="json", exclude={"router_loss"})
    noted = {key.replace("kto.", "objective.", 1): value for key, value in older.items()}
    return {
        **{key: value for key, value in identity.items() if key not in older},
        **{f"objective.{key}": value for key, value in defaults.items()},
        **noted,
    }


def load(policy: Policy, checkpoint: Path, universal: Path | None) -> None:
    """Collective. Restores weights, optimizer and random states."""
    source = universal or checkpoint
    engine_files.load(policy, source.parent, source.name)
    states = checkpoint / f"rng-rank-{comm.rank()}.safetensors"

    def restore() -> None:
        if states.exists():
            random_states.restore(states)
        elif (older := states.with_suffix(".pt")).exists():
            random_states.restore_older(older)

    agree.together(restore)


def to_universal(checkpoint: Path, found: State) -> Path | None:
    """Collective. Re-cuts a checkpoint that another world size wrote; None where that is not needed."""
    if found.world_size == comm.world_size() or found.zero_stage == 0:
        return None
    target = checkpoint.with_name(f".universal-{checkpoint.name}")
    whole = checkpoint.with_name(f".whole-{checkpoint.name}")
    apart = len(manifest.neighbours(checkpoint.parent)) < comm.world_size()

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        source = whole if apart else checkpoint
        gone = [rank for rank in range(found.world_size) if not (source / f"rng-rank-{rank}.safetensors").exists()]
        if gone:
            raise UserError(
                f"{checkpoint} was written by {found.world_size} ranks, and the parts of ranks "
                f"{', '.join(map(str, gone))} lie on none of this job's hosts: start on all of the hosts that wrote "
                "it, or copy its files here"
            )
        if wrong := engine_files.recut(source, target):
            raise UserError(
                f"{checkpoint} was written by {found.world_size} ranks and could not be re-cut for "
                f"{comm.world_size()}: {wrong}; resume with {found.world_size} ranks"
            )

    if apart:
        scattered.bring_together(checkpoint, whole)
    agree.on_main(convert)
    if apart:
        agree.once_per_host(lambda: shutil.rmtree(whole, ignore_errors=True))
        scattered.hand_out(target)
    return target


def clear(output: str | Path) -> None:
    """Rank 0, of a folder that no run is at work in. Removes what killed runs have left half-written."""
    root = Path(output)
    for path in [*root.glob(".partial-*"), *_half_written(folder(root))]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*root.glob(".*"), *folder(root).glob(".*")]:
        if TEMPORARY.fullmatch(path.name) or path.name.startswith((".done-", ".seen-")):
            path.unlink(missing_ok=True)


def _half_written(root: Path) -> list[Path]:
    return [path for name in (".partial-*", ".universal-*", ".whole-*") for path in root.glob(name)]


def remove(output: str | Path) -> None:
    """All checkpoints of a run, and their folder unless somebody else keeps something there."""
    root = folder(output)
    for path in [*(root / name for name in _names(root)), *_half_written(root)]:
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def steps(output: str | Path) -> set[int]:
    """Of the checkpoints that are there, whole or not."""
    return {_number(name) for name in _names(folder(output))}


def _names(root: Path) -> list[str]:
    """Of what was finished as a checkpoint, whole or not by now, newest first. A copy under a name of its own is its
    owner's: no run goes on from it, and none removes it."""
    found = (path.name for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=_number, reverse=True)


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))


def _is_older(checkpoint: Path) -> bool:
    """Whether a version wrote it that knew sizes, and no checksums."""
    return not (checkpoint / manifest.NAME).exists() and b'"files"' in _bytes(checkpoint / STATE)


def _damage_of_older(checkpoint: Path) -> list[str]:
    try:
        files = json.loads((checkpoint / STATE).read_text())["files"]
        read_state(checkpoint)
        return [name for name, size in files.items() if (checkpoint / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{STATE} or a file that it names cannot be read: {error}"]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

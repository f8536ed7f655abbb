"""What `kto-dist evaluate` was asked for: which model, against which reference, on which rows.

In:  the words of the command line. Out: `Judged`, a config that is resolved and checked; no weights are touched.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.base.class_weights import class_weights
from kto_dist.base.config import build, override
from kto_dist.base.errors import UserError
from kto_dist.model.adapter_files import base_of, is_adapter
from kto_dist.model.config import check_model_path
from kto_dist.record.run_folder import RunFolder
from kto_dist.training.config import Config

_NAMED = re.compile(r"(\w[\w .-]*)=(.+)", re.DOTALL)
_OF_STEPS = (("checkpoint", "best"), ("train", "stop_after"), ("answers", "every_steps"))
"""Settings of a run's steps, which ask for `data.heldout`: here those rows stand in the place of the training rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The words of the command line."""

    target: str
    """A run's folder, or a model's: a path or a hub name."""
    data: tuple[str, ...] = ()
    """FILE or NAME=FILE; none: the held-out rows of the run."""
    reference: str | None = None
    """A model; None: that of the run."""
    against: str | None = None
    """Another model or run, on the same rows."""
    output: str | None = None
    """The JSON file; None: evaluation.json in the run's folder, or here."""
    overrides: tuple[str, ...] = ()
    """section.key=value of the run's config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A model, and the adapter that it has."""

    path: str
    """A folder, or a hub name."""
    gguf_file: str | None = None
    adapter: str | None = None
    """Its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What is going to be evaluated."""

    config: Config
    """The run's, with the model, its reference and the rows in their places: those of `data.train`, or what is held out
    of them where `data.heldout` is a fraction."""
    against: Named | None
    """The other model."""
    adapter: str | None
    """The folder of the model's adapter."""
    reference_adapter: str | None
    """The folder of the reference's."""
    sets: tuple[str, ...]
    """What the sets of rows are called; () where there is one."""
    weights: tuple[float, float]
    """(undesirable, desirable) loss weights of the classes."""
    output: Path


def resolve(request: Request) -> Judged:
    """Raises `UserError`."""
    own = _run_of(request.target)
    run = own or (None if request.against is None else _run_of(request.against))
    tree: dict[str, dict[str, Any]] = {"model": {"path": request.target}, "data": {"train": "none"}}
    if run is not None:
        tree = Config.load(run.config).model_dump(mode="json", by_alias=True)
    override(tree, request.overrides, Config)

    start, reference = dict(tree["model"]), tree.setdefault("reference", {})
    began = None if reference.get("path") else (tree.get("adapter") or {}).get("start")
    if request.reference:
        given = model_of(request.reference, runs=False)
        began = given.adapter
        reference |= {"path": given.path, "gguf_file": given.gguf_file}
    elif not reference.get("path") and run is not None:
        reference |= {key: start[key] for key in ("path", "gguf_file", "trust_remote_code")}
    elif not reference.get("path"):
        raise UserError(
            f"{request.target} {not_a_run(request.target)}, so its reference is not known, and figures compare a model "
            "with its reference: give --reference MODEL"
        )
    model = model_of(request.target)
    if model.path != start["path"]:
        tree["model"] |= {"path": model.path, "gguf_file": model.gguf_file}
    sets = _place_rows(tree["data"], request, run)
    for section, name in _OF_STEPS:
        tree.get(section, {}).pop(name, None)
    config = build(tree, kind=Config)
    against = None if request.against is None else model_of(request.against)
    models = {
        "the model": model.path,
        "the reference": str(config.reference.path),
        "--against": None if against is None else against.path,
    }
    for name, place in models.items():
        if place is not None:
            check_model_path(name, place)
    return Judged(
        config=config,
        against=against,
        adapter=model.adapter,
        reference_adapter=began,
        sets=sets,
        weights=_weights(config, run),
        output=Path(request.output) if request.output else (own.path if own else Path()) / "evaluation.json",
    )


def model_of(target: str, *, runs: bool = True) -> Named:
    """The model that a run, or the folder or hub name of a model or an adapter, stands for. Raises `UserError`."""
    run = _run_of(target) if runs else None
    if run is None:
        return Named(path=base_of(Path(target)), adapter=target) if is_adapter(target) else Named(path=target)
    if not run.export.exists():
        raise UserError(
            f"{target} has no {run.export.name}/: the run goes on, or was stopped; `kto-dist export {target}` writes "
            "the model of its newest checkpoint"
        )
    if not is_adapter(run.export):
        return Named(path=str(run.export))
    base = Config.load(run.config).model
    return Named(path=base.path, gguf_file=base.gguf_file, adapter=str(run.export))


def not_a_run(target: str) -> str:
    """Of a name that is no run's folder, for a message."""
    return "is no run's folder" if Path(target).exists() else "is no folder here"


def _run_of(target: str) -> RunFolder | None:
    folder = RunFolder(Path(target))
    return folder if folder.config.is_file() else None


def _place_rows(data: dict[str, Any], request: Request, run: RunFolder | None) -> tuple[str, ...]:
    """Puts the rows in place of the training rows, but for those that are held out by a fraction; returns the sets."""
    if request.data:
        named = _named(request.data)
        data |= {"train": dict(named), "heldout": None}
        return tuple(name for name, _ in named) if len(named) > 1 else ()
    held = data.get("heldout")
    if held is None:
        what = f"{request.target} {not_a_run(request.target)}" if run is None else f"{run.path} holds out no rows"
        raise UserError(f"{what}: say which rows with --data FILE (several sets: --data NAME=FILE --data NAME=FILE)")
    if isinstance(held, float):
        return ()
    data |= {"train": held, "heldout": None}
    return tuple(held) if isinstance(held, dict) and len(held) > 1 else ()


def _named(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of each file; without a name it is called as the file is."""
    found: list[tuple[str, str]] = []
    for word in given:
        match = None if Path(word).exists() else _NAMED.fullmatch(word)
        name, path = match.groups() if match else (re.sub(r"[^\w .-]", "_", Path(word).stem).lstrip(" .-"), word)
        if name in dict(found):
            raise UserError(f"--data {word}: two sets are called {name}; give names, as in --data fresh={path}")
        found.append((name or f"set {len(found) + 1}", path))
    return found


def _weights(config: Config, run: RunFolder | None) -> tuple[float, float]:
    """As the run had them; where that is not known, what stands in the config, and 1 for `auto`."""
    if run is not None:
        try:
            known = json.loads(run.summary.read_text(encoding="utf-8"))["data"]["class_weights"]
            return float(known["undesirable"]), float(known["desirable"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return class_weights(1.0, 1.0, up=config.objective.desirable_weight, down=config.objective.undesirable_weight)

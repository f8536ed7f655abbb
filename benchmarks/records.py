"""The files of results: what each says of itself, what it replaced, and whether its code has changed since."""

import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import machine

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {
    "kernels": ("kernels/kto_kernels",),
    "training": tuple(
        f"kto_dist/{wing}" for wing in ("base", "data", "store", "model", "objective", "reference", "training")
    ),
    "feedback": ("kto_dist/feedback",),
}
"""Folders of the code that results depend on."""


def digests() -> dict[str, str]:
    """Of the code itself, since a copy on another machine may have no history."""
    found = {}
    for part, folders in MEASURED.items():
        digest = hashlib.sha256()
        for folder in folders:
            for file in sorted((ROOT / folder).rglob("*.py")):
                digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes())
        found[part] = digest.hexdigest()[:16]
    return found


def commit() -> str | None:
    """Of the checkout, or what the variable COMMIT says; "+" after it: files are changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        found = git("rev-parse", "HEAD")
        return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if found else None
    except FileNotFoundError:
        return None


def code() -> dict[str, Any]:
    """Which code was measured."""
    return {"commit": commit(), "digests": digests()}


def frame(benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "benchmark": benchmark,
        "device": machine.device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "code": code(),
        "versions": machine.versions(),
        "settings": settings,
    }


def started(file: Path | None, fresh: dict[str, Any]) -> dict[str, Any]:
    """What an earlier start has left in a file, or `fresh`. Raises `ClickException` for results of other settings."""
    if file is None or not file.exists():
        return fresh
    old: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if old["settings"] != (settings := fresh["settings"]):
        different = sorted(key for key in settings if old["settings"].get(key) != settings[key])
        raise click.ClickException(f"{file} has runs with another {', '.join(different)}: give another --json")
    return old


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What of a benchmark's results is compared with those before."""

    keys: tuple[str, ...]
    """Fields that name a line; (): the file is one."""
    value: str
    """Its field, `outer/inner` for one within another."""
    higher_is_better: bool
    code: str
    """The part of MEASURED that it measures."""


COMPARED = {
    "throughput": Compared(
        keys=("phase", "implementation"), value="rows_per_second", higher_is_better=True, code="training"
    ),
    "lengths": Compared(
        keys=("rows", "phase", "implementation"), value="rows_per_second", higher_is_better=True, code="training"
    ),
    "reference": Compared(keys=("implementation",), value="rows_per_second", higher_is_better=True, code="training"),
    "profile": Compared(keys=(), value="seconds_per_step", higher_is_better=False, code="training"),
    "sweep": Compared(keys=("beta",), value="seconds", higher_is_better=False, code="training"),
    "demo": Compared(keys=(), value="seconds/all", higher_is_better=False, code="training"),
    "feedback": Compared(keys=("rows",), value="seconds", higher_is_better=False, code="feedback"),
    "head": Compared(keys=("pass", "implementation"), value="seconds", higher_is_better=False, code="kernels"),
}
"""By the name of the benchmark."""
OWN = ("kto_dist", "kto_kernels")
"""Losses of others are not ours to mark."""
LOSS = 0.05


def key_of(line: dict[str, Any], benchmark: str) -> tuple[str, ...]:
    return tuple(str(line[key]) for key in COMPARED[benchmark].keys)


def _lines(content: dict[str, Any]) -> dict[tuple[str, ...], tuple[dict[str, Any], float]]:
    """By key, each line with the value by which it is compared."""
    benchmark = content.get("benchmark", "")
    compared, found = COMPARED.get(benchmark), {}
    if compared is None:
        return {}
    for line in content.get("results", []) if compared.keys else [content]:
        value: Any = line
        for name in compared.value.split("/"):
            value = value.get(name, {})
        if value != {}:
            found[key_of(line, benchmark)] = line, value
    return found


def _values(content: dict[str, Any]) -> dict[str, float]:
    return {" ".join(key): value for key, (_, value) in _lines(content).items()}


def losses(content: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """The lines of ours that are slower than before by more than LOSS, and by how much: 0.2 is a fifth slower."""
    before, found = content.get("previous", {}).get("values", {}), {}
    for key, (line, new) in _lines(content).items() if before else ():
        name, old = line.get("implementation"), before.get(" ".join(key))
        if old is None or (name is not None and not name.startswith(OWN)):
            continue
        loss = 1 - new / old if COMPARED[content["benchmark"]].higher_is_better else 1 - old / new
        if loss > LOSS:
            found[key] = loss
    return found


def outdated(content: dict[str, Any]) -> str | None:
    """The part of the code that a result measures, if it has changed since."""
    compared = COMPARED.get(content.get("benchmark", ""))
    if compared is None:
        return None
    measured = content.get("code", {}).get("digests", {}).get(compared.code)
    return None if measured == digests()[compared.code] else compared.code


_before: dict[Path, dict[str, Any]] = {}


def _previous(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What a file said when this process first wrote to it, if it was of the same device and job."""
    if file not in _before:
        old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        same = all(old.get(key) == content.get(key) for key in ("benchmark", "device", "settings", "sizes"))
        _before[file] = {"date": old.get("date"), "code": old.get("code"), "values": _values(old)} if same else {}
    return _before[file]


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Whole or not at all; nothing without a file. A result keeps the values of the one that it replaces."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    previous = _previous(file, content) if "benchmark" in content else {}
    if previous.get("values"):
        content = content | {"previous": previous}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)

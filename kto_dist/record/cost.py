"""What a run cost, and what it takes to do it again.

In:  the steps' metrics and the summary, any of which may be missing or of an older version. Out: rows for a page.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_dist.record.plots import Record, is_finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    figures: list[tuple[str, Any]]
    """(what, how much)"""
    phases: list[tuple[str, float, float]]
    """(phase, seconds, share of all), the longest first."""
    note: str
    """What is not counted; empty where everything is."""


def cost_of(metrics: Sequence[Record], summary: Record) -> Cost | None:
    """None of a run that has taken no step."""
    phases = {name: float(value) for name, value in _dict(summary.get("seconds")).items() if is_finite(value)}
    trained = _sum(metrics, "seconds")
    if not trained and not phases:
        return None
    note = ""
    if trained > phases.get("training", 0.0):
        # the steps of a run are all told, those before it was interrupted too
        phases["training"] = trained
        if summary.get("resumed_from"):
            step = summary["resumed_from"]
            note = f"It went on from step {step:,}: of phases but training, only those since then count."
    seconds, devices = sum(phases.values()), summary.get("world_size")
    tokens, mfu = _sum(metrics, "tokens"), _mfu(metrics)
    figures: list[tuple[str, Any]] = [("hours", seconds / 3600)]
    if isinstance(devices, int):
        figures = [("device hours", seconds * devices / 3600), ("devices", devices), *figures]
    if tokens:
        figures += [("tokens trained on", int(tokens)), ("tokens / s while training", tokens / trained)]
    if mfu is not None:
        figures.append(("mfu (share of the devices' peak)", mfu))
    ordered = sorted(phases.items(), key=lambda phase: -phase[1])
    return Cost(figures=figures, phases=[(name, spent, spent / seconds) for name, spent in ordered], note=note)


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """How to have the same run once more."""

    commands: list[str]
    facts: list[tuple[str, Any]]


def again(run: Path, summary: Record) -> Again | None:
    """None without a summary."""
    versions = _dict(summary.get("versions"))
    if not versions:
        return None
    name, config = shlex.quote(f"{run}-again"), shlex.quote(str(run / "config.yaml"))
    commands = []
    if commit := versions.get("git_commit"):
        dirty = versions.get("git_dirty") == "true"
        commands.append(f"git checkout {commit}" + ("   # which had changes that are in no commit" if dirty else ""))
    commands += [
        f"kto-dist train {config} train.output={name}",
        f"kto-dist evaluate {name} --against {shlex.quote(str(run))}",
    ]
    data, packages = _dict(summary.get("data")), [key for key in versions if key.startswith("version.")]
    facts = [
        ("python", versions.get("python")),
        *((key.removeprefix("version."), versions[key]) for key in packages),
        ("rows, tokenised", _dict(data.get("train")).get("fingerprint")),
        ("reference", _dict(summary.get("reference")).get("fingerprint")),
        *((name, summary.get(name)) for name in ("precision", "attention", "kernels", "packing")),
        ("devices", summary.get("world_size")),
    ]
    return Again(commands=commands, facts=[(what, value) for what, value in facts if value is not None])


def _mfu(metrics: Sequence[Record]) -> float | None:
    """The mean over the time of the steps that have one."""
    steps = [line for line in metrics if is_finite(line.get("mfu")) and is_finite(line.get("seconds"))]
    spent = sum(line["seconds"] for line in steps)
    return sum(line["mfu"] * line["seconds"] for line in steps) / spent if spent else None


def _sum(metrics: Sequence[Record], name: str) -> float:
    return float(sum(line[name] for line in metrics if is_finite(line.get(name))))


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

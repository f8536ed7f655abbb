"""What the tests of whole runs share: a config for a tiny run, and running several of them on every rank."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.step import StepResult

GATHERED = Path(__file__).parent / "cases" / "gathered.json"
"""Options of ZeRO-3: by default parameters below 100,000 numbers stay whole on every rank, and no hook would gather any
of a tiny model. Here its norms stay whole, and its matrices do not."""


def tiny_config(folder: Path, model: Path, log: Path, **overrides: Any) -> Config:
    """5 steps of 16 rows in fp32, without a report, which would take longer; `section__key=value` changes a setting."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "reference": {"store": str(folder / "store"), "dtype": "fp32", "tokens_per_batch": 512},
        "data": {"train": str(log), "max_length": 96, "cache": str(folder / "tokenised"), "workers": 1},
        "train": {
            "output": str(folder / "run"),
            "global_batch": 16,
            "max_steps": 5,
            "tokens_per_microbatch": 256,
            "dtype": "fp32",
            "lr": 1e-3,
            # Adam divides by the root of its second moment: where that is near 0, a gradient's rounding error
            # becomes an update of full size, and the comparison would be one of noise
            "eps": 1e-4,
        },
        "tracking": {"enabled": False, "report": False},
        "answers": {"while_training": 0, "in_evaluate": 0, "cache": str(folder / "answers")},
        "judge": {"cache": str(folder / "verdicts")},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    sharding = tree.get("deepspeed", {})
    if sharding.get("zero_stage") == 3:
        sharding.setdefault("config", str(GATHERED))
    return Config.build(tree)


def metrics_of(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()]


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.train.output) / "export" / "model.safetensors")


def train_all(configs: list[Config]) -> list[dict[str, Any]]:
    """On every rank: the runs one after the other, in one process."""
    return [train(config) for config in configs]


WORSE: dict[str, Any] = {
    "train__lr": 3e-2, "train__max_steps": 8, "train__schedule": "constant", "train__warmup": 0, "objective__beta": 0.5,
    "data__heldout": 0.3, "evaluate__every_steps": 2, "checkpoint__best": "heldout/loss", "checkpoint__keep": 1,
    "checkpoint__every_steps": 1, "health__max_kl": None,
}  # fmt: skip
"""A rate at which the tiny model learns its rows by heart, and loses the held-out ones."""


TIMED = {"seconds", "tokens_per_second"}
"""Metrics that differ from run to run."""


def train_and_die_after(config: Config, steps: int) -> None:
    """SIGKILL to every rank after so many steps: nothing gets to clean up."""

    def deadly(result: StepResult) -> None:
        if result.step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, watch=deadly)

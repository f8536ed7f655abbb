"""The runs that `scaling.py` measures: what each is called, and its config."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 5
"""Of a run, by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run."""

    name: str
    ranks: int = 1
    nodes: int = 1
    global_batch: int = 16
    settings: tuple[str, ...] = ()
    """Overrides."""
    checkpoints: bool = False
    memory: bool = False
    """Whether it is run for its memory; on a CPU its seconds say nothing then."""
    adapter: bool = False


def warm(steps: int) -> int:
    """Of so many steps, those that do not count."""
    return 2 if steps > 3 else 1


def memory_cases(stages: tuple[int, ...], adapter_stages: tuple[int, ...], batch: int) -> list[Case]:
    """At one rank."""
    found = []
    for adapter, listed in ((False, stages), (True, adapter_stages)):
        for stage in listed:
            for checkpointing in (False, True):
                words = _set_up(stage, checkpointing) + ['adapter.type="lora"'] * adapter
                # in bf16 stage 0 becomes 1
                words += ['train.dtype="fp32"'] * (stage == 0)
                name = (
                    "LoRA, " * adapter + f"ZeRO {stage}" + ", fp32" * (stage == 0) + ", checkpointing" * checkpointing
                )
                found.append(Case(name=name, global_batch=batch, settings=tuple(words), memory=True, adapter=adapter))
    return found


def time_cases(batch: int, *, alone: bool = False) -> list[Case]:
    """`alone`: without those of two ranks, since a GPU has nobody to scale to."""
    staged = [
        Case(
            name=f"ZeRO {stage}" + ", checkpointing" * checkpointing,
            global_batch=batch,
            settings=tuple(_set_up(stage, checkpointing)),
        )
        for stage in (1, 2, 3)
        for checkpointing in (False, True)
    ]
    first = Case(name="one rank", global_batch=batch)
    if alone:
        return [first, *staged]
    zero_3 = tuple(_set_up(3, False))
    return [
        first,
        *staged,
        Case(name="one rank, half the batch", global_batch=batch // 2),
        Case(name="two ranks, strong", ranks=2, global_batch=batch),
        Case(name="two ranks, weak", ranks=2, global_batch=2 * batch),
        Case(name="two ranks, ZeRO 3, weak", ranks=2, global_batch=2 * batch, settings=zero_3),
        Case(name="two nodes, strong", ranks=2, nodes=2, global_batch=batch),
        Case(name="two nodes, weak", ranks=2, nodes=2, global_batch=2 * batch),
        Case(name="one rank, a checkpoint a step", global_batch=batch, checkpoints=True),
    ]


def _set_up(stage: int, checkpointing: bool) -> list[str]:
    return [f"deepspeed.zero_stage={stage}", f"model.gradient_checkpointing={json.dumps(checkpointing)}"]


def config_of(case: Case, model: Path, log: Path, folder: Path, length: int, tokens: int, steps: int = STEPS) -> Any:
    """`folder`: the run's own. What runs have in common lies beside the log: tokens, and the reference's log-probs."""
    from kto_dist.training.config import Config

    given = {
        "model": {"path": str(model)},
        "reference": {"store": str(log.parent / "store")},
        "data": {"train": str(log), "max_length": length, "cache": str(log.parent / "tokenised"), "workers": 1},
        "train": {
            "output": str(folder / "run"),
            "global_batch": case.global_batch,
            "max_steps": steps + 1,
            "tokens_per_microbatch": tokens,
        },
        "tracking": {"enabled": False, "report": False},
    }
    if case.checkpoints:
        given["checkpoint"] = {"every_steps": 1, "keep": 1}
    for word in case.settings:
        name, value = word.split("=")
        section, key = name.split(".")
        given.setdefault(section, {})[key] = json.loads(value)
    return Config.build(given)

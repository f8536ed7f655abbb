"""The learning rate of each step."""

import math

from kto_dist.training.config import TrainConfig


def learning_rate(step: int, steps: int, section: TrainConfig) -> float:
    """Of the update that makes step `step` (from 0): linear warm-up, then the schedule down to 0 at the end."""
    warmup = round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)
    if step < warmup:
        return section.lr * (step + 1) / warmup
    if section.schedule == "constant":
        return section.lr
    progress = (step - warmup) / max(1, steps - warmup)
    if section.schedule == "linear":
        return section.lr * max(0.0, 1 - progress)
    return section.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

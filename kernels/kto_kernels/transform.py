"""What some model families do to the logits between the LM head and the softmax, and its derivative."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTransform:
    """logits -> softcap * tanh(scale * logits / softcap) / temperature, in that order."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature ({self.temperature}) must be above 0")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap ({self.softcap}) must be above 0, or None")

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def derivative_(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Turns d/d(transformed) into d/d(logits) in place; `transformed` is what `__call__` returned."""
        if self.softcap is not None:
            # d tanh(u) = 1 - tanh(u)^2, and tanh(u) = transformed * temperature / softcap
            grad.mul_(1 - (transformed * (self.temperature / self.softcap)).square_())
        factor = self.scale / self.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


IDENTITY = LogitTransform()

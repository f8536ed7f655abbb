"""From the logits of a next token to the token, and from tokens to an answer; the same however a model is run.

A prompt's draws are a function of the seed and the prompt, whatever stands beside it in a batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are made."""

    max_tokens: int
    stops: tuple[int, ...]
    """Tokens that end an answer."""
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Of the likeliest tokens as many as have this share of the probability."""
    seed: int = 0

    def key(self, prompt: np.ndarray) -> str:
        """Equal where the answer is, of one model."""
        drawn = (self.temperature, self.top_p, self.seed) if self.temperature else ()
        facts = f"{self.max_tokens} {sorted(self.stops)} {drawn} ".encode()
        return hashlib.blake2b(facts + prompt.astype(np.int64).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    ids: tuple[int, ...]
    """With the token that ended it."""
    finished: bool
    """Whether the model ended it; else it met a limit of tokens."""


def choose(
    logits: Tensor,  # (R, V)
    drawn: Tensor,  # (R,) fp64, each in [0, 1)
    decoding: Decoding,
) -> Tensor:  # (R,) int64
    """The likeliest token, or the one at which the sum of the probabilities passes `drawn`."""
    if not decoding.temperature:
        return logits.argmax(-1)
    chances = torch.softmax(logits.double() / decoding.temperature, -1)
    if decoding.top_p < 1:
        ordered, place = chances.sort(descending=True)
        # a token stays where those before it have less than the share
        ordered *= ordered.cumsum(-1) - ordered < decoding.top_p
        chances = torch.zeros_like(chances).scatter_(-1, place, ordered)
    sums = chances.cumsum(-1)
    wanted = drawn.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Draws:
    """A stream of numbers in [0, 1) for each prompt."""

    def __init__(self, prompts: Sequence[np.ndarray], decoding: Decoding) -> None:
        seeds = [int(decoding.key(prompt), 16) for prompt in prompts] if decoding.temperature else []
        self._streams = [np.random.default_rng(seed) for seed in seeds]
        self._prompts = len(prompts)

    def next(self, places: Sequence[int] | None = None) -> Tensor:  # (R,)
        """Of some of the prompts, or of all."""
        chosen = range(self._prompts) if places is None else places
        if not self._streams:
            return torch.zeros(len(chosen), dtype=torch.float64)
        return torch.tensor([self._streams[place].random() for place in chosen], dtype=torch.float64)


def ended(ids: Sequence[int], decoding: Decoding) -> Generated:
    end = next((place + 1 for place, token in enumerate(ids) if token in decoding.stops), None)
    return Generated(ids=tuple(ids[:end]), finished=end is not None)


def room_of(lm: PreTrainedModel, prompt: np.ndarray, decoding: Decoding) -> int:
    """Tokens that an answer may have."""
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return max(0, min(decoding.max_tokens, context - len(prompt) if context else decoding.max_tokens))

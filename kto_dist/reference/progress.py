"""How far a pass is, at what rate, and how long the rest takes.

In:  what this rank has scored, batch by batch, and the moments at which all ranks meet. Out: `Progress`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kto_dist.base import comm


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a pass is, over all ranks. Tokens are those of the pairs, however often the model reads them."""

    done: int
    """Pairs."""
    total: int
    """Pairs."""
    rows_per_second: float
    tokens_per_second: float
    seconds_left: float
    before: int = 0
    """Pairs of other lists, which the run has scored ahead of these."""


Watch = Callable[[Progress], None]


class Meter:
    """Rates and the time that is left. Between two meetings the other ranks are taken to be as far as this one, but no
    further than to the window's end, so that what is said to be done is never taken back."""

    def __init__(self, tokens: np.ndarray, watch: Watch):
        self._tokens, self._watch = tokens, watch
        self._all = int(tokens.sum())
        # pairs and tokens of all ranks until they last met, the pairs that they are at, and the most tokens told so far
        self._pairs = self._read = self._window = self._said = 0
        # this rank's pairs and tokens since then
        self._own = np.zeros(2, np.int64)
        self._started = time.monotonic()

    def begin(self, pairs: int) -> None:
        self._window = pairs

    def add(self, places: np.ndarray) -> None:
        self._own += (places.size, self._tokens[places].sum())
        pairs, tokens = self._own * comm.size(comm.DATA)
        self._tell(self._pairs + min(int(pairs), self._window), self._read + int(tokens))

    def meet(self) -> None:
        """Collective, at the end of a window."""
        self._pairs += self._window
        self._read += int(comm.sum_(torch.from_numpy(self._own), comm.DATA)[1])
        self._own = np.zeros(2, np.int64)
        self._tell(self._pairs, self._read)

    def _tell(self, pairs: int, read: int) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        read = self._said = min(max(read, self._said), self._all)
        self._watch(
            Progress(
                done=pairs,
                total=self._tokens.size,
                rows_per_second=pairs / seconds,
                tokens_per_second=read / seconds,
                seconds_left=seconds * (self._all - read) / max(read, 1),
            )
        )

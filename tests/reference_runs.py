"""What the tests of reference passes share: passes on every rank, with an engine or shards of the test's own."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.model.engines import Reference
from kto_dist.reference.logps import ReferenceLogps, fill_store, score_reference
from kto_dist.reference.pairs import wanted_pairs
from kto_dist.reference.pieces import cut_pieces
from kto_dist.reference.progress import Progress, Watch
from kto_dist.reference.scoring import Outcome, ShardSize, seek
from kto_dist.reference.worker import Working
from kto_dist.store.shards import distinct
from kto_dist.training.config import Config
from kto_dist.training.precompute import precompute
from kto_dist.training.prepare import find, prepare, wanted


def scored_and_found(config: Config) -> tuple[int, int]:
    """On every rank: how many pairs a pass scores, and how many it finds in the store."""
    outcome = precompute(config)
    return outcome.pairs - outcome.hits, outcome.hits


def score(
    config: Config, console: Console | None = None, shard: ShardSize | None = None, **options: Any
) -> ReferenceLogps:
    """A pass alone; `options` as for `score_reference`."""
    prepared = prepare(config, Console())
    setup, fingerprint = find(prepared, Console())
    if shard is not None:
        setup = replace(setup, settings=replace(setup.settings, shard=shard))
    return score_reference(wanted(prepared, Console()), setup, fingerprint, console or Console(), **options)


def logps_of_pairs(config: Config, **options: Any) -> np.ndarray:
    """(P,) of the training pairs; `options` as for `score`."""
    prepared = prepare(config, Console())
    return score(config, **options).train(*wanted_pairs(prepared.plan, prepared.train))


def with_forward(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> type[Reference]:
    """A reference whose forward is wrapped."""

    class Wrapped(Reference):
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **settings)
            self.forward = wrap(self.forward)

    return Wrapped


def fixed(pairs: int) -> ShardSize:
    """Shards of so many pairs a rank."""
    return ShardSize(first=pairs, largest=pairs)


def as_hosts(configs: list[Config]) -> str:
    """Every rank is a host of its own, with files and settings of its own; what is said when it fails."""
    os.environ["LOCAL_RANK"] = "0"
    try:
        scored_and_found(configs[int(os.environ["RANK"])])
    except UserError as error:
        return str(error)
    return "nothing"


def with_a_store_of_its_own(config: Config) -> Config:
    """Every rank has one, as hosts without a shared file system have."""
    store = f"{config.reference.store}-{os.environ['RANK']}"
    return config.model_copy(update={"reference": config.reference.model_copy(update={"store": store})})


def work(
    config: Config,
    working: Working,
    watch: Watch = lambda progress: None,
    engine: type[Reference] = Reference,
    shard: ShardSize | None = None,
) -> Outcome:
    """What a worker does, with an engine or shards of the test's own."""
    prepared = prepare(config, Console())
    setup, fingerprint = find(prepared, Console())
    if shard is not None:
        setup = replace(setup, settings=replace(setup.settings, shard=shard))
    return fill_store(wanted(prepared, Console()), setup, fingerprint, Console(), working, watch, engine)


def pieces_of(config: Config, piece_tokens: int) -> list[int]:
    """Pairs of every piece that workers cut."""
    prepared = prepare(config, Console())
    setup, _ = find(prepared, Console())
    sizes: list[int] = []
    for pairs in wanted(prepared, Console()):
        sought = seek(pairs.examples, pairs.prompts, pairs.completions, setup.settings.cutting)
        places = distinct(sought.keys)[0]
        tokens = (sought.prompt_kept + sought.completion_kept)[places]
        group = distinct(sought.prompt_keys[places])[1]
        sizes += np.diff(cut_pieces(sought.keys[places], group, tokens, most=piece_tokens).starts).tolist()
    return sizes


class Noted:
    """Notes in a file what this rank scores, batch by batch, and calls `after_batch` with how many there were."""

    def __init__(self, config: Config, after_batch: Callable[[int], None] = lambda batches: None):
        self._file = os.open(f"{config.train.output}-scored", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._after_batch, self._batches, self._scored = after_batch, 0, 0

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(**batch: Any) -> Any:
            logps = forward(**batch)
            self._scored = logps.shape[0]
            return logps

        return noting

    def watch(self, progress: Progress) -> None:
        """Is called after each batch, and when ranks have met; never while the model is checked."""
        if self._scored:
            os.write(self._file, f"{self._scored}\n".encode())
            self._scored, self._batches = 0, self._batches + 1
            self._after_batch(self._batches)


def noted(config: Config) -> int:
    """Pairs that passes with `Noted` have scored."""
    file = Path(f"{config.train.output}-scored")
    return sum(map(int, file.read_text().split())) if file.exists() else 0

"""What the tests of reference passes share: passes on every rank, with an engine or shards of the test's own."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.model.engines import Reference
from kto_dist.reference.logps import ReferenceLogps, score_reference
from kto_dist.reference.pairs import wanted_pairs
from kto_dist.reference.scoring import ShardSize
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

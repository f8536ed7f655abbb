"""The pass over lists of pairs: looked up in the store, and what it lacks scored by the reference.

1. `seek`             pairs -> their keys and lengths; `Sought.work`: some of them, to be scored
2. `look_up`          what the store knows of all lists; `reference_logps`: of one list, and scores what is missing
3. `score_work`       shard by shard, written by the rank that computed it, and exchanged over the process group
4. `Work`             the pairs to score, each alone or, with shared prompts, in trees (`prefix.py`)
5. `ShardSize`        how much is scored between two writes

Workers (`worker.py`) score pieces of a list in the same way, each piece by a process alone.

Hit or miss is decided once for all ranks, so hosts without a shared file system may hold different shards.

A shard is what a rank scores in about a minute, and a micro-batch at the least: that much is lost when a pass is
killed. How pairs are cut into shards and micro-batches changes no key, so a pass goes on with another world size or
other micro-batches as well.

"To score" means one thing here: to compute a pair's log-prob under the reference.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from kto_dist.base import agree, comm
from kto_dist.base.exits import Stopped
from kto_dist.data.batch import Cutting, MicroBatch, MicroBatches, collate, cut, pair_lengths, pair_tokens
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import completion_logps
from kto_dist.model.engines import Reference
from kto_dist.model.memory import Memory, attempt
from kto_dist.reference.keys import AT_ONCE, Digests, pair_keys
from kto_dist.reference.pairs import PairList, RefLogps
from kto_dist.reference.prefix import Trees, cost, grow, lay_out
from kto_dist.reference.progress import Meter, Watch
from kto_dist.store.shards import Wanted, distinct
from kto_dist.store.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSize:
    """How many pairs a rank scores between two writes."""

    first: int = 16
    """Before a rate is known."""
    largest: int = 65536
    seconds: float = 60.0
    """What a killed pass loses at most, on every rank. A large reference may take that long for few pairs."""

    def next(self, pairs_per_second: float, batch: int) -> int:
        """`pairs_per_second`: of one rank. `batch`: pairs of a micro-batch; fewer cost as much where a forward has a
        price of its own, such as weights that come from a disk."""
        return int(np.clip(pairs_per_second * self.seconds, max(1, batch), self.largest))


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSettings:
    """How pairs are cut and scored: the reference's own settings."""

    cutting: Cutting
    logits_bytes: int | None
    """Most memory of the LM head's logits at a time; None: by the device."""
    logits_dtype: torch.dtype | None
    """None: fp32 where the device's matmul gives it."""
    t0: float
    """See prefix.py."""
    device: torch.device
    shard: ShardSize = ShardSize()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedReference:
    """A reference in memory, and what was found out about it."""

    engine: Reference
    share_prefixes: bool | None
    """None: where the cost model says that it pays."""


# Sharing has to save this much by the cost model: what the model leaves out (masks, gathers) is of that order.
WORTH_SHARING = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a pass did."""

    pairs: int
    hits: int
    """Found in the store; the others were scored, those with equal tokens once."""
    scored_once: int
    """Different pairs that were scored."""
    scored_tokens: int
    """Of these, prompts and completions."""
    scoring_seconds: float
    """From a loaded engine to the last shard."""
    seconds: float
    shared: bool
    """Whether prompts were shared."""

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            pairs=self.pairs + other.pairs,
            hits=self.hits + other.hits,
            scored_once=self.scored_once + other.scored_once,
            scored_tokens=self.scored_tokens + other.scored_tokens,
            scoring_seconds=self.scoring_seconds + other.scoring_seconds,
            seconds=self.seconds + other.seconds,
            shared=self.shared or other.shared,
        )

    @property
    def repeated(self) -> int:
        """Pairs whose tokens another one has that was scored."""
        return self.pairs - self.hits - self.scored_once

    def figures(self) -> dict[str, float]:
        """For the record of a run."""
        figures: dict[str, float] = {
            "pairs": self.pairs,
            "from_store": self.hits,
            "repeated": self.repeated,
            "scored": self.scored_once,
            "seconds": self.seconds,
        }
        if self.scored_once:
            seconds = max(self.scoring_seconds, 1e-9)
            figures |= {
                "rows_per_second": self.scored_once / seconds,
                "tokens_per_second": self.scored_tokens / seconds,
            }
        return {f"reference/{name}": float(value) for name, value in figures.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sought:
    """P pairs, as the store knows them."""

    examples: Examples
    prompts: np.ndarray
    """(P,) rows that give the prompt."""
    completions: np.ndarray
    """(P,) rows that give the completion."""
    prompt_kept: np.ndarray
    """(P,) tokens."""
    completion_kept: np.ndarray
    """(P,) tokens."""
    keys: np.ndarray
    """(P,) KEY."""
    prompt_keys: Digests
    """Equal where the prompt's tokens are."""

    def work(self, places: np.ndarray) -> "Work":
        """Those at (Q,) places, all different, to be scored."""
        return Work(
            examples=self.examples,
            prompts=self.prompts[places],
            completions=self.completions[places],
            prompt_kept=self.prompt_kept[places],
            completion_kept=self.completion_kept[places],
            keys=self.keys[places],
            prompt_group=distinct(self.prompt_keys[places])[1],
        )


def seek(examples: Examples, prompts: np.ndarray, completions: np.ndarray, cutting: Cutting) -> Sought:
    """Collective. `prompts`, `completions`: (P,) rows."""
    kept = pair_lengths(examples, prompts, completions, cutting.max_length, cutting.prompt_limit)
    hashed = pair_keys(examples, prompts, completions, *kept)
    return Sought(
        examples=examples,
        prompts=prompts,
        completions=completions,
        prompt_kept=kept[0],
        completion_kept=kept[1],
        keys=hashed.keys,
        prompt_keys=hashed.prompts,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LookedUp:
    """A list, and what is known of its pairs."""

    sought: Sought
    wanted: Wanted


def look_up(lists: Sequence[PairList], store: Store, cutting: Cutting) -> list[LookedUp]:
    """Collective. What the store knows of all lists; each shard is read once for it."""
    found = []
    for pairs in lists:
        sought = seek(pairs.examples, pairs.prompts, pairs.completions, cutting)
        found.append(LookedUp(sought=sought, wanted=Wanted(sought.keys)))
    agree.together(lambda: store.tell(*(each.wanted for each in found)))
    return found


def reference_logps(
    lists: list[LookedUp],
    *,
    store: Store,
    load: Callable[[], LoadedReference],
    settings: PassSettings,
    watch: Watch,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[RefLogps, Outcome]:
    """Collective. Those of the first list, which is taken off; the others are told what was scored for it. `load` is
    called (on every rank) only when something is missing: see `logps.py`.

    Raises `UserError`, on all ranks alike, when the store cannot take what was scored.
    """
    started = time.monotonic()
    looked_up = lists.pop(0)
    sought = looked_up.sought
    logps, found = _exchange(*looked_up.wanted.values())
    # decided before anything is scored, and on all ranks
    missing = np.flatnonzero(~found)
    outcome = Outcome(
        pairs=sought.keys.size,
        hits=sought.keys.size - missing.size,
        scored_once=0,
        scored_tokens=0,
        scoring_seconds=0.0,
        seconds=0.0,
        shared=False,
    )
    del looked_up, found  # memory: there may be many millions
    if missing.size:
        # Rows with equal text share a key: one of them is scored for all.
        first, same_as = distinct(sought.keys[missing])
        todo = missing[first]
        agree.together(lambda: store.begin(todo.size))
        work = sought.work(todo)
        reference = load()
        loaded = time.monotonic()
        scored = score_work(work, reference, settings, store, watch, warn)
        logps[missing] = scored.logps[same_as]
        for later in lists:
            later.wanted.take(work.keys["high"], work.keys["low"], scored.logps)
        outcome = replace(
            outcome,
            scored_once=todo.size,
            scored_tokens=int(work.tokens.sum()),
            scoring_seconds=time.monotonic() - loaded,
            shared=scored.shared,
        )
    refs = RefLogps(sought.examples, sought.prompts, sought.completions, logps)
    return refs, replace(outcome, seconds=time.monotonic() - started)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """P pairs that have to be scored."""

    examples: Examples
    prompts: np.ndarray
    """(P,) rows that give the prompt."""
    completions: np.ndarray
    """(P,) rows that give the completion."""
    prompt_kept: np.ndarray
    """(P,) tokens."""
    completion_kept: np.ndarray
    """(P,) tokens."""
    keys: np.ndarray
    """(P,) KEY."""
    prompt_group: np.ndarray
    """(P,) int64, equal where the prompt's tokens are."""

    @property
    def tokens(self) -> np.ndarray:  # (P,)
        return self.prompt_kept + self.completion_kept

    def trees(self, settings: PassSettings, share: bool | None) -> Trees | None:
        """The pairs with shared prompts, or None where they are better scored one by one."""
        if share is False:
            return None
        trees = grow(
            self.prompt_group,
            self.prompt_kept,
            self.completion_kept,
            widest=settings.cutting.tokens,
            t0=settings.t0,
        )
        pays = cost(self.tokens, settings.t0) >= WORTH_SHARING * cost(trees.tokens, settings.t0)
        return trees if share or pays else None

    def pair(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        return pair_tokens(
            self.examples,
            int(self.prompts[place]),
            int(self.completions[place]),
            int(self.prompt_kept[place]),
            int(self.completion_kept[place]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What `score_work` leaves."""

    logps: np.ndarray
    """(P,) fp64, on every rank."""
    shared: bool
    """Whether prompts were shared."""
    settings: PassSettings
    """To go on with: with the rate and the memory that were found."""


def score_work(
    work: Work,
    reference: LoadedReference,
    settings: PassSettings,
    store: Store,
    watch: Watch,
    warn: Callable[[str], None],
) -> Scored:
    """Collective. All values, each of which was written to the store by the rank that computed it.

    Where another job has stored a value of the same pair meanwhile, later runs take the smaller one of the two, and
    this run the one computed here: they differ by a rounding.
    """
    engine, trees = reference.engine, work.trees(settings, reference.share_prefixes)
    # a unit is a pair, or a tree of pairs
    tokens = work.tokens if trees is None else trees.tokens
    pairs_of = np.ones(tokens.size, np.int64) if trees is None else np.diff(trees.starts)
    # Longest first: the estimate of the time that is left then errs on the safe side, memory peaks at the start, and
    # what lies side by side is of a length.
    order = np.argsort(-tokens, kind="stable")
    pairs_before = np.insert(np.cumsum(pairs_of[order]), 0, 0)
    logps, found = np.zeros(work.keys.size), np.zeros(work.keys.size, dtype=bool)
    meter = Meter(work.tokens, watch)
    memory = Memory(
        cutting=settings.cutting,
        # a tree of completions may be longer than any row
        longest=max(int(tokens.max()), settings.cutting.max_length),
        setting="reference.tokens_per_batch",
        warn=warn,
    )
    start, ranks = 0, comm.size(comm.DATA)
    own = settings.shard.first

    def add(places: np.ndarray, values: np.ndarray) -> None:
        store.add(work.keys[places], values, work.completion_kept[places])

    while start < order.size:
        began = time.monotonic()
        stop = max(start + 1, int(np.searchsorted(pairs_before, pairs_before[start] + own * ranks, "right")) - 1)
        pairs = int(pairs_before[stop] - pairs_before[start])
        meter.begin(pairs)
        window = order[start:stop]

        def score(cutting: Cutting, window: np.ndarray = window) -> tuple[np.ndarray, np.ndarray]:
            batches = _micro_batches(work, trees, cutting, window)
            return attempt(
                lambda: _score_shard(batches, engine, settings, meter, add),
                "the reference pass",
                again=not engine.sharded,
            )

        places, values = memory.within(score, lambda: None)
        # The others learn of a full disk here. It is also where ranks meet: without that they would drift apart over
        # hours, until the last exchange meets its time-out.
        agree.together(partial(add, places, values))
        logps[places], found[places] = values, True
        meter.meet()
        rate = pairs / max(time.monotonic() - began, 1e-9)
        start = stop
        batch = memory.cutting.tokens // tokens[order[start]] if start < order.size else 1
        own = comm.broadcast(settings.shard.next(rate / ranks, batch))
    logps, found = _exchange(logps, found)
    assert found.all()
    further = replace(settings, cutting=memory.cutting, shard=replace(settings.shard, first=own))
    return Scored(logps=logps, shared=trees is not None, settings=further)


def _score_shard(
    batches: MicroBatches,
    engine: Reference,
    settings: PassSettings,
    meter: Meter,
    add: Callable[[np.ndarray, np.ndarray], None],
) -> tuple[np.ndarray, np.ndarray]:  # (Q,) places in the work, (Q,) fp64
    """`add` stores what there is where whoever watches stops the pass, which only one does that has no other ranks."""
    places, values = [np.zeros(0, np.int64)], [np.zeros(0)]
    for batch in batches:
        with torch.no_grad():
            scored = completion_logps(
                engine.forward,
                batch.to(settings.device),
                engine.model.transform,
                settings.logits_bytes,
                settings.logits_dtype,
            )
        places.append(batch.position.numpy())
        values.append(scored.cpu().numpy())
        try:
            meter.add(places[-1])
        except Stopped:
            add(np.concatenate(places), np.concatenate(values))
            raise
    return np.concatenate(places), np.concatenate(values)


def _micro_batches(work: Work, trees: Trees | None, cutting: Cutting, window: np.ndarray) -> MicroBatches:
    """This rank's micro-batches of some pairs or trees, equally many on every rank, each made when it is its turn."""
    lengths = (work.tokens if trees is None else trees.tokens)[window]
    packed = cutting.packed and trees is None
    ranks, rank = comm.size(comm.DATA), comm.rank(comm.DATA)
    shares = cut(
        lengths,
        tokens=cutting.tokens,
        ranks=ranks,
        packed=packed,
        apart=cutting.apart,
        multiple=cutting.multiple,
    )[rank]

    def make(share: np.ndarray) -> MicroBatch:
        chosen = window[share]
        if trees is None:
            return collate([work.pair(place) for place in chosen], chosen, packed=packed)
        members = [trees[tree] for tree in chosen]
        read = [[work.pair(place) for place in tree] for tree in members]
        grown = [(pairs[0][0], [completion for _, completion in pairs]) for pairs in read]
        return lay_out(grown, np.concatenate(members) if members else chosen)

    return MicroBatches(shares=shares, make=make)


def _exchange(logps: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every rank's values, everywhere, in place; where several have one, the lowest rank's counts: all agree."""
    ranks = comm.world_size()
    for start in range(0, logps.size if ranks > 1 else 0, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        owner = torch.from_numpy(np.where(found[part], comm.rank(), ranks))
        comm.min_(owner, comm.WORLD)
        mine = torch.from_numpy(logps[part]) * (owner == comm.rank())
        logps[part], found[part] = comm.sum_(mine, comm.WORLD).numpy(), (owner < ranks).numpy()
    return logps, found

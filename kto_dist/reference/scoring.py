"""The reference's log-prob of every pair that a run is going to meet.

1. `wanted_pairs`     the rows of every step, each with itself, and the step's KL pairs; rows no step takes cost nothing
2. `reference_logps`  looks them up in the store; what some rank's store lacks is scored by all ranks together,
                      shard by shard, written by the rank that computed it, and exchanged over the process group
3. the reference engine exists only inside 2, and is gone when it returns (`scores.py`)

Hit or miss is decided once for all ranks, so hosts without a shared file system may hold different shards.

A shard is what a rank scores in about a minute, and a micro-batch at the least: that much is lost when a pass is
killed. How pairs are cut into
shards and micro-batches changes no key, so a pass goes on with another world size or token budget as well.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from kto_dist.base import agree, comm
from kto_dist.data.batch import MicroBatch, Plan, collate, cut, pair_lengths, pair_tokens, step_kl_pairs, step_rows
from kto_dist.data.examples import Examples
from kto_dist.model.causal_lm import completion_logps
from kto_dist.model.engines import Reference
from kto_dist.reference.keys import pair_keys
from kto_dist.reference.prefix import Trees, cost, grow, lay_out
from kto_dist.store.store import Store

# What a killed pass loses at most, on every rank.
SHARD_SECONDS = 60.0
# Pairs a rank between two writes: before a rate is known, and at the most. A large reference may take a minute for few.
FIRST_SHARD, LARGEST_SHARD = 16, 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a pass is, over all ranks. Tokens are those of the pairs, however often the model reads them."""

    done: int
    total: int
    # pairs
    rows_per_second: float
    tokens_per_second: float
    seconds_left: float
    before: int = 0
    # pairs of other lists, which the run has scored ahead of these


Watch = Callable[[Progress], None]


def wanted_pairs(plan: Plan, train: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Collective. (P,) rows that give the prompt, (P,) rows that give the completion, sorted, without repeats.

    A million rows are a second or two of drawing KL pairs, so every rank draws those of its share of the steps.
    """
    seen = np.zeros(plan.rows, dtype=bool)
    codes = [np.zeros(0, np.int64)]
    for step in range(plan.steps):
        rows = step_rows(plan, step)
        seen[rows] = True
        if step % comm.world_size() == comm.rank():
            prompts, completions = step_kl_pairs(plan, step, rows, train.prompt_group)
            codes.append(prompts * plan.rows + completions)
    own = np.flatnonzero(seen)
    code = np.concatenate([own * plan.rows + own, *comm.gather(np.concatenate(codes))])
    code.sort()
    code = code[np.insert(code[1:] != code[:-1], 0, True)]
    return code // plan.rows, code % plan.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How pairs are cut and scored: the reference's own settings."""

    max_length: int
    prompt_limit: int
    tokens_per_batch: int
    packed: bool
    logits_bytes: int | None
    # most memory of the LM head's logits at a time; None: by the device
    logits_dtype: torch.dtype | None
    # None: fp32 where the device's matmul gives it
    t0: float
    # see prefix.py
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A loaded reference, and what was found out about it."""

    reference: Reference
    share_prefixes: bool | None
    # None: where the cost model says that it pays


# Sharing has to save this much by the cost model: what the model leaves out (masks, gathers) is of that order.
WORTH_SHARING = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a pass did."""

    pairs: int
    hits: int
    # found in the store; the others were scored, those with equal tokens once
    scored_once: int
    scored_tokens: int
    # of the different pairs that were scored: how many, and the tokens of their prompts and completions
    scoring_seconds: float
    # from a loaded engine to the last shard
    seconds: float
    shared: bool
    # whether prompts were shared

    def __add__(self, other: "Outcome") -> "Outcome":
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name != "shared"}
        return Outcome(**sums, shared=self.shared or other.shared)

    def figures(self) -> dict[str, float]:
        """For the record of a run."""
        scored = self.pairs - self.hits
        figures = {"pairs": self.pairs, "from_store": self.hits, "scored": scored, "seconds": self.seconds}
        if scored:
            seconds = max(self.scoring_seconds, 1e-9)
            figures |= {
                "rows_per_second": self.scored_once / seconds,
                "tokens_per_second": self.scored_tokens / seconds,
            }
        return {f"reference/{name}": float(value) for name, value in figures.items()}


class RefLogps:
    """(prompt row, completion row) -> log-prob of the completion under the reference."""

    def __init__(self, examples: Examples, prompts: np.ndarray, completions: np.ndarray, logps: np.ndarray):
        code = prompts.astype(np.int64) * len(examples) + completions
        order = np.argsort(code, kind="stable")  # of sorted pairs (`wanted_pairs`) a stable sort is one pass
        self._rows, self._code, self._logps = len(examples), code[order], logps[order]

    def __call__(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:  # (P,) fp64
        code = prompts.astype(np.int64) * self._rows + completions
        place = np.minimum(np.searchsorted(self._code, code), self._code.size - 1)
        assert (self._code[place] == code).all(), "a pair was not scored ahead"
        return self._logps[place]


def reference_logps(
    examples: Examples,
    prompts: np.ndarray,  # (P,) rows
    completions: np.ndarray,  # (P,) rows
    *,
    store: Store,
    engine: Callable[[], Scorer],
    scoring: Scoring,
    watch: Watch,
) -> tuple[RefLogps, Outcome]:
    """Collective. `engine` is called (on every rank) only when something is missing: see `scores.py`.

    Raises `UserError`, on all ranks alike, when the store cannot take what was scored.
    """
    started = time.monotonic()
    kept = pair_lengths(examples, prompts, completions, scoring.max_length, scoring.prompt_limit)
    hashed = pair_keys(examples, prompts, completions, *kept)
    logps, found = _exchange(*agree.together(lambda: store.lookup(hashed.keys)))
    # decided before anything is scored, and on all ranks
    missing = np.flatnonzero(~found)
    outcome = Outcome(
        pairs=prompts.size,
        hits=prompts.size - missing.size,
        scored_once=0,
        scored_tokens=0,
        scoring_seconds=0.0,
        seconds=0.0,
        shared=False,
    )
    if missing.size:
        # Rows with equal text share a key: one of them is scored for all.
        first, same_as = _distinct(hashed.keys[missing])
        todo = missing[first]
        agree.together(lambda: store.begin(todo.size))
        work = Work(
            examples=examples,
            prompts=prompts[todo],
            completions=completions[todo],
            prompt_kept=kept[0][todo],
            completion_kept=kept[1][todo],
            keys=hashed.keys[todo],
            prompt_group=_distinct(hashed.prompts[todo])[1],
        )
        scorer = engine()
        loaded = time.monotonic()
        trees = work.trees(scoring, scorer.share_prefixes)
        scored = _score(work, trees, scoring, scorer.reference, store, watch)
        logps[missing] = scored[same_as]
        outcome = replace(
            outcome,
            scored_once=todo.size,
            scored_tokens=int(work.tokens.sum()),
            scoring_seconds=time.monotonic() - loaded,
            shared=trees is not None,
        )
    return RefLogps(examples, prompts, completions, logps), replace(outcome, seconds=time.monotonic() - started)


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(U,) where each key stands first, and (P,) which of these every key is. (`np.unique` compares records slowly.)"""
    order = np.lexsort((keys["low"], keys["high"]))
    ordered = keys[order]
    new = np.ones(keys.size, dtype=bool)
    new[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
    same_as = np.empty(keys.size, np.int64)
    same_as[order] = np.cumsum(new) - 1
    return order[new], same_as


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """P pairs that have to be scored."""

    examples: Examples
    prompts: np.ndarray
    completions: np.ndarray
    # (P,) rows
    prompt_kept: np.ndarray
    completion_kept: np.ndarray
    # (P,) tokens
    keys: np.ndarray
    # (P,) KEY
    prompt_group: np.ndarray
    # (P,) int64, equal where the prompt's tokens are

    @property
    def tokens(self) -> np.ndarray:  # (P,)
        return self.prompt_kept + self.completion_kept

    def trees(self, scoring: Scoring, share: bool | None) -> Trees | None:
        """The pairs with shared prompts, or None where they are better scored one by one."""
        if share is False:
            return None
        trees = grow(
            self.prompt_group,
            self.prompt_kept,
            self.completion_kept,
            budget=scoring.tokens_per_batch,
            t0=scoring.t0,
        )
        pays = cost(self.tokens, scoring.t0) >= WORTH_SHARING * cost(trees.tokens, scoring.t0)
        return trees if share or pays else None

    def pair(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        return pair_tokens(
            self.examples,
            int(self.prompts[place]),
            int(self.completions[place]),
            int(self.prompt_kept[place]),
            int(self.completion_kept[place]),
        )


def _score(
    work: Work, trees: Trees | None, scoring: Scoring, reference: Reference, store: Store, watch: Watch
) -> np.ndarray:  # (P,) fp64
    """Collective. All values, on every rank; each was written to the store by the rank that computed it.

    Where another job has stored a value of the same pair meanwhile, later runs take the smaller one of the two, and
    this run the one computed here: they differ by a rounding.
    """
    units = work.tokens if trees is None else trees.tokens
    sizes = np.ones(units.size, np.int64) if trees is None else np.diff(trees.starts)
    # Longest first: the estimate of the time that is left then errs on the safe side, memory peaks at the start, and
    # what lies side by side is of a length.
    order = np.argsort(-units, kind="stable")
    pairs_before = np.insert(np.cumsum(sizes[order]), 0, 0)
    logps, found = np.zeros(work.keys.size), np.zeros(work.keys.size, dtype=bool)
    meter = _Meter(work.tokens, watch)
    start, ranks = 0, comm.size(comm.DATA)
    wanted = FIRST_SHARD * ranks
    while start < units.size:
        began = time.monotonic()
        stop = max(start + 1, int(np.searchsorted(pairs_before, pairs_before[start] + wanted, "right")) - 1)
        pairs = int(pairs_before[stop] - pairs_before[start])
        meter.begin(pairs)
        own, values = [np.zeros(0, np.int64)], [np.zeros(0)]
        for batch in _batches(work, trees, scoring, order[start:stop]):
            with torch.no_grad():
                scored = completion_logps(
                    reference.forward,
                    batch.to(scoring.device),
                    reference.model.transform,
                    scoring.logits_bytes,
                    scoring.logits_dtype,
                )
            own.append(batch.position.numpy())
            values.append(scored.cpu().numpy())
            meter.add(own[-1])
        places, scored_values = np.concatenate(own), np.concatenate(values)
        # The others learn of a full disk here. It is also where ranks meet: without that they would drift apart over
        # hours, until the last exchange meets its time-out.
        agree.together(lambda p=places, v=scored_values: store.add(work.keys[p], v, work.completion_kept[p]))
        logps[places], found[places] = scored_values, True
        meter.meet()
        rate = pairs / max(time.monotonic() - began, 1e-9)
        start = stop
        # Less than a micro-batch costs as much where a forward has a price of its own: weights that come from a disk.
        whole = scoring.tokens_per_batch // units[order[start]] if start < units.size else 1
        per_rank = np.clip(rate * SHARD_SECONDS / ranks, max(1, whole), LARGEST_SHARD)
        wanted = comm.broadcast(int(per_rank) * ranks)
    logps, found = _exchange(logps, found)
    assert found.all()
    return logps


def _batches(work: Work, trees: Trees | None, scoring: Scoring, window: np.ndarray) -> Iterator[MicroBatch]:
    """This rank's micro-batches of some pairs or trees, equally many on every rank, made as they are needed."""
    lengths = (work.tokens if trees is None else trees.tokens)[window]
    packed = scoring.packed and trees is None
    ranks, rank = comm.size(comm.DATA), comm.rank(comm.DATA)
    for share in cut(lengths, budget=scoring.tokens_per_batch, ranks=ranks, packed=packed)[rank]:
        chosen = window[share]
        if trees is None:
            yield collate([work.pair(place) for place in chosen], chosen, packed=packed)
        else:
            members = [trees[tree] for tree in chosen]
            read = [[work.pair(place) for place in tree] for tree in members]
            grown = [(pairs[0][0], [completion for _, completion in pairs]) for pairs in read]
            yield lay_out(grown, np.concatenate(members) if members else chosen)


class _Meter:
    """Rates and the time that is left. Between two meetings the other ranks are taken to be as far as this one, but no
    further than to the window's end, so that what is said to be done is never taken back."""

    def __init__(self, tokens: np.ndarray, watch: Watch):
        self._tokens, self._watch = tokens, watch
        self._all = int(tokens.sum())
        self._rows = self._read = self._window = self._said = 0
        # rows and tokens of all ranks until they last met, the rows that they are at, and the most tokens told so far
        self._own = np.zeros(2, np.int64)
        # this rank's rows and tokens since then
        self._started = time.monotonic()

    def begin(self, rows: int) -> None:
        self._window = rows

    def add(self, places: np.ndarray) -> None:
        self._own += (places.size, self._tokens[places].sum())
        rows, tokens = self._own * comm.size(comm.DATA)
        self._tell(self._rows + min(int(rows), self._window), self._read + int(tokens))

    def meet(self) -> None:
        """Collective, at the end of a window."""
        self._rows += self._window
        self._read += int(comm.sum_(torch.from_numpy(self._own), comm.DATA)[1])
        self._own = np.zeros(2, np.int64)
        self._tell(self._rows, self._read)

    def _tell(self, rows: int, read: int) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        read = self._said = min(max(read, self._said), self._all)
        self._watch(
            Progress(
                done=rows,
                total=self._tokens.size,
                rows_per_second=rows / seconds,
                tokens_per_second=read / seconds,
                seconds_left=seconds * (self._all - read) / max(read, 1),
            )
        )


def _exchange(logps: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every rank's values, everywhere; where several have one, the lowest rank's counts, so that all agree."""
    if comm.world_size() == 1:
        return logps, found
    owner = torch.from_numpy(np.where(found, comm.rank(), comm.world_size()))
    comm.min_(owner, comm.WORLD)
    mine = torch.from_numpy(logps) * (owner == comm.rank())
    return comm.sum_(mine, comm.WORLD).numpy(), (owner < comm.world_size()).numpy()

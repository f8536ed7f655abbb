"""The reference's log-prob of every pair that a run is going to meet.

1. `wanted_pairs`   the rows of every step, each with itself, and the step's KL pairs; rows no step takes cost nothing
2. `RefLogps.of`    looks them up in the store; what some rank's store lacks is scored by all ranks together,
                    shard by shard, written by the rank that computed it, and exchanged over the process group
3. the reference engine exists only inside 2, and is gone when it returns

Hit or miss is decided once for all ranks, so hosts without a shared file system may hold different shards.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from kto_dist import comm
from kto_dist.batch import Plan, microbatches, pair_lengths, pair_tokens, step_kl_pairs, step_rows
from kto_dist.causal_lm import completion_logps
from kto_dist.examples import Examples
from kto_dist.models import Reference
from kto_dist.shards import keys_array, pair_key
from kto_dist.store import Store

# Pairs a rank that are cut into micro-batches at a time: enough to balance, few enough that a shard is soon written.
WINDOW = 2048

Progress = Callable[[int, int, float, float], None]
# (pairs done, pairs in all, pairs a second, tokens a second)


def wanted_pairs(plan: Plan, train: Examples) -> tuple[np.ndarray, np.ndarray]:
    """(P,) rows that give the prompt, (P,) rows that give the completion, without repeats."""
    prompts, completions = [], []
    for step in range(plan.steps):
        rows = step_rows(plan, step)
        kl_prompts, kl_completions = step_kl_pairs(plan, step, rows, train.prompt_group)
        prompts += [rows, kl_prompts]
        completions += [rows, kl_completions]
    both = np.unique(np.stack([np.concatenate(prompts), np.concatenate(completions)], axis=1), axis=0)
    return both[:, 0], both[:, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a pass over one list of pairs did."""

    pairs: int
    hits: int
    # found in the store; the others were scored
    seconds: float


class RefLogps:
    """(prompt row, completion row) -> log-prob of the completion under the reference."""

    def __init__(self, examples: Examples, prompts: np.ndarray, completions: np.ndarray, logps: np.ndarray):
        code = prompts.astype(np.int64) * len(examples) + completions
        order = np.argsort(code)
        self._rows, self._code, self._logps = len(examples), code[order], logps[order]

    def __call__(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:  # (P,) fp64
        code = prompts.astype(np.int64) * self._rows + completions
        place = np.minimum(np.searchsorted(self._code, code), self._code.size - 1)
        assert (self._code[place] == code).all(), "a pair was not scored ahead"
        return self._logps[place]


def reference_logps(
    examples: Examples,
    prompts: np.ndarray,
    completions: np.ndarray,
    *,
    store: Store,
    engine: Callable[[], Reference],
    max_length: int,
    prompt_limit: int,
    tokens_per_batch: int,
    packed: bool,
    budget: int,
    progress: Progress,
) -> tuple[RefLogps, Outcome]:
    """Collective. `engine` is called (on every rank) only when something is missing: see `lazily`."""
    started = time.monotonic()
    prompt_kept, completion_kept = pair_lengths(examples, prompts, completions, max_length, prompt_limit)
    keys = keys_array(
        [
            pair_key(*pair_tokens(examples, j, k, p, c))
            for j, k, p, c in zip(
                prompts.tolist(), completions.tolist(), prompt_kept.tolist(), completion_kept.tolist(), strict=True
            )
        ]
    )
    logps, found = _exchange(*store.lookup(keys))
    hits = int(found.sum())

    # Rows with equal text share a key: the first of them is scored for all.
    _, first, same_as = np.unique(keys, return_index=True, return_inverse=True)
    missing = first[~found[first]]
    # longest first: the estimate of the time that is left then errs on the safe side, and memory peaks at the start
    missing = missing[np.argsort(-(prompt_kept + completion_kept)[missing], kind="stable")]
    if missing.size:
        reference = engine()
        done, tokens = 0, 0
        size = WINDOW * comm.world_size()
        for start in range(0, missing.size, size):
            window = missing[start : start + size]
            batches = microbatches(
                examples,
                prompts[window],
                completions[window],
                max_length=max_length,
                prompt_limit=prompt_limit,
                budget=tokens_per_batch,
                packed=packed,
                rank=comm.rank(),
                ranks=comm.world_size(),
            )
            own, values = [np.zeros(0, np.int64)], [np.zeros(0)]
            for batch in batches:
                with torch.no_grad():
                    scored = completion_logps(
                        reference.forward, batch.to(comm.device()), reference.model.transform, budget
                    )
                own.append(window[batch.position.numpy()])
                values.append(scored.cpu().numpy())
                # the others' shares are about as large; the end of the window says it exactly
                done += batch.lengths.numel() * comm.world_size()
                tokens += batch.tokens * comm.world_size()
                seconds = time.monotonic() - started
                progress(min(done, start + window.size), missing.size, done / seconds, tokens / seconds)
            done = start + window.size
            progress(done, missing.size, done / seconds, tokens / seconds)
            places, scored_values = np.concatenate(own), np.concatenate(values)
            store.add(keys[places], scored_values, completion_kept[places])
            logps[places], found[places] = scored_values, True
            comm.barrier()  # without it ranks drift apart over hours, and the last exchange meets its time-out
        logps, found = _exchange(logps, found)
        logps = logps[first][same_as]
    assert found[first].all()
    outcome = Outcome(pairs=keys.size, hits=hits, seconds=time.monotonic() - started)
    return RefLogps(examples, prompts, completions, logps), outcome


def _exchange(logps: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every rank's values, everywhere; where several have one, the lowest rank's counts, so that all agree."""
    if comm.world_size() == 1:
        return logps, found
    owner = torch.from_numpy(np.where(found, comm.rank(), comm.world_size()))
    comm.min_(owner)
    mine = torch.from_numpy(logps) * (owner == comm.rank())
    return comm.sum_(mine).numpy(), (owner < comm.world_size()).numpy()


@contextmanager
def lazily(build: Callable[[], Reference]) -> Iterator[Callable[[], Reference]]:
    """An engine that is built on first use, shared by several passes, and freed at the end."""
    engines: list[Reference] = []

    def get() -> Reference:
        if not engines:
            engines.append(build())
        return engines[0]

    try:
        yield get
    finally:
        while engines:
            engines.pop().close()

"""Which rows a step takes, which KL pairs they form, and how both are cut into micro-batches.

1. `step_rows`      (seed, epoch, step) -> the rows of one optimizer step
2. `kl_pairs`       (seed, epoch, step), rows -> prompts with another prompt's completion, to estimate z0
3. `cut`            lengths, tokens of a micro-batch, ranks -> micro-batches, balanced, the same number on every rank
4. `collate`        the pairs of one micro-batch -> tensors
5. `microbatches`   2 to 4 for a list of pairs: the one way from pairs to micro-batches, each made when it is its turn

All of 1 to 3 is a function of its arguments alone: every rank computes the whole plan and takes its own share, so
no cluster shape changes which rows or pairs a step uses, and the reference can score them ahead.

A pair (j, k) is the prompt of row j with the completion of row k; (i, i) is row i itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kto_dist.data.examples import Examples, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides the rows and pairs of every step of a run."""

    seed: int
    rows: int
    """Of the training set."""
    global_batch: int
    """Rows of a full step; an epoch's last step takes what is left."""
    epochs: float
    max_steps: int | None
    kl_pairs_per_step: int | None
    """0: none; None: one a row."""
    max_length: int
    prompt_limit: int
    units: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(U, unit) rows that steps take, of each unit one after the other; None: every row is a unit."""

    @property
    def unit(self) -> int:
        """Rows that are never parted: 1, or 2 for pairs."""
        return 1 if self.units is None else self.units.shape[1]

    @property
    def taken(self) -> int:
        """Rows of an epoch; a row that is in two pairs counts twice."""
        return self.rows if self.units is None else self.units.size

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.taken, self.global_batch)
        # one row alone would have no KL partner, so it joins the step before
        return max(1, full + (rest > 1))

    @property
    def steps(self) -> int:
        return self.max_steps or max(1, round(self.epochs * self.steps_per_epoch))

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step, both from 0."""
        return divmod(step, self.steps_per_epoch)


def step_rows(plan: Plan, step: int) -> np.ndarray:  # (B,) int64
    """The rows of one optimizer step: each epoch is a fresh shuffle in which every unit appears once."""
    epoch, within = plan.epoch_of(step)
    start, size = within * plan.global_batch // plan.unit, plan.global_batch // plan.unit
    stop = plan.taken // plan.unit if within == plan.steps_per_epoch - 1 else start + size
    chosen = _shuffle(plan.seed, epoch, plan.taken // plan.unit)[start:stop]
    return chosen if plan.units is None else plan.units[chosen].ravel()


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, rows: int) -> np.ndarray:
    order = np.random.default_rng([seed, 0, epoch]).permutation(rows)
    order.setflags(write=False)  # the cache hands out the same array again
    return order


def kl_pairs(
    seed: tuple[int, ...],
    rows: np.ndarray,  # (B,) int64
    group: np.ndarray,  # (B,) int64, equal for rows with the same prompt
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # (K,) rows that give the prompt, (K,) rows that give the completion
    """A random derangement: every prompt meets a completion of another prompt, every completion is used at most once.

    Rows of one prompt are laid side by side, in random order, and completions are shifted by the size of the largest
    such group m: nobody then meets its own group, unless m exceeds half of the rows. In that case 2 (B - m) rows
    find a partner, the most there can be, and the others have none.
    """
    rng = np.random.default_rng(seed)
    member, size = _groups(group)
    order = np.lexsort((rng.random(rows.size), rng.permutation(size.size)[member]))
    largest = int(size.max(initial=0))
    partner = np.concatenate([order[largest:], order[:largest]])
    valid = group[order] != group[partner]
    prompts, completions = rows[order[valid]], rows[partner[valid]]
    keep = rng.permutation(prompts.size)[:limit]
    return prompts[keep], completions[keep]


def _groups(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) the group's number by its value, (groups,) sizes: `np.unique` in a third of its time, once a step."""
    order = group.argsort(kind="stable")
    ordered = group[order]
    new = np.empty(group.size, dtype=bool)
    new[:1], new[1:] = True, ordered[1:] != ordered[:-1]
    member = np.empty(group.size, np.int64)
    member[order] = new.cumsum() - 1
    return member, np.bincount(member)


def step_kl_pairs(plan: Plan, step: int, rows: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The KL pairs of a training step (`group` as in `Examples.prompt_group`, of the whole training set)."""
    if plan.kl_pairs_per_step == 0:
        return rows[:0], rows[:0]
    epoch, within = plan.epoch_of(step)
    return kl_pairs((plan.seed, 1, epoch, within), rows, group[rows], plan.kl_pairs_per_step)


def heldout_pairs(seed: int, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """KL pairs of the held-out rows: a function of the seed alone, so every evaluation asks about the same ones."""
    return kl_pairs((seed, 2), np.arange(len(examples)), examples.prompt_group)


def pair_lengths(
    examples: Examples, prompts: np.ndarray, completions: np.ndarray, max_length: int, prompt_limit: int
) -> tuple[np.ndarray, np.ndarray]:  # (P,) prompt tokens, (P,) completion tokens
    """Tokens that each pair keeps: both rows fit alone, but a long prompt with a long completion may not."""
    return fit(examples.prompt_lengths[prompts], examples.completion_lengths[completions], max_length, prompt_limit)


def pair_tokens(
    examples: Examples, prompt: int, completion: int, prompt_kept: int, completion_kept: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a pair: the end of one row's prompt, the start of one row's completion."""
    ids = examples.prompt(prompt)
    return ids[len(ids) - prompt_kept :], examples.completion(completion)[:completion_kept]


def cut(
    lengths: np.ndarray,  # (P,) tokens of each pair
    *,
    tokens: int,  # of one micro-batch at most, padding included
    ranks: int,
    packed: bool,
    unit: int = 1,  # neighbours that stay together: 2 for pairs
    apart: int | None = None,  # longer pairs share no micro-batch with others
    multiple: int = 1,  # of positions: padded rows are run as wide as one
) -> list[list[np.ndarray]]:  # [rank][micro-batch] -> positions into `lengths`; all ranks have equally many
    """Few micro-batches, each of so many tokens at most, of nearly equal cost at the same turn of all ranks.

    Packed: longest first into the emptiest bin that has room. Padded: neighbours in length share a micro-batch.
    Some micro-batches may be empty. Raises `ValueError` where one row (or unit) alone has more.
    """
    if apart is not None and lengths.size and lengths.min() <= apart < lengths.max():
        assert unit == 1, "a pair may have a row on either side"
        groups = [np.flatnonzero(lengths > apart), np.flatnonzero(lengths <= apart)]
        shares = [cut(lengths[group], tokens=tokens, ranks=ranks, packed=packed, multiple=multiple) for group in groups]
        return [
            [group[positions] for group, share in zip(groups, shares, strict=True) for positions in share[rank]]
            for rank in range(ranks)
        ]
    # what a unit takes of a micro-batch
    sizes = unit_sizes(lengths.reshape(-1, unit), tokens, packed=packed, multiple=multiple)
    if sizes.size and sizes.max() > tokens:
        what = "row" if unit == 1 else "pair"
        raise ValueError(f"a {what} of {sizes.max()} tokens exceeds the {tokens} tokens of a micro-batch")
    order = np.argsort(-sizes, kind="stable")
    bins = _packed_bins(sizes, order, tokens, ranks) if packed else _padded_bins(sizes, order, tokens, ranks)
    cost = np.array([sizes[b].sum() if packed else sizes[b].max(initial=0) * b.size for b in bins])
    turns = np.argsort(-cost, kind="stable").reshape(-1, ranks)
    rows = [(b[:, None] * unit + np.arange(unit)).ravel() for b in bins]
    return [[rows[turns[turn, rank]] for turn in range(turns.shape[0])] for rank in range(ranks)]


def unit_sizes(
    lengths: np.ndarray,  # (U, unit) tokens of each pair
    tokens: int,  # of one micro-batch at most
    *,
    packed: bool,
    multiple: int,
) -> np.ndarray:  # (U,)
    """What each unit takes of a micro-batch: all of it, where one fits alone and rounded up does not."""
    if packed:
        return lengths.sum(1)
    widths, unit = lengths.max(1, initial=0), lengths.shape[1]
    rounded = -(-widths // multiple) * multiple
    return np.maximum(widths, np.minimum(rounded, tokens // unit)) * unit


def _packed_bins(lengths: np.ndarray, order: np.ndarray, tokens: int, ranks: int) -> list[np.ndarray]:
    count = ranks * max(1, -(-int(lengths.sum()) // (tokens * ranks)))
    while True:
        load = np.zeros(count, dtype=np.int64)
        members: list[list[int]] = [[] for _ in range(count)]
        for position in order:
            emptiest = int(load.argmin())
            if load[emptiest] + lengths[position] > tokens:
                break
            load[emptiest] += lengths[position]
            members[emptiest].append(position)
        else:
            return [np.array(m, dtype=np.int64) for m in members]
        count += ranks


def _padded_bins(lengths: np.ndarray, order: np.ndarray, tokens: int, ranks: int) -> list[np.ndarray]:
    bins: list[np.ndarray] = []
    start = 0
    while start < order.size:
        width = max(1, int(lengths[order[start]]))
        stop = min(order.size, start + tokens // width)
        bins.append(order[start:stop])
        start = stop
    # a multiple of the number of ranks, by halving the costliest: idle ranks would wait for it anyway
    while len(bins) % ranks or not bins:
        costs = [lengths[b].max(initial=0) * b.size if b.size > 1 else -1 for b in bins]
        if not bins or max(costs) < 0:
            bins.append(order[:0])
            continue
        widest = int(np.argmax(costs))
        whole = bins.pop(widest)
        bins += [whole[: whole.size // 2], whole[whole.size // 2 :]]
    return bins


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward takes. R rows of T positions, N completion tokens, S sequences; R = 1 when packed."""

    input_ids: Tensor
    """(R, T) int64"""
    position_ids: Tensor
    """(R, T) int64; restart at 0 with every sequence."""
    attention_mask: Tensor | None
    """(R, T) int64, 1 where there is a token; None where nothing is padded."""
    bounds: Tensor
    """(S + 1,) int32 into the flattened (R * T) positions: where each sequence starts, and the last one ends. A run of
    padding has bounds too, like a sequence."""
    longest: int
    """Most positions between two bounds."""
    gather: Tensor
    """(N,) int64 into the flattened (R * T) hidden states: the position before each completion token."""
    target: Tensor
    """(N,) int64, the completion tokens, sequence after sequence."""
    lengths: Tensor
    """(S,) int64, completion tokens of each sequence, sum N. It stays on the CPU, where the LM head's rows are cut."""
    position: Tensor
    """(S,) int64 into the list of pairs that was cut."""
    tokens: int
    """Positions that hold a token."""

    def pinned(self) -> "MicroBatch":
        """In page-locked memory where there is a GPU, so that a copy to it does not make the host wait."""
        if not torch.cuda.is_available():
            return self
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """With what the device needs somewhere else."""
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            bounds=move(self.bounds),
            gather=move(self.gather),
            target=move(self.target),
            position=move(self.position),
        )


# Positions of a micro-batch without sequences. One alone would leave parameters that act from token to token without a
# gradient (rwkv's decay), and ranks that sum up different gradients crash.
_IDLE = 8


def collate(
    sequences: list[tuple[np.ndarray, np.ndarray]],  # (prompt ids, completion ids) of S pairs, cut to length
    position: np.ndarray,  # (S,) their places in the list that was cut
    *,
    packed: bool,
) -> MicroBatch:
    """One micro-batch. Without sequences it is a few positions and no completion row: a rank with nothing to do still
    runs the model, because the others wait for its share of the weights and of every gradient."""
    lengths = np.array([len(p) + len(c) for p, c in sequences], dtype=np.int64)
    width = int(lengths.sum() if packed else lengths.max(initial=0)) or _IDLE
    rows = 1 if packed or not sequences else len(sequences)
    ids = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((rows, width), dtype=np.int64)
    mask = np.zeros((rows, width), dtype=np.int64)
    starts = np.zeros(len(sequences), dtype=np.int64)
    if not sequences:
        positions[0] = np.arange(width)
    else:
        starts = np.cumsum(lengths) - lengths if packed else np.arange(rows, dtype=np.int64) * width

    # sequences and runs of padding start and end here; an empty one has no place
    edges = np.concatenate([np.array([0, rows * width]), starts, starts + lengths])
    bounds = np.unique(edges).astype(np.int32)
    gather, target = [], []
    for (prompt, completion), start in zip(sequences, starts, strict=True):
        span = slice(start, start + len(prompt) + len(completion))
        ids.reshape(-1)[span] = np.concatenate([prompt, completion])
        positions.reshape(-1)[span] = np.arange(span.stop - span.start)
        mask.reshape(-1)[span] = 1
        first = start + len(prompt)
        gather.append(np.arange(first - 1, first - 1 + len(completion)))
        target.append(completion)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=None if mask.all() or packed or not sequences else torch.from_numpy(mask),
        bounds=torch.from_numpy(bounds),
        longest=int(np.diff(bounds).max()),
        gather=torch.from_numpy(np.concatenate(gather).astype(np.int64) if gather else np.zeros(0, np.int64)),
        target=torch.from_numpy(np.concatenate(target).astype(np.int64) if target else np.zeros(0, np.int64)),
        lengths=torch.tensor([len(c) for _, c in sequences], dtype=torch.int64),
        position=torch.from_numpy(np.asarray(position, dtype=np.int64)),
        tokens=int(lengths.sum()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """How pairs become micro-batches, for every pass of a run."""

    max_length: int
    """Tokens that a pair keeps at the most."""
    prompt_limit: int
    """Tokens that the prompt of an over-long pair keeps."""
    tokens: int
    """Of one micro-batch at the most, padding included."""
    packed: bool
    """Whether sequences lie end to end in one row, or padded in rows of their own."""
    apart: int | None = None
    """Longer sequences share no micro-batch with others: from there on the model is another function of a row, for all
    rows of a forward (`attention.switch_length`)."""
    multiple: int = 1
    """Padded rows are run as wide as a multiple of this, and count so (`causal_lm.round_width`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatches:
    """A rank's micro-batches of a list of pairs: how many is known at once, each is made when it is its turn."""

    shares: Sequence[np.ndarray]
    """Of each micro-batch the positions in the list that was cut."""
    make: Callable[[np.ndarray], MicroBatch]

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.make, self.shares)


def microbatches(
    examples: Examples,
    prompts: np.ndarray,  # (P,) rows that give the prompt
    completions: np.ndarray,  # (P,) rows that give the completion
    cutting: Cutting,
    *,
    rank: int,
    ranks: int,
    unit: int = 1,  # neighbours in the list that stay together
) -> MicroBatches:
    """This rank's micro-batches of a list of pairs, equally many on every rank; `position` points into the list."""
    prompt_kept, completion_kept = pair_lengths(
        examples, prompts, completions, cutting.max_length, cutting.prompt_limit
    )
    lengths = prompt_kept + completion_kept
    shares = cut(
        lengths,
        tokens=cutting.tokens,
        ranks=ranks,
        packed=cutting.packed,
        unit=unit,
        apart=cutting.apart,
        multiple=cutting.multiple,
    )[rank]

    def sequence(place: int) -> tuple[np.ndarray, np.ndarray]:
        return pair_tokens(
            examples, int(prompts[place]), int(completions[place]), prompt_kept[place], completion_kept[place]
        )

    def make(share: np.ndarray) -> MicroBatch:
        return collate([sequence(int(place)) for place in share], share, packed=cutting.packed)

    return MicroBatches(shares=shares, make=make)

"""Completions of one prompt scored together: the prompt's tokens go through the model once.

A tree is a prompt with several completions in one row, [x | y | y' | ...]. A mask lets each completion see the prompt
and itself, and positions go on from the prompt's end in each, so that every completion is scored as if it were alone.
A row's KL pair lends its prompt to another row's completion: nearly every prompt has two completions at least.

1. `grow`      pairs -> trees, each with a bounded width
2. `cost`      what a list of trees costs, in tokens: attention over wide rows is what sharing pays with
3. `lay_out`    trees -> one micro-batch

The mask is one that only plain attention understands: `can_share` says for which models. Wide rows would spend more on
attention between completions, which the mask then hides, than the prompt's second pass costs. A tree of a prompt of p
tokens with k completions of c costs T + T^2 / T0 tokens, T = p + k c, if attention over T0 positions costs as much as
all the rest of the model; a completion's share of that is the least at k c = sqrt(p (p + T0)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from kto_dist.data.batch import MicroBatch, collate
from kto_dist.model.attention import ATTENTIONS, cannot_pack, switch_length
from kto_dist.model.causal_lm import Forward, ScoringModel
from kto_dist.model.checks import (
    SHORT,
    Observed,
    Pair,
    Rounding,
    Trial,
    counted,
    drawer,
    leaks,
    observe,
    rounding_of,
    trials,
)

# T0 over the model's hidden size, measured with SmolLM2-135M in bf16 on two CPU cores (see benchmarks/README.md).
T0_OVER_HIDDEN = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """P pairs laid out as trees: tree t holds `pairs[starts[t] : starts[t + 1]]`, which have the same prompt."""

    pairs: np.ndarray
    """(P,) int64 into the list of pairs."""
    starts: np.ndarray
    """(trees + 1,) int64."""
    tokens: np.ndarray
    """(trees,) int64, the prompt's once and those of its completions."""

    def __len__(self) -> int:
        return self.tokens.size

    def __getitem__(self, tree: int) -> np.ndarray:
        return self.pairs[self.starts[tree] : self.starts[tree + 1]]


def can_share(config: PretrainedConfig, attention: str, max_length: int) -> str | None:
    """Why trees cannot be scored with this model, or None. What a config does not say, `sharing_is_exact` finds."""
    if not ATTENTIONS[attention].takes_mask:
        able = " or ".join(name for name, row in ATTENTIONS.items() if row.takes_mask)
        return f"attention {attention} takes no mask of its own: it needs {able}"
    if reason := cannot_pack(config, max_length):
        return reason
    if switch := switch_length(config, max_length):
        return (
            f"a tree longer than {switch} tokens would turn its shorter completions with longrope's other frequencies"
        )
    text = config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(text, name, None)
        if window and window < max_length and getattr(text, "use_sliding_window", True):
            return f"some layers see {window} positions back ({name}), which a tree's mask does not know"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", "") == "alibi":
        return "positions are counted along the row (ALiBi), and a tree's completions lie side by side"
    return None


def grow(
    prompt: np.ndarray,  # (P,) equal where pairs have the same prompt, cut alike
    prompt_tokens: np.ndarray,  # (P,)
    completion_tokens: np.ndarray,  # (P,)
    *,
    widest: int,  # most tokens of a tree
    t0: float,
) -> Trees:
    """Longest completions first, so that those of one tree are of a length; no tree is wider than `widest`."""
    order = np.lexsort((-completion_tokens, prompt))
    group, p, c = prompt[order], prompt_tokens[order].astype(np.int64), completion_tokens[order].astype(np.int64)
    new_group = np.ones(order.size, dtype=bool)
    new_group[1:] = group[1:] != group[:-1]
    member = np.cumsum(new_group) - 1
    # tokens of the same prompt's completions before this one
    before = np.cumsum(c) - c
    before -= before[new_group][member] if order.size else 0
    longest = c[new_group][member] if order.size else c
    # A tree ends with the completion that passes the limit, so it has to fit on top. With no room at all every
    # completion is a tree of its own, since each has a token at least.
    limit = np.maximum(1, np.minimum(np.sqrt(p * (p + t0)).astype(np.int64), widest - p - longest))
    number = before // limit
    new_tree = new_group.copy()
    new_tree[1:] |= number[1:] != number[:-1]
    starts = np.flatnonzero(new_tree)
    tokens = p[starts] + np.add.reduceat(c, starts) if starts.size else p
    return Trees(pairs=order, starts=np.append(starts, order.size), tokens=tokens)


def cost(tokens: np.ndarray, t0: float) -> float:
    """What rows of these lengths cost, in tokens of which attention is no part."""
    tokens = tokens.astype(np.float64)
    return float((tokens + tokens**2 / t0).sum())


def lay_out(trees: list[tuple[np.ndarray, list[np.ndarray]]], position: np.ndarray) -> MicroBatch:
    """(prompt, completions) of each tree -> one micro-batch; its attention mask is (R, 1, T, T), true where seen."""
    if not trees:
        return collate([], position, packed=False)
    used = [len(prompt) + sum(map(len, completions)) for prompt, completions in trees]
    rows, width = len(trees), max(used)
    ids = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((rows, width), dtype=np.int64)
    # 0: the prompt, which all see; then a number a completion; -1: padding, which sees itself (a softmax over nothing
    # is not a number) and which nobody gathers
    branch = np.full((rows, width), -1, dtype=np.int64)
    gather, target = [], []
    for row, (prompt, completions) in enumerate(trees):
        stop = len(prompt)
        ids[row, :stop], positions[row, :stop], branch[row, :stop] = prompt, np.arange(stop), 0
        for number, completion in enumerate(completions, start=1):
            start, stop = stop, stop + len(completion)
            ids[row, start:stop] = completion
            positions[row, start:stop] = len(prompt) + np.arange(len(completion))
            branch[row, start:stop] = number
            # the prompt's last token predicts the first of every completion
            gather += [row * width + len(prompt) - 1, *range(row * width + start, row * width + stop - 1)]
            target.append(completion)
    of = torch.from_numpy(branch)
    seen = (of[:, :, None] == of[:, None, :]) | (of[:, None, :] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=seen[:, None],
        bounds=torch.arange(0, rows * width + 1, width, dtype=torch.int32),
        longest=width,
        gather=torch.tensor(gather, dtype=torch.int64),
        target=torch.from_numpy(np.concatenate(target).astype(np.int64)),
        lengths=torch.tensor([len(completion) for _, completions in trees for completion in completions]),
        position=torch.from_numpy(np.asarray(position, dtype=np.int64)),
        tokens=sum(used),
    )


@torch.no_grad()
def sharing_is_exact(
    forward: Forward, model: ScoringModel, device: torch.device, max_length: int, rounding: Rounding
) -> bool:
    """Collective where weights are sharded. Scores a few completions in a tree and alone, and beside other completions.

    It finds families that carry a state along the row (Mamba, RWKV, linear attention), those that build another mask
    than the one that they are given, and those that take none of this form.
    """
    # the longest: its first layers show what all of them do
    trial = trials(forward, model, device, max_length)[-1]
    pairs, others = _siblings(model, trial.tokens)
    score = partial(_in_a_tree, trial)
    try:
        with trial.layers():
            alone = trial.alone(pairs[1:])
            # with a mask of its own attention rounds in another way
            by_itself = torch.cat([score([pair]) for pair in pairs[1:]])
            seen = observe(score, pairs, others, by_itself, counted(pairs[1:]))
    except (RuntimeError, ValueError, TypeError, IndexError):  # whatever the family's own code makes of the mask
        return False
    off = float(((by_itself - alone).abs() / counted(pairs[1:]).sqrt()).max())
    # not even a spread of 1 would explain more
    explained = off <= rounding_of(model, 1.0).limit
    return explained and not leaks(seen, rounding, Observed(apart=0.0, moved=0.0))


def _in_a_tree(trial: Trial, pairs: Sequence[Pair]) -> Tensor:  # (S,)
    """A tree of all pairs, which have one prompt, and where that costs little a narrow one beside it, for padding."""
    prompt = pairs[0][0]
    trees = [(prompt, [completion for _, completion in pairs])]
    if trial.tokens <= 4 * SHORT:
        trees.append((prompt[:2], [pairs[0][1][:2]]))
    return trial.logps(lay_out(trees, np.arange(len(pairs) + len(trees) - 1)))[: len(pairs)]


def _siblings(model: ScoringModel, total: int) -> tuple[list[Pair], list[Pair]]:
    """Three completions of one prompt, and the same with another first one."""
    draw = drawer(model, 2)
    prompt, first, short = draw(total // 4), total // 4, min(max(4, total // 8), 16)
    rest = total - prompt.size - first - short
    completions = [draw(count) for count in (first, short, rest)]
    pairs = [(prompt, completion) for completion in completions]
    return pairs, [(prompt, draw(first)), *pairs[1:]]

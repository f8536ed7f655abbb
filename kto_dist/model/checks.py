"""Whether log-probs are the model's own, and those of each sequence alone: neither shows at step 0, since the reference
would be wrong too.

1. `check_head`    a few short rows against the model's own forward, given token ids and nothing else
2. `observe`       sequences scored together and alone, and together with other neighbours: what they see of each other
3. `check_scoring` both, for rows side by side and for packed ones
4. `trials`        where 2 is done: short with the whole model, and as long as rows may be with its first layers

That a neighbour's tokens change a sequence's log-prob is the sharp sign, in any dtype: where nothing leaks the same
operations run on the same numbers, and not one bit differs (with experts a few, since rows of an expert are multiplied
together). A difference to the sequence alone may be rounding, whose spread is measured on rows that lie side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base.errors import UserError
from kto_dist.data.batch import MicroBatch, collate
from kto_dist.model.attention import CHOSEN, switch_length
from kto_dist.model.causal_lm import Forward, ScoringModel, completion_logps

# Differences are in nats over the root of the tokens: errors of single tokens add up like a random walk.
CAP = {torch.float32: 2e-2, torch.bfloat16: 0.5}
"""More than this is no rounding, whatever was measured."""
FLOOR = {torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Less than this is: in bf16 177 families in miniature stayed below 0.06, and with SmolLM2's 30 layers the worst of 16
rows was 0.13 off, scored in a tree of prompts and packed."""
MOVED = {torch.float32: 2e-5, torch.bfloat16: 1e-4}
"""What is a neighbour's doing, where the same operations run on the same numbers and not one bit should differ. It does
not widen with the room for rounding: trocr's packed rows moved by 0.0013 in bf16, and were 0.2 off."""
SPREAD = 4
"""How far beyond the largest measured rounding another way of computing the same may round."""

Pair = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt and of a completion."""
ROWS = 64
"""Most completion tokens of a sequence that are looked at: the head would cost more than the layers."""
SHORT = 32
"""Tokens that sequences of a trial have together with the whole model."""
LONG_ON_CPU = 1024
"""Most tokens of a trial on a CPU, where they take as long as a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What rounding explains in this model."""

    spread: float
    """Largest difference that was measured between rows side by side and alone."""
    limit: float
    """Largest difference that counts as rounding."""
    jumps: bool = False
    """Whether a rounded score may choose another expert, or other tokens to attend to: a row among many may then be far
    off, whatever the others are."""
    moved: float = 0.0
    """Largest difference between runs of the same operations that is none of a neighbour's doing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Largest differences of sequences that were scored together; both 0 where every bit agrees."""

    apart: float
    """To each alone."""
    moved: float
    """To themselves beside other neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A way to run the model, and how many tokens its sequences have together."""

    forward: Forward
    model: ScoringModel
    device: torch.device
    tokens: int
    few: bool
    """Of the layers only the first."""

    def layers(self) -> AbstractContextManager[None]:
        """In which the trial is run."""
        return first_layers(self.model.lm) if self.few else nullcontext()

    def logps(self, batch: MicroBatch) -> Tensor:  # (S,) fp64 on the CPU
        few = thinned(batch).to(self.device)
        return completion_logps(self.forward, few, self.model.transform, 2**28).cpu()

    def alone(self, pairs: Sequence[Pair]) -> Tensor:
        return torch.cat([self.logps(collate([pair], np.zeros(1), packed=False)) for pair in pairs])

    def together(self, pairs: Sequence[Pair], *, packed: bool) -> Tensor:
        return self.logps(collate(list(pairs), np.arange(len(pairs)), packed=packed))


def rounding_of(model: ScoringModel, spread: float) -> Rounding:
    dtype, jumps = dtype_of(model), chooses(model.lm.config)
    cap = CAP[dtype] if jumps else CAP[dtype] / 2
    limit = min(cap, max(FLOOR[dtype], SPREAD * spread))
    return Rounding(spread=spread, limit=limit, jumps=jumps, moved=limit if jumps else MOVED[dtype])


def chooses(config: PretrainedConfig) -> bool:
    """Whether scores choose among experts or tokens, so that one rounded otherwise may change much."""
    text = config.get_text_config()
    # dbrx's stand in a config within its own
    parts = [text, *(part for part in vars(text).values() if isinstance(part, PretrainedConfig))]
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
    return any((getattr(part, name, None) or 0) > 1 for part in parts for name in (*names, *CHOSEN))


def drawer(model: ScoringModel, seed: int) -> Callable[[int], np.ndarray]:
    """Random tokens, none of which a family takes for padding or an end."""
    text = model.lm.config.get_text_config()
    special = [getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "mask")]
    kept = np.setdiff1d(np.arange(text.vocab_size), [x for x in special if isinstance(x, int)])
    draw = np.random.default_rng(seed)
    return lambda count: draw.choice(kept, size=count)


def thinned(batch: MicroBatch) -> MicroBatch:
    """With at most ROWS completion tokens a sequence: the first, where a state still knows what came before, the last,
    beyond windows and what else has a reach, and some between."""
    kept, start = [], 0
    for length in batch.lengths.tolist():
        ends = np.arange(min(length, ROWS // 4))
        between = np.linspace(0, max(length - 1, 0), min(length, ROWS // 2)).astype(np.int64)
        kept.append(start + np.unique(np.concatenate([ends, between, length - 1 - ends])))
        start += length
    rows = torch.from_numpy(np.concatenate(kept).astype(np.int64)) if kept else torch.zeros(0, dtype=torch.int64)
    return replace(
        batch,
        gather=batch.gather[rows],
        target=batch.target[rows],
        lengths=torch.tensor([len(places) for places in kept], dtype=torch.int64),
    )


def trials(forward: Forward, model: ScoringModel, device: torch.device, max_length: int) -> list[Trial]:
    """A short one, and one as long as rows may be where a config allows for them. On a CPU the long one runs the first
    layers alone, one of each kind at least; where they cannot be run apart, all of them."""
    config = model.lm.config
    # rows beyond a switch share no micro-batch with others
    longest = min(switch_length(config, max_length) or max_length, _context(config))
    short = Trial(forward=forward, model=model, device=device, tokens=max(12, min(SHORT, longest)), few=False)
    if longest <= SHORT:
        return [short]
    if device.type != "cpu" or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return [short, replace(short, tokens=longest)]
    long = replace(short, forward=model, tokens=min(longest, LONG_ON_CPU), few=True)
    try:
        with long.layers():
            long.alone([(np.arange(2), np.arange(2))])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # of the family's own code
        long = replace(long, few=False)
    return [short, long]


def _context(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or 2**31


@contextmanager
def first_layers(lm: PreTrainedModel) -> Iterator[None]:
    """The model with as many of its layers as hold each kind once, two at least."""
    count = getattr(lm.config.get_text_config(), "num_hidden_layers", 0)
    found = [
        (module, name, layers)
        for module in lm.modules()
        for name, layers in module.named_children()
        if isinstance(layers, nn.ModuleList) and len(layers) == count
    ]
    if len(found) != 1 or (kept := _one_of_each(lm.config, found[0][2])) > count // 2:
        yield
        return
    module, name, layers = found[0]
    setattr(module, name, nn.ModuleList(layers[:kept]))
    try:
        yield
    finally:
        setattr(module, name, layers)


def _one_of_each(config: PretrainedConfig, layers: nn.ModuleList) -> int:
    """The least number of first layers among which every kind is."""
    text = config.get_text_config()
    named = list(getattr(text, "layer_types", None) or ())
    kinds = [
        (named[number] if number < len(named) else "", *sorted(type(part).__name__ for part in layer.modules()))
        for number, layer in enumerate(layers)
    ]
    return max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))


def observe(
    score: Callable[[Sequence[Pair]], Tensor],  # (S,)
    pairs: Sequence[Pair],
    others: Sequence[Pair],  # as `pairs`, with other tokens in the first
    alone: Tensor,  # (S - 1,) of all but the first
    tokens: Tensor,  # (S - 1,) that were looked at
) -> Observed:
    """Two forwards."""
    once, again = score(pairs)[1:], score(others)[1:]
    return Observed(
        apart=float(((once - alone).abs() / tokens.sqrt()).max()),
        moved=float(((once - again).abs() / tokens.sqrt()).max()),
    )


def leaks(seen: Observed, rounding: Rounding, noise: Observed) -> bool:
    """Whether sequences see each other. `noise`: of rows side by side, which cannot."""
    return not (seen.apart <= rounding.limit and seen.moved <= max(rounding.moved, SPREAD * noise.moved))


def counted(pairs: Sequence[Pair]) -> Tensor:
    """(S,) completion tokens that a trial looks at."""
    return thinned(collate(list(pairs), np.arange(len(pairs)), packed=True)).lengths.double()


@torch.no_grad()
def check_scoring(
    forward: Forward,
    model: ScoringModel,
    device: torch.device,
    *,
    packed: bool,
    max_length: int,
    setting: str = "train.packing",
) -> Rounding:
    """Raises `UserError` where log-probs are not the model's own, or sequences see each other.

    Collective where weights are sharded: every rank runs the same forwards before any of them refuses.
    """
    found = [_undecided(model.lm.config, max_length), check_head(forward, model, device)]
    spread = 0.0
    planned = trials(forward, model, device, max_length)
    for trial in planned:
        # the first layers show what all of them do; how far all of them round, all of them show
        twice = packed and (trial is planned[-1] or not planned[-1].few)
        with trial.layers():
            fault, measured = _of_each_other(trial, twice, setting)
        found, spread = [*found, fault], max(spread, measured)
    for fault in filter(None, found):
        raise UserError(fault)
    return rounding_of(model, spread)


def _undecided(config: PretrainedConfig, max_length: int) -> str | None:
    """Doge chooses tokens by scores that are equal wherever a token is repeated, and which of the equal ones come in
    depends on the padding of a row."""
    reach = getattr(config.get_text_config(), "keep_window_size", None)
    if not reach or reach >= max_length:
        return None
    return (
        f"data.max_length ({max_length}) must be at most {config.model_type}'s keep_window_size ({reach}): beyond it a "
        "row's log-prob depends on its padding where tokens are repeated"
    )


def _of_each_other(trial: Trial, packed: bool, setting: str) -> tuple[str | None, float]:
    """What sequences see of each other in a trial, as a sentence, and how far rows side by side round."""
    lm = trial.model.lm
    pairs, others = _neighbours(trial.model, trial.tokens)
    alone, tokens = trial.alone(pairs[1:]), counted(pairs[1:])
    if chooses(lm.config):
        beside = observe(lambda some: trial.together(some, packed=False), pairs, others, alone, tokens)
    else:
        off = (trial.together(pairs[1:], packed=False) - alone).abs() / tokens.sqrt()
        beside = Observed(apart=float(off.max()), moved=0.0)
    rounding, fault = rounding_of(trial.model, beside.apart), None
    if leaks(beside, rounding, beside):
        fault = (
            f"rows of one batch change each other's log-probs in {type(lm).__name__}, by {beside.apart:.3g} nats per "
            f"root of a token in {trial.tokens} tokens: it cannot be trained with rows as long"
        )
    if packed:
        seen = observe(lambda some: trial.together(some, packed=True), pairs, others, alone, tokens)
        if leaks(seen, rounding, beside):
            fault = fault or (
                f"packed sequences see each other in {type(lm).__name__}: in {trial.tokens} tokens one is "
                f"{seen.apart:.3g} nats per root of a token off its log-prob alone (rounding: {beside.apart:.2g}), and "
                f"{seen.moved:.3g} with another neighbour: set {setting}=false, which pads instead"
            )
    return fault, beside.apart


def dtype_of(model: ScoringModel) -> torch.dtype:
    return model.lm.get_output_embeddings().weight.dtype


def _neighbours(model: ScoringModel, total: int) -> tuple[list[Pair], list[Pair]]:
    """A neighbour and two sequences that begin right behind it, and the same with another neighbour."""
    draw = drawer(model, 0)
    first, short = total // 4, min(max(4, total // 8), 16)
    lengths = [first, short, total - first - short]
    pairs = [(draw(1), draw(length - 1)) for length in lengths]
    return pairs, [(draw(1), draw(lengths[0] - 1)), *pairs[1:]]


def check_head(forward: Forward, model: ScoringModel, device: torch.device) -> str | None:
    """What is wrong with how a few rows of equal length are scored, or None. Four forwards."""
    draw = drawer(model, 1)
    rows = [(draw(3), draw(6)) for _ in range(2)]
    # a row twice: in a model that is random they differ
    rows.append(rows[0])
    batch = collate(rows, np.arange(len(rows)), packed=False).to(device)

    def own(ids: Tensor, positions: Tensor | None) -> Tensor:  # (S, completion tokens, V) fp64
        logits = forward(
            input_ids=ids, position_ids=positions, attention_mask=None, bounds=batch.bounds, longest=batch.longest
        )
        return logits[:, 2:-1].double()

    def logps(logits: Tensor) -> Tensor:
        chosen = logits.log_softmax(-1).gather(-1, batch.target.view(len(rows), -1, 1))
        return chosen.sum((1, 2)).cpu()

    later = batch.input_ids.clone()
    later[:, -3:] = torch.from_numpy(draw(3 * len(rows))).view(len(rows), 3).to(device)
    plain = own(batch.input_ids, None)
    changed = own(later, None)
    wanted, placed = logps(plain), logps(own(batch.input_ids, batch.position_ids))
    ours = completion_logps(forward, batch, model.transform, 2**28).cpu()

    name, dtype = type(model.lm).__name__, dtype_of(model)
    root = batch.lengths.double().sqrt()
    before = slice(None, plain.shape[1] - 2)
    # A logit is rounded where it is stored, and the sum of many exponentials hardly at all.
    largest = float(plain.abs().max())
    stored = max(FLOOR[dtype] / 10, 4 * torch.finfo(dtype).eps * largest)
    if not abs(wanted[0] - wanted[-1]) / root[0] <= CAP[dtype]:
        return f"{name} gives one row two log-probs: it is random (dropout?), so a policy would never be its reference"
    # in one shape the same operations run, and not one bit differs
    bits = stored if chooses(model.lm.config) else MOVED[dtype]
    if not float((plain[:, before] - changed[:, before]).abs().max()) <= bits:
        return (
            f"{name} sees tokens that come later, so its log-probs are none of a causal model: an encoder is one with "
            "is_decoder: true in its config.json, if it was trained so"
        )
    if not ((placed - wanted).abs() / root).max() <= FLOOR[dtype]:
        return f"{name} counts positions in another way than from 0 along a sequence: it cannot be trained here"
    if not ((ours - placed).abs() / root).max() <= stored:
        return (
            f"{name} changes the logits after its LM head in a way that kto_dist does not know, so log-probs would be "
            "wrong: see logit_transform in causal_lm.py for what is known"
        )
    return None

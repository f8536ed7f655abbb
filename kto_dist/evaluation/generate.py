"""Answers of a model to prompts, both as tokens: greedy, or drawn with a seed.

In:  a model, prompts as the training rows have them, a `Decoding`. Out: `Generated`, in the prompts' order.

1. `generate`  a model whose weights are whole: transformers' own loop, in batches of prompts of like length; `stream`
               one prompt, token after token
2. `extend`    a model whose weights are sharded: a forward a token, the same one on every rank

Both leave torch's random numbers alone, so that answers on the way change no training run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.signals import Interrupted
from kto_dist.data.batch import Cutting, collate
from kto_dist.data.template import look_at
from kto_dist.evaluation.decoding import Decoding, Draws, Generated, choose, ended, room_of
from kto_dist.model.adapters import from_folder, put_in
from kto_dist.model.attention import ATTENTIONS, Place, cannot_pack
from kto_dist.model.causal_lm import Forward, ScoringModel, score
from kto_dist.model.loading import load_config, load_model, one_line, set_modes
from kto_dist.model.memory import NeedsRestart, is_out_of_memory, release


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model's files lie."""

    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    """The folder of one that the model has."""
    quantization: str = "none"
    """How its weights are packed in memory."""
    name: str = "the model"
    """In messages."""


class NoRoom(UserError):
    """A model does not fit into its device's memory whole."""


def load_whole(source: Source, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model on one device, to generate. Raises `UserError`; `NoRoom`, without the remedy, where memory runs out."""
    try:
        return _loaded(source, dtype, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the half of it that did fit
    release()
    kind = str(dtype).removeprefix("torch.")
    raise NoRoom(f"out of memory while {source.name} ({source.path}) was loaded in {kind} onto {device} to answer")


def _loaded(source: Source, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    config = load_config(source.path, source.gguf_file, trust_remote_code=source.trust_remote_code)
    lm = load_model(
        source.path,
        gguf_file=source.gguf_file,
        dtype=dtype,
        attention=_plain(Place(config=config, device=device, dtype=dtype)),
        config=config,
        trust_remote_code=source.trust_remote_code,
        quantization=source.quantization,
    )
    if source.adapter is not None:
        put_in(lm, from_folder(f"{source.name}'s adapter", Path(source.adapter)))
    lm.requires_grad_(False)
    # transformers' own `to` refuses packed weights
    torch.nn.Module.to(lm, device)
    return lm


def _plain(place: Place) -> str:
    """Attention that takes keys and values of earlier tokens."""
    return "sdpa" if ATTENTIONS["sdpa"].missing(place) is None else "eager"


def settings_in(folder: Path) -> GenerationConfig | None:
    """A model's own settings of generation, where its folder has some."""
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return None
    return found


def stops_of(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> tuple[int, ...]:
    """EOS, what the chat template ends an answer with, and what the model's generation settings name."""
    template = look_at(tokenizer, {})
    named: Any = [] if template is None else tokenizer.convert_tokens_to_ids(list(template.endings))
    eos: Any = None if settings is None else settings.eos_token_id
    more = eos if isinstance(eos, list) else [eos]
    found = [tokenizer.eos_token_id, *named, *more]
    return tuple(sorted({int(token) for token in found if isinstance(token, int)}))


class _Chosen(LogitsProcessor):
    """Leaves one token of each row, which greedy decoding then takes."""

    def __init__(self, draws: Draws, decoding: Decoding) -> None:
        self._draws, self._decoding = draws, decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = choose(scores, self._draws.next(), self._decoding)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


@dataclass
class AtOnce:
    """How many prompts a device answers at once, which only ever falls."""

    prompts: int
    warn: Callable[[str], None]

    def lower(self, prompts: int) -> str | None:
        """`prompts`: those that there was room for. What was said of it, where it is news."""
        if prompts >= self.prompts:
            return None
        self.prompts = prompts
        said = f"out of memory while prompts were answered: going on with {prompts} at once"
        self.warn(f"{said}. To start there, set answers.batch={prompts}")
        return said


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    *,
    batch: int,
    stop: Callable[[], bool] | None = None,
    lowered: Callable[[int], Any] = lambda prompts: None,
) -> list[Generated]:
    """Of a model whose weights are whole. Leaves it as it was. Raises `Interrupted` where `stop`, which is asked after
    each token, says so.

    Where memory runs out it goes on with half the prompts at once, a number that `lowered` is given; one that does not
    fit alone raises.
    """
    found: list[Generated] = [Generated(ids=(), finished=False)] * len(prompts)
    room = [room_of(lm, prompt, decoding) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    waiting = [*_batches(lengths, room, batch, padded=_can_pad(lm))][::-1]
    with _answering(lm):
        while waiting:
            places = waiting.pop()
            if len(places) > batch:
                waiting += [places[batch:], places[:batch]]
                continue
            try:
                # more than the shortest room would leave the model's positions
                chosen = [prompts[place] for place in places]
                tokens = _generated(lm, chosen, decoding, room[places[0]], stop=stop)
            except (RuntimeError, MemoryError) as error:
                if len(places) == 1 or not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what there was no room for
                batch = len(places) // 2
            else:
                for place, ids in zip(places, tokens, strict=True):
                    found[place] = ended(ids[: room[place]], decoding)
                continue
            release()
            lowered(batch)
            waiting.append(places)
    return found


_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, MemoryError)
"""What a family's own code raises where it cannot generate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What a device's answers came to."""

    made: list[Generated]
    """[] where there are none."""
    why: str | None
    """Why there are none."""
    batch: int
    """Prompts at once that there was room for."""


def tried(
    lm: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    *,
    batch: int,
    stop: Callable[[], bool] | None = None,
) -> Tried:
    """`generate`; or why the family's own code, or the memory, did not let it. Raises `Interrupted`."""
    sizes = [batch]
    try:
        made = generate(lm, prompts, decoding, batch=batch, stop=stop, lowered=sizes.append)
        return Tried(made=made, why=None, batch=sizes[-1])
    except _FAILURES as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        why = "out of memory with one prompt at a time" if is_out_of_memory(error) else why
        error.__traceback__ = None
    release()
    return Tried(made=[], why=why, batch=sizes[-1])


@torch.no_grad()
def stream(lm: PreTrainedModel, prompt: np.ndarray, decoding: Decoding, tell: Callable[[list[int]], None]) -> Generated:
    """One answer, as `generate` gives it; `tell` gets its tokens so far after each of them."""
    room = room_of(lm, prompt, decoding)
    if not room:
        return Generated(ids=(), finished=False)
    with _answering(lm):
        return ended(_generated(lm, [prompt], decoding, room, _Told(tell))[0], decoding)


class _Asked(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self._stop():
            raise Interrupted
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Told(BaseStreamer):
    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self._tell, self._ids, self._begun = tell, list[int](), False

    def put(self, value: Tensor) -> None:
        # the first are the prompt's
        if self._begun:
            self._ids += value.flatten().tolist()
            self._tell(list(self._ids))
        self._begun = True

    def end(self) -> None: ...


def _generated(
    lm: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    tokens: int,
    streamer: BaseStreamer | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    width, device = max(map(len, prompts)), lm.device
    ids = torch.full((len(prompts), width), decoding.stops[0] if decoding.stops else 0, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList([_Chosen(Draws(prompts, decoding), decoding)] if decoding.temperature else [])
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(decoding.stops) or None,
        pad_token_id=decoding.stops[0] if decoding.stops else 0,
    )
    model: Any = lm  # its type knows no `generate`
    made: Any = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        logits_processor=processors,
        streamer=streamer,
        stopping_criteria=None if stop is None else StoppingCriteriaList([_Asked(stop)]),
    )
    return [row.tolist() for row in made[:, width:].cpu()]


@torch.no_grad()
def extend(
    forward: Forward,
    model: ScoringModel,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    cutting: Cutting,
    *,
    batch: int,
    stop: Callable[[], bool] | None = None,
) -> list[Generated]:
    """Collective. Of a model whose weights are sharded: every rank runs the same forwards, and rank 0's tokens count.
    Raises `Interrupted` on all ranks where `stop`, which is asked before each token, is true on one; `NeedsRestart`
    where this one runs out of memory, while the others wait for it: with half the prompts at once, or without answers.

    No keys and values are kept, so that a token costs a forward of all before it: for few prompts, and short answers.
    """
    rooms = [room_of(model.lm, prompt, decoding) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    draws, device = Draws(prompts, decoding), comm.device()

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return model.transform(torch.nn.functional.linear(hidden, weight, bias).float())

    def is_open(place: int) -> bool:
        return len(made[place]) < rooms[place] and not (made[place] and made[place][-1] in decoding.stops)

    while places := [place for place in range(len(prompts)) if is_open(place)]:
        if stop is not None and comm.any_(stop()):
            raise Interrupted
        drawn, tokens = draws.next(places), []
        rows = [np.concatenate([prompts[place], np.array(made[place], np.int64)]) for place in places]
        # a forward keeps the position before each token of a completion: one token, whatever it is, follows
        size = 1 if cutting.apart else max(1, min(batch, cutting.tokens // (max(map(len, rows)) + 1)))
        for start in range(0, len(rows), size):
            part = [(row, np.zeros(1, np.int64)) for row in rows[start : start + size]]
            try:
                inputs = collate(part, np.arange(len(part)), packed=cutting.packed).to(device)
                tokens += choose(score(forward, inputs, head), drawn[start : start + size], decoding).tolist()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise NeedsRestart("answers", _fewer(len(part))) from None
        # roundings may differ between ranks, and one of them would go on alone
        for place, token in zip(places, comm.broadcast(tokens), strict=True):
            made[place].append(token)
    return [ended(ids, decoding) for ids in made]


def _fewer(prompts: int) -> dict[str, int | None]:
    """Settings with which half of so many prompts are answered at once; none at all, where it was one."""
    if prompts > 1:
        return {"answers.batch": prompts // 2}
    return {"answers.while_training": 0, "answers.every_steps": None}


_CONTEXT = 2**20
"""Tokens: a row with its answer is shorter, as far as sparse attention's choice among them goes."""


def _can_pad(lm: PreTrainedModel) -> bool:
    """Whether padding before a prompt leaves its answer alone: a state that runs along the row takes it in, and where
    positions are counted along the row it counts."""
    return not getattr(lm, "_is_stateful", False) and cannot_pack(lm.config, _CONTEXT) is None


def _batches(lengths: Sequence[int], rooms: Sequence[int], size: int, *, padded: bool) -> Iterator[list[int]]:
    """Places of prompts of like length and equal room, the longest first; without room there is no answer."""
    waiting: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (rooms[place], -lengths[place])):
        if not rooms[place]:
            continue
        other = waiting and (
            rooms[waiting[0]] != rooms[place] or (not padded and lengths[waiting[0]] != lengths[place])
        )
        if other or len(waiting) == size:
            yield waiting
            waiting = []
        waiting.append(place)
    if waiting:
        yield waiting


@contextmanager
def _answering(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the model generates by what it is asked alone: not by settings of its own, nor by what packs rows."""
    attention, settings = lm.config._attn_implementation, lm.generation_config
    lm.eval()
    lm.generation_config = GenerationConfig()
    if attention == "varlen":
        lm.set_attn_implementation(_plain(Place(config=lm.config, device=lm.device, dtype=lm.dtype)))
    try:
        yield
    finally:
        if attention == "varlen":
            lm.set_attn_implementation(attention)
        lm.generation_config = settings
        set_modes(lm)

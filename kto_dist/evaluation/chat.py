"""Two models side by side before one prompt: each answers, and each answer gets its log-ratio.

In:  the trained model and its reference, messages as somebody types them. Out: `Said`, one a side.

Each side goes on from its own answers. The log-ratio of an answer is how much likelier the trained model makes it than
the reference does, in nats, given the side's own conversation.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kto_dist.base.errors import UserError
from kto_dist.data.batch import collate
from kto_dist.data.encode import Encoder
from kto_dist.data.rows import Row
from kto_dist.data.template import look_at
from kto_dist.evaluation.decoding import Decoding, Generated
from kto_dist.evaluation.generate import NoRoom, Source, load_whole, stops_of, stream
from kto_dist.model.causal_lm import ScoringModel, completion_logps, pick_dtype
from kto_dist.model.loading import load_tokenizer
from kto_dist.model.memory import is_out_of_memory

Side = Literal["trained", "reference"]
SIDES: tuple[Side, ...] = ("trained", "reference")
_LONGEST = 2**30
"""Tokens: prompts are not cut here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    text: str
    tokens: int
    finished: bool
    log_ratio: float
    """log pi(answer | conversation) of the trained model minus that of the reference."""


@dataclass
class Chat:
    """Both models in memory, on one device."""

    models: Mapping[Side, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any]
    """Of the chat template."""
    decoding: Decoding
    system: str | None = None
    turns: dict[Side, list[dict[str, str]]] = field(default_factory=dict)
    """What was said so far."""

    def __post_init__(self) -> None:
        self._scoring = {side: ScoringModel(lm) for side, lm in self.models.items()}
        self._encoder = Encoder(
            tokenizer=self.tokenizer,
            template=look_at(self.tokenizer, self.settings),
            max_length=_LONGEST,
            prompt_limit=_LONGEST - 1,
            on_bad_row="error",
            fraction=None,
            sources=1,
        )
        self.begin()

    def begin(self) -> None:
        """Forgets what was said."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = {side: list(start) for side in SIDES}

    def ask(self, text: str, tell: Callable[[Side, str], None] = lambda side, text: None) -> dict[Side, Said]:
        """Both answers; `tell` gets what each side has said so far, from threads. Raises `UserError`."""
        made: dict[Side, Generated] = {}
        failed: list[BaseException] = []
        prompts = {side: self._prompt(side, text) for side in SIDES}

        def answer(side: Side) -> None:
            try:
                made[side] = stream(
                    self.models[side], prompts[side], self.decoding, lambda ids: tell(side, self._words(ids))
                )
            except BaseException as error:  # raised below
                failed.append(error)

        threads = [threading.Thread(target=answer, args=(side,), daemon=True) for side in SIDES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed and is_out_of_memory(failed[0]):
            raise UserError(
                "out of memory while what was typed was answered: lower --max-tokens, begin a new conversation (/new), "
                f"or {_more_room(self.models['trained'].device)}"
            ) from None
        if failed:
            raise failed[0]
        said = {side: self._said(prompts[side], made[side]) for side in SIDES}
        for side, found in said.items():
            self.turns[side] += [{"role": "user", "content": text}, {"role": "assistant", "content": found.text}]
        return said

    def _prompt(self, side: Side, text: str) -> np.ndarray:
        """As a training row with this prompt has it."""
        if self._encoder.template is None:
            prompt: Any = text
            answer: Any = "x"
        else:
            prompt = (*self.turns[side], {"role": "user", "content": text})
            answer = ({"role": "assistant", "content": "x"},)
        row = Row(prompt=prompt, completion=answer, desirable=True, weight=1.0, source="what was typed:1")
        batch = self._encoder([row])[0][0].batch
        if not batch.num_rows:
            raise UserError("what was typed makes no token: type something else")
        ids: np.ndarray = batch.column("prompt_ids")[0].values.to_numpy()
        return ids

    def _said(self, prompt: np.ndarray, made: Generated) -> Said:
        return Said(
            text=self._words(made.ids).strip(),
            tokens=len(made.ids),
            finished=made.finished,
            log_ratio=self._logp("trained", prompt, made) - self._logp("reference", prompt, made),
        )

    @torch.no_grad()
    def _logp(self, side: Side, prompt: np.ndarray, made: Generated) -> float:
        if not made.ids:
            return 0.0
        model = self._scoring[side]
        batch = collate([(prompt, np.array(made.ids, np.int64))], np.zeros(1, np.int64), packed=False)
        return float(completion_logps(model, batch.to(model.lm.device), model.transform, None)[0])

    def _words(self, ids: Sequence[int]) -> str:
        # a letter of several bytes may not be whole yet
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).rstrip("\ufffd")


def _more_room(device: torch.device) -> str:
    if device.type == "cpu":
        return "end what else takes memory here, or take a host with more of it"
    return (
        "end what else takes memory on this device, or name another one by CUDA_VISIBLE_DEVICES, which takes the CPU "
        "where it is empty"
    )


def open_chat(
    trained: Source,
    reference: Source,
    *,
    dtype: str,
    device: torch.device,
    settings: Mapping[str, Any],
    max_tokens: int,
    temperature: float,
    seed: int,
    system: str | None,
) -> Chat:
    """Loads both. Raises `UserError`."""
    tokenizer = load_tokenizer(trained.path, trained.gguf_file, trust_remote_code=trained.trust_remote_code)
    models: dict[Side, PreTrainedModel] = {}
    sources: dict[Side, Source] = {"trained": trained, "reference": reference}
    for side, source in sources.items():
        try:
            models[side] = load_whole(source, pick_dtype(dtype, device), device)
        except NoRoom as why:
            raise UserError(f"{why}, and a chat holds both models at once: {_more_room(device)}") from None
    if system and not tokenizer.chat_template:
        raise UserError("--system needs a tokenizer with a chat template, and this one has none: leave it out")
    decoding = Decoding(
        max_tokens=max_tokens,
        stops=stops_of(tokenizer, models["trained"].generation_config),
        temperature=temperature,
        seed=seed,
    )
    return Chat(models=models, tokenizer=tokenizer, settings=settings, decoding=decoding, system=system)

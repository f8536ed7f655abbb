"""Answers of two models to the same prompts, in words: kept by content, counted, and compared without a judge.

In:  prompts as tokens or messages. Out: `Answer`, and figures with intervals over prompts.

| figure         | what it is                                                                                 |
|----------------|--------------------------------------------------------------------------------------------|
| words, tokens  | length                                                                                     |
| finished       | share of answers that the model ended itself; the others met `answers.max_tokens`          |
| repeated       | share of an answer's runs of four words that it has said before (of eight letters, where a |
|                | text has no spaces)                                                                        |
| identical      | share of prompts whose two answers are equal                                               |
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kto_dist.base.keyed import Keyed
from kto_dist.data.examples import Examples
from kto_dist.evaluation.intervals import Difference, Figure, Interval, Mean, intervals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kto_dist.evaluation.decoding import Generated

WORDS, LETTERS = 4, 8
"""Of a run that may be said again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str
    finished: bool
    ids: tuple[int, ...] | None = None
    """With the token that ended it; None from a server, which sends text."""


def in_words(tokenizer: "PreTrainedTokenizerBase", made: Sequence["Generated"]) -> list[Answer]:
    """Without the tokens that end an answer, and other special ones."""
    texts = [str(tokenizer.decode(list(one.ids), skip_special_tokens=True)).strip() for one in made]
    return [Answer(text=text, finished=one.finished, ids=one.ids) for text, one in zip(texts, made, strict=True)]


class Kept:
    """Answers of one model in a file: key -> answer. What is there is never made again."""

    def __init__(self, folder: Path, model: str) -> None:
        """`model`: a digest of its weights and of what else decides its answers."""
        self._lines = Keyed(folder / f"{hashlib.sha256(model.encode()).hexdigest()[:32]}.jsonl")

    def get(self, key: str) -> Answer | None:
        entry = self._lines.get(key)
        if entry is None:
            return None
        try:
            ids = entry.get("ids")
            return Answer(text=entry["text"], finished=entry["finished"], ids=None if ids is None else tuple(ids))
        except (KeyError, TypeError):
            return None  # it is made again

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Raises `OSError`."""
        self._lines.add({key: asdict(answer) for key, answer in answers.items()})


def asked_of(examples: Examples, row: int) -> str:
    """What a person, or a judge, was asked by a row: the bare text of a single user's message, else all with roles."""
    prompt = examples.original(row)[0]
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].get("role") == "user":
        text = prompt[0].get("content")
        if isinstance(text, str):
            return text
    return examples.prompt_text(row)


def pick_prompts(examples: Examples, count: int, seed: int) -> np.ndarray:
    """At most `count` rows, each of another prompt, in the rows' order: a function of the prompts and the seed."""
    groups, rows = np.unique(examples.prompt_group, return_index=True)
    chosen = np.random.default_rng(seed).permutation(groups.size)[:count]
    return np.sort(rows[chosen])


def repeated(text: str) -> float:
    """The share of runs that were there before; 0 of a text too short for two."""
    words = text.split()
    units, size = (words, WORDS) if len(words) * 20 > len(text) else (list(text), LETTERS)
    runs = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def figures_of(answers: Mapping[str, Sequence[Answer]], seed: int = 0) -> dict[str, Interval | float]:
    """`answers`: model -> its answers to the same P prompts; the first minus the second as well.

    Named `<figure>/<model>`, `<figure>/difference` and `identical`; a number where there is no interval.
    """
    found: dict[str, Figure] = {}
    for name, own in answers.items():
        found |= {f"{figure}/{name}": mean for figure, mean in _means(own).items()}
    if len(answers) > 1:
        first, second = [*answers][:2]
        for name in ("words", "tokens", "finished", "repeated"):
            sides = (found.get(f"{name}/{first}"), found.get(f"{name}/{second}"))
            if sides[0] is not None and sides[1] is not None:
                found[f"{name}/difference"] = Difference(first=sides[0], second=sides[1])
        equal = [one.text == other.text for one, other in zip(answers[first], answers[second], strict=True)]
        found["identical"] = _mean(equal, share=True)
    count = len(next(iter(answers.values()), ()))
    sure = intervals(found, np.arange(count), seed=seed)
    once = np.ones((1, count))
    return {name: sure.get(name, float(figure.of(once)[0])) for name, figure in found.items()} if count else {}


def _means(answers: Sequence[Answer]) -> dict[str, Mean]:
    found = {
        "words": _mean([len(answer.text.split()) for answer in answers]),
        "finished": _mean([answer.finished for answer in answers], share=True),
        "repeated": _mean([repeated(answer.text) for answer in answers]),
    }
    lengths = [len(answer.ids) for answer in answers if answer.ids is not None]
    return found | ({"tokens": _mean(lengths)} if len(lengths) == len(answers) else {})


def _mean(values: Sequence[float], *, share: bool = False) -> Mean:
    return Mean(values=np.array(values, np.float64), counted=np.ones(len(values), bool), share=share)

"""New answers of the start and of each chosen run to reported prompts, and what the judge of the config says of them.

In:  the chosen runs, the held-out rows, a judge. Out: `Answered`, by method.

Answers are greedy, so that a difference between two models' answers is one between the models; they are kept in
`answers.cache`, by weights. A judge meets each method's answers beside the start's, and beside those of the method that
all are compared with, in both orders. One process does this, with each model whole on its device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kto_dist.base import comm, disks
from kto_dist.base.console import Console
from kto_dist.base.remembered import sha256_once
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.data.examples import Examples
from kto_dist.evaluation.answers import Answer, Kept, asked_of, figures_of, in_words, pick_prompts
from kto_dist.evaluation.contest import Contest, Pair, contest
from kto_dist.evaluation.decoding import Decoding
from kto_dist.evaluation.generate import AtOnce, NoRoom, Source, load_whole, settings_in, stops_of, tried
from kto_dist.evaluation.intervals import Interval
from kto_dist.evaluation.judges import Judge
from kto_dist.model.causal_lm import pick_dtype
from kto_dist.model.memory import release
from kto_dist.reference.setup import local_folder
from kto_dist.store.fingerprint import weights_digest

SAMPLES = 8
"""Prompts whose answers are shown."""


class CannotAnswer(Exception):
    """A model's family, or its memory, does not let it generate."""

    def __init__(self, why: str, remedy: str):
        super().__init__(why)
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """Of P prompts."""

    judge: str
    prompts: list[str]
    answers: dict[str, list[str]]
    """Method, or the start -> P answers."""
    figures: dict[str, dict[str, Interval | float]]
    """Method -> words, finished, ... (`evaluation/answers.py`)."""
    contests: dict[str, dict[str, Contest]]
    """Method -> other -> what the judge said of both."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "judge": self.judge,
            "prompts": len(self.prompts),
            "figures": {
                method: {name: asdict(of) if isinstance(of, Interval) else of for name, of in own.items()}
                for method, own in self.figures.items()
            },
            "judged": {
                method: {other: found.to_dict() for other, found in own.items()}
                for method, own in self.contests.items()
            },
            "samples": [
                {"prompt": prompt, **{method: own[place] for method, own in self.answers.items()}}
                for place, prompt in enumerate(self.prompts[:SAMPLES])
            ],
        }


def answered(
    config: ComparisonConfig,
    sources: Mapping[str, Source],  # method, or the start -> its model
    examples: Examples,  # held-out rows
    reported: np.ndarray,  # (S,) bool
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    start: str,
    against: str,
    console: Console,
) -> Answered:
    """Raises `CannotAnswer`, `UserError`."""
    rows = _picked(examples, reported, config.answers.in_evaluate, config.train.seed)
    prompts = [examples.prompt(int(row)) for row in rows]
    folder = local_folder(sources[start].path, sources[start].gguf_file)
    decoding = Decoding(max_tokens=config.answers.max_tokens, stops=stops_of(tokenizer, settings_in(folder)))
    found = {}
    at_once = AtOnce(config.answers.batch, console.warn)
    for name, source in sources.items():
        console.say(f"answers of {name}: {source.path}")
        found[name] = _answers(config, source, prompts, decoding, tokenizer, at_once)
    asked = [asked_of(examples, int(row)) for row in rows]
    cache = None if config.judge.cache is None else Path(config.judge.cache)

    def judged(name: str, other: str) -> Contest:
        return contest(judge, _pairs(asked, found[name], found[other]), cache=cache, say=console.say)

    others = {name: [other for other in (start, against) if other != name] for name in sources if name != start}
    return Answered(
        judge=judge.name,
        prompts=asked,
        answers={name: [answer.text for answer in own] for name, own in found.items()},
        figures={
            name: {figure.partition("/")[0]: value for figure, value in figures_of({name: own}).items()}
            for name, own in found.items()
        },
        contests={name: {other: judged(name, other) for other in rivals} for name, rivals in others.items()},
    )


def _picked(examples: Examples, reported: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` rows of different prompts among the reported ones."""
    every = pick_prompts(examples, len(examples), seed)
    there = every[np.isin(examples.prompt_group[every], examples.prompt_group[reported])]
    return np.sort(np.random.default_rng(seed).permutation(there)[:count])


def _answers(
    config: ComparisonConfig,
    source: Source,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    tokenizer: PreTrainedTokenizerBase,
    at_once: AtOnce,
) -> list[Answer]:
    """Raises `CannotAnswer`."""
    digest = weights_digest(local_folder(source.path, source.gguf_file), source.gguf_file)
    if source.adapter is not None:
        parts = (sha256_once(file) for file in sorted(Path(source.adapter).glob("adapter_*")))
        digest = " ".join((digest, *parts))
    if source.quantization != "none":
        digest += f" {source.quantization}"
    dtype = pick_dtype(config.train.dtype, comm.device())

    kept = Kept(Path(config.answers.cache), f"{digest} {dtype}")
    keys = [decoding.key(prompt) for prompt in prompts]
    lacking = [place for place, key in enumerate(keys) if kept.get(key) is None]
    if lacking:
        try:
            lm = load_whole(source, dtype, comm.device())
        except NoRoom as why:
            raise CannotAnswer(str(why), "take a device with more memory") from None
        own = tried(lm, [prompts[place] for place in lacking], decoding, batch=at_once.prompts)
        at_once.lower(own.batch)
        if own.why is not None:
            raise CannotAnswer(
                f"{type(lm).__name__} answers no prompts ({own.why})", "lower answers.max_tokens where memory ran out"
            )
        del lm
        release()
        fresh = {keys[place]: answer for place, answer in zip(lacking, in_words(tokenizer, own.made), strict=True)}
        with disks.refusals("answers", "answers.cache", Path(config.answers.cache)):
            kept.add(fresh)
    return [answer for answer in map(kept.get, keys) if answer is not None]


def _pairs(asked: Sequence[str], ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[Pair]:
    return [
        Pair(prompt=prompt, ours=own.text, theirs=other.text)
        for prompt, own, other in zip(asked, ours, theirs, strict=True)
    ]

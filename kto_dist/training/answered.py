"""What `kto-dist evaluate` has answered: each model's answers side by side, judged, and drawn ones for KL and entropy.

In:  models as `evaluate` found them, held-out rows. Out: `Answered`, and the same as a dict.

0. `unanswerable`  what is known before any model is loaded
1. `answered`      every model answers the same prompts: here, a whole copy on every rank, or behind an API
2. a judge         of `judge.by`, about the model's answers and those of each other one, in both orders
3. `_on_policy`    answers drawn from the model as it is (temperature 1): the mean log-ratio is the KL to the reference,
                   the mean of -log-prob the entropy; per answer, and per token. Answers are cut at `answers.max_tokens`
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kto_dist.base import agree, comm, disks
from kto_dist.base.console import Console
from kto_dist.data.examples import Examples, on_the_spot
from kto_dist.evaluation.answers import Answer, Kept, asked_of, figures_of, in_words, pick_prompts
from kto_dist.evaluation.config import AnswersConfig
from kto_dist.evaluation.contest import Contest, Pair, contest
from kto_dist.evaluation.decoding import Decoding
from kto_dist.evaluation.endpoint import Endpoint, all_of
from kto_dist.evaluation.generate import AtOnce, NoRoom, Source, Tried, load_whole, settings_in, stops_of, tried
from kto_dist.evaluation.intervals import Interval, Mean, Ratio, intervals
from kto_dist.evaluation.judges import Judge
from kto_dist.model.memory import release
from kto_dist.reference.logps import score_reference
from kto_dist.reference.pairs import PairList
from kto_dist.reference.setup import ReferenceSetup, find_reference
from kto_dist.training.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 20
"""Prompts whose answers stand in the JSON file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One that was found, and scored."""

    setup: ReferenceSetup
    digest: str
    """Of its fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    prompts: list[str]
    """For people."""
    answers: dict[str, list[Answer]]
    """By model, the first is the one that is evaluated."""
    figures: dict[str, Interval | float]
    """As `answers.figures_of` names them."""
    contests: dict[str, Contest]
    """The model against each other one; {} without a judge."""
    on_policy: dict[str, Interval]
    """{} where the model was asked behind an API, whose tokens are not known."""
    decoding: Decoding

    def to_dict(self) -> dict[str, Any]:
        shown = [
            {"prompt": prompt, **{name: own[place].text for name, own in self.answers.items()}}
            for place, prompt in enumerate(self.prompts[:SAMPLES])
        ]
        return {
            "prompts": len(self.prompts),
            "decoding": {name: value for name, value in asdict(self.decoding).items() if name != "stops"},
            "figures": {
                name: asdict(figure) if isinstance(figure, Interval) else figure
                for name, figure in self.figures.items()
            },
            "judged": {name: found.to_dict() for name, found in self.contests.items()},
            "on_policy": {name: asdict(figure) for name, figure in self.on_policy.items()},
            "samples": shown,
        }


class _CannotAnswer(Exception):
    """A model's family, or its memory, does not let it generate; raised on all ranks alike."""

    def __init__(self, why: str, remedy: str):
        super().__init__(why)
        self.remedy = remedy


_SERVE = "serve it, and give answers.model_url and answers.reference_url"


def unanswerable(config: Config, models: Sequence[str]) -> str | None:
    """Why no prompts are going to be answered, where some are asked for; None where they are. `models`: their names."""
    section, reference = config.answers, config.reference
    here = [name for name in models if name not in _urls(section)]
    if not section.in_evaluate or not here or not (reference.zero_stage == 3 or reference.offload != "none"):
        return None
    return (
        "no prompts are answered: reference.zero_stage or reference.offload says that a model does not fit on a "
        f"device whole; {_SERVE}; answers.in_evaluate=0 silences this"
    )


def _urls(section: AnswersConfig) -> dict[str, str]:
    """Of the models that are served."""
    urls = {"model": section.model_url, "reference": section.reference_url}
    return {name: url for name, url in urls.items() if url}


def answered(
    config: Config,
    models: Mapping[str, Model],
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    judge: Judge | None,
    console: Console,
) -> Answered | None:
    """Collective. None where nothing is asked for, or a model cannot generate, which is told. Raises `UserError`."""
    section, seed = config.answers, config.train.seed
    rows = pick_prompts(examples, section.in_evaluate, seed)
    if not rows.size:
        return None
    console.phase("answers")
    decoding = Decoding(
        max_tokens=section.max_tokens,
        stops=agree.on_main(lambda: stops_of(tokenizer, settings_in(models["model"].setup.folder))),
        temperature=section.temperature,
        top_p=section.top_p,
        seed=seed,
    )
    try:
        found, drawn = _all_answers(config, models, examples, rows, decoding, tokenizer, console)
    except _CannotAnswer as why:
        console.warn(
            f"{why}, and the evaluation goes on without answers: {why.remedy}; answers.in_evaluate=0 leaves them out"
        )
        return None
    on_policy = _on_policy(config, models, [examples.prompt(int(row)) for row in rows], drawn, console)
    texts = [asked_of(examples, int(row)) for row in rows]
    ours = "model"
    others = [name for name in found if name != ours]
    cache = None if config.judge.cache is None else Path(config.judge.cache)

    def judged(judge: Judge, other: str) -> Contest:
        answers = zip(texts, found[ours], found[other], strict=True)
        pairs = [Pair(prompt=text, ours=own.text, theirs=their.text) for text, own, their in answers]
        return contest(judge, pairs, cache=cache, say=console.say)

    return agree.on_main(
        lambda: Answered(
            prompts=texts,
            answers=found,
            figures=figures_of({ours: found[ours], **{name: found[name] for name in others}}),
            contests={} if judge is None else {name: judged(judge, name) for name in others},
            on_policy=on_policy,
            decoding=decoding,
        )
    )


def _all_answers(
    config: Config,
    models: Mapping[str, Model],
    examples: Examples,
    rows: np.ndarray,
    decoding: Decoding,
    tokenizer: "PreTrainedTokenizerBase",
    console: Console,
) -> tuple[dict[str, list[Answer]], list[Answer]]:
    """Collective. Each model's answers, and those that the first one draws. Raises `UserError`, `_CannotAnswer`."""
    served = _urls(config.answers)
    prompts = [examples.prompt(int(row)) for row in rows]
    drawing = replace(decoding, temperature=1.0, top_p=1.0)
    found: dict[str, list[Answer]] = {}
    drawn: list[Answer] = []
    at_once = AtOnce(config.answers.batch, console.warn)
    for name, model in models.items():
        if name in served:
            found[name] = agree.on_main(partial(_served, config.answers, name, examples, rows, decoding))
            continue
        ways = [decoding, drawing] if name == "model" else [decoding]
        made = _made(config, model, prompts, ways, tokenizer, name, at_once, console)
        found[name], drawn = made[0], made[1] if name == "model" else drawn
    return found, drawn


def _made(
    config: Config,
    model: Model,
    prompts: Sequence[np.ndarray],
    ways: Sequence[Decoding],
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    at_once: AtOnce,
    console: Console,
) -> list[list[Answer]]:
    """Collective. For each way of decoding the answers: those that are kept, and the others made and kept.

    Raises `_CannotAnswer`.
    """
    section, setup = config.answers, model.setup
    kept = Kept(Path(section.cache), model.digest) if comm.is_main() else None
    keys = [[decoding.key(prompt) for prompt in prompts] for decoding in ways]
    lacking = comm.broadcast(
        [[] if kept is None else [place for place, key in enumerate(own) if kept.get(key) is None] for own in keys]
    )
    count = sum(map(len, lacking))
    console.say(f"answers of {name}: {sum(map(len, keys)) - count:,} kept, {count:,} to make")
    if count:
        source = Source(
            path=str(setup.folder),
            gguf_file=setup.gguf_file,
            trust_remote_code=setup.trust_remote_code,
            adapter=None if setup.adapter is None else str(setup.adapter),
            quantization=setup.quantization,
            name=setup.role,
        )
        lm = _loaded(source, setup)
        rank, ranks = comm.rank(comm.DATA), comm.size(comm.DATA)
        for decoding, own, places in zip(ways, keys, lacking, strict=True):

            def work(decoding: Decoding = decoding, places: list[int] = places) -> Tried:
                if setup.device.type == "cuda":
                    torch.cuda.set_device(setup.device)  # each thread has its own
                return tried(lm, [prompts[place] for place in places[rank::ranks]], decoding, batch=at_once.prompts)

            shares = agree.side_by_side(work)
            at_once.lower(min(share.batch for share in shares))
            if failures := [share.why for share in shares if share.why is not None]:
                raise _CannotAnswer(
                    f"{type(lm).__name__} answers no prompts ({failures[0]})",
                    "lower answers.max_tokens where memory ran out",
                )
            made = in_words(tokenizer, [shares[n % ranks].made[n // ranks] for n in range(len(places))])
            fresh = {own[place]: answer for place, answer in zip(places, made, strict=True)}

            def keep(fresh: dict[str, Answer] = fresh) -> None:
                assert kept is not None
                with disks.refusals("answers", "answers.cache", Path(section.cache)):
                    kept.add(fresh)

            agree.on_main(keep)
        del lm
        release()
    return agree.on_main(lambda: [_all(kept, own) for own in keys])


def _loaded(source: Source, setup: ReferenceSetup) -> "PreTrainedModel":
    """Collective. On every rank. Raises `_CannotAnswer` on all of them where one has no room for it."""

    def load() -> "PreTrainedModel | str":
        try:
            return load_whole(source, setup.dtype, setup.device)
        except NoRoom as why:
            return str(why)

    own = agree.together(load)
    said = comm.gather(own if isinstance(own, str) else None)
    if isinstance(own, str) or any(said):
        del own
        release()
        raise _CannotAnswer(next(text for text in said if text), f"take a device with more memory, or {_SERVE}")
    return own


def _all(kept: Kept | None, keys: Sequence[str]) -> list[Answer]:
    assert kept is not None
    found = [kept.get(key) for key in keys]
    return [answer for answer in found if answer is not None]


def _served(
    section: AnswersConfig, name: str, examples: Examples, rows: np.ndarray, decoding: Decoding
) -> list[Answer]:
    """Rank 0. Behind an API. Raises `UserError`."""
    url, model = (
        (section.model_url, section.model_name) if name == "model" else (section.reference_url, section.reference_name)
    )
    assert url is not None
    endpoint = Endpoint.of(url, model, section.key)
    settings: dict[str, Any] = {"max_tokens": decoding.max_tokens, "temperature": decoding.temperature}
    if decoding.temperature:
        settings |= {"top_p": decoding.top_p, "seed": decoding.seed}

    def ask(row: int) -> Answer:
        prompt = examples.original(row)[0]
        beside = examples.beside(row)
        more = {"tools": beside["tools"]} if beside.get("tools") else {}
        reply = (
            endpoint.complete(prompt, **settings)
            if isinstance(prompt, str)
            else endpoint.chat(prompt, **settings, **more)
        )
        return Answer(text=reply.text.strip(), finished=reply.finished)

    return all_of(ask, rows.tolist(), section.batch)


def _on_policy(
    config: Config,
    models: Mapping[str, Model],
    prompts: Sequence[np.ndarray],
    drawn: Sequence[Answer],
    console: Console,
) -> dict[str, Interval]:
    """Collective. KL to the reference and entropy, from answers that the model drew; {} where a server answered."""
    ids = [np.array(answer.ids, np.int64) for answer in drawn]
    there = [place for place, own in enumerate(ids) if own.size]
    if not there:
        return {}
    examples = on_the_spot([prompts[place] for place in there], [ids[place] for place in there])
    logps = {name: _logps(config, models[name].setup, examples, console) for name in ("model", "reference")}
    tokens = examples.completion_lengths.astype(np.float64)
    every = np.ones(tokens.size, bool)
    ratio, surprise = logps["model"] - logps["reference"], -logps["model"]
    return intervals(
        {
            "kl/answer": Mean(values=ratio, counted=every),
            "kl/token": Ratio(above=ratio, below=tokens),
            "entropy/answer": Mean(values=surprise, counted=every),
            "entropy/token": Ratio(above=surprise, below=tokens),
            "tokens": Mean(values=tokens, counted=every),
        },
        examples.prompt_group,
    )


def _logps(config: Config, setup: ReferenceSetup, examples: Examples, console: Console) -> np.ndarray:
    """Collective. Of drawn answers, whole: they may be longer than rows are."""
    longest = int((examples.prompt_lengths + examples.completion_lengths).max())
    section = config.reference.model_copy(
        update={
            "path": setup.path,
            "gguf_file": setup.gguf_file,
            "trust_remote_code": setup.trust_remote_code,
            "tokens_per_batch": max(config.reference.tokens_per_batch, longest),
        }
    )
    own, fingerprint = find_reference(
        section,
        config.model,
        max_length=longest,
        prompt_limit=longest - 1,
        console=console,
        adapter=setup.adapter,
        role=setup.role,
    )
    rows = np.arange(len(examples))
    pairs = PairList(title="drawn answers", examples=examples, prompts=rows, completions=rows)
    return score_reference([pairs], own, fingerprint, console).train(rows, rows)

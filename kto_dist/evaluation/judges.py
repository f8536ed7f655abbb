"""Judges: which of two answers to a prompt is better.

    judge = judge_of(config.judge)                     # None where the config names none
    found = contest(judge, [Pair(prompt=..., ours=..., theirs=...), ...])      # contest.py
    found.figures()["win_rate"]                        # an Interval

A judge is called with comparisons and returns a verdict each, "first", "second" or "tie", and None where it gave none.
It knows neither which answer is whose nor that every pair comes in both orders. There are four kinds:

| `judge.by` | what is asked                                                                                      |
|------------|----------------------------------------------------------------------------------------------------|
| function   | a Python function of the user's: (prompt, first, second) -> verdict, or (prompt, answer) -> a score |
| command    | a program: a JSON object a line on its standard input, a verdict a line on its standard output      |
| endpoint   | a model behind an OpenAI-compatible API                                                            |
| mlflow     | one of MLflow's judges (`mlflow.genai.make_judge`), with MLflow's names of models                  |

A wish that can be checked, such as the demo's, is a function of the second form: the higher score wins.

Each has an `identity`, by which its verdicts are kept (`verdicts.py`): all that decides them, as far as can be seen.
"""

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from kto_dist.base.errors import UserError
from kto_dist.base.own_code import function_named, source_digest
from kto_dist.base.remembered import sha256_once
from kto_dist.evaluation.config import JudgeConfig
from kto_dist.evaluation.endpoint import Endpoint, all_of

Verdict = Literal["first", "second", "tie"]
VERDICTS = ("first", "second", "tie")
TURNS = 8
"""Times that a model is asked as many comparisons as it is at a time, before its verdicts are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a judge is shown."""

    prompt: str
    first: str
    second: str


class Judge(Protocol):
    """`judge(comparisons)` gives a verdict each. Raises `UserError` where it cannot judge at all."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def identity(self) -> str | None:
        """Equal where the verdicts are; None where nothing tells, and none are kept."""

    @property
    def at_once(self) -> int | None:
        """Comparisons that it is given at a time, of which all are lost where one fails; None: all of them."""

    def __call__(self, asked: Sequence[Comparison]) -> Sequence[Verdict | None]: ...


def judge_of(section: JudgeConfig) -> Judge | None:
    """The judge that a config names; None where it names none. Raises `UserError` where it cannot be had."""
    if section.by == "function":
        assert section.function is not None
        return function_judge(section.function)
    if section.by == "command":
        return CommandJudge(
            name=f"command {section.command[0]}", words=section.command, identity=_of_command(section.command)
        )
    if section.by == "endpoint":
        assert section.base_url is not None
        endpoint = Endpoint.of(section.base_url, section.model, section.key)
        return EndpointJudge(
            name=f"{endpoint.model} at {endpoint.url}",
            endpoint=endpoint,
            instructions=section.instructions,
            parallel=section.parallel,
            tokens=section.max_tokens,
            identity=_told(
                "endpoint", endpoint.url, endpoint.model, section.instructions, section.max_tokens, _QUESTION
            ),
        )
    if section.by == "mlflow":
        from kto_dist.record.mlflow_judge import TASK, mlflow_judge

        assert section.model is not None
        settings = {"temperature": 0.0, "max_tokens": section.max_tokens}
        verdict = mlflow_judge(section.model, section.instructions, section.base_url, settings)
        return MlflowJudge(
            name=f"MLflow's judge, {section.model}",
            verdict=verdict,
            parallel=section.parallel,
            identity=_told("mlflow", section.base_url, section.model, section.instructions, settings, TASK),
        )
    return None


def _told(*facts: Any) -> str:
    return json.dumps(facts)


def _of_command(words: Sequence[str]) -> str:
    """The words, and the content of those that are files: the program, and a script that it runs."""
    places = [shutil.which(words[0]) or words[0], *words[1:]]
    return _told("command", words, [_digest(place) for place in places])


def _digest(place: str) -> str | None:
    try:
        return sha256_once(Path(place)) if Path(place).is_file() else None
    except OSError:  # a word too long for a name, or a program that may be run and not read
        return None


def function_judge(name: str) -> Judge:
    """`name`: module:function or file.py:function. Raises `UserError`."""
    function = function_named("judge.function", name)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty
    ]
    digest = source_digest(name, function)
    identity = None if digest is None else _told("function", name.rpartition(":")[2], digest)
    if len(needed) == 2:
        return ScoreJudge(name=name, function=function, identity=identity)
    if len(needed) == 3:
        return FunctionJudge(name=name, function=function, identity=identity)
    raise UserError(
        f"judge.function ({name}) takes {len(needed)} arguments: it must take (prompt, first, second) and return "
        "first, second or tie, or take (prompt, answer) and return a score"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionJudge:
    """(prompt, first, second) -> first, second, tie or None; or a number: above 0 where the first is better."""

    name: str
    function: Callable[[str, str, str], Any]
    identity: str | None = None

    @property
    def at_once(self) -> int | None:
        return 1

    def __call__(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        return [self._verdict(one) for one in asked]

    def _verdict(self, one: Comparison) -> Verdict | None:
        with_names = f"judge.function ({self.name})"
        found = _called(with_names, self.function, one.prompt, one.first, one.second)
        if found is None or found in VERDICTS:
            return cast(Verdict | None, found)
        if isinstance(found, int | float) and not isinstance(found, bool):
            return _sided(float(found))
        raise UserError(f"{with_names} returned {found!r}: it must return first, second, tie, None or a number")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJudge:
    """(prompt, answer) -> a number, or whether the answer is approved: the answer with the higher score wins."""

    name: str
    function: Callable[[str, str], Any]
    identity: str | None = None

    @property
    def at_once(self) -> int | None:
        return 1

    def __call__(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        return [_sided(self.score(one.prompt, one.first) - self.score(one.prompt, one.second)) for one in asked]

    def score(self, prompt: str, answer: str) -> float:
        """Raises `UserError`."""
        found = _called(f"judge.function ({self.name})", self.function, prompt, answer)
        try:
            return float(found)
        except (TypeError, ValueError):
            raise UserError(f"judge.function ({self.name}) returned {found!r}: a score is a number") from None


def _called(name: str, function: Callable[..., Any], *arguments: str) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        raise UserError(f"{name} failed: {type(error).__name__}: {error}; mend it or leave it out") from error


def _sided(difference: float) -> Verdict:
    return "first" if difference > 0 else "second" if difference < 0 else "tie"


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandJudge:
    """A program that reads {"prompt", "first", "second"} a line and writes first, second, tie or none a line."""

    name: str
    words: tuple[str, ...]
    identity: str | None = None

    @property
    def at_once(self) -> int | None:
        return None  # it may take long to start

    def __call__(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        if not asked:
            return []
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in asked)
        try:
            done = subprocess.run(self.words, input=lines, capture_output=True, text=True, encoding="utf-8")
        except OSError as error:
            raise UserError(f"judge.command ({self.words[0]}) does not start: {error}") from None
        said = done.stdout.split()
        if done.returncode or len(said) != len(asked):
            raise UserError(
                f"judge.command ({' '.join(self.words)}) gave {len(said)} verdicts for {len(asked)} comparisons and "
                f"ended with status {done.returncode}: it must write one line for each; {done.stderr.strip()[-300:]}"
            )
        strange = sorted({word for word in said} - {*VERDICTS, "none"})
        if strange:
            raise UserError(f"judge.command wrote {strange[0]!r}: a verdict is first, second, tie or none")
        return [None if word == "none" else cast(Verdict, word) for word in said]


_QUESTION = """[The user's message]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[Your task]
Which answer is better? End your reply with a line that reads "Verdict: A", "Verdict: B" or "Verdict: tie"."""
_VERDICT = re.compile(r"verdict\W+(?:answer\W+)?(a|b|tie)\b", re.IGNORECASE)
_MEANT: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointJudge:
    """A model that is asked in words."""

    name: str
    endpoint: Endpoint
    instructions: str
    parallel: int
    tokens: int
    """Of one reply at the most."""
    identity: str | None = None

    @property
    def at_once(self) -> int | None:
        return TURNS * self.parallel

    def __call__(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        return all_of(self._verdict, asked, self.parallel)

    def _verdict(self, one: Comparison) -> Verdict | None:
        question = _QUESTION.format(prompt=one.prompt, first=one.first, second=one.second)
        messages = [{"role": "system", "content": self.instructions}, {"role": "user", "content": question}]
        return read_verdict(self.endpoint.chat(messages, temperature=0.0, max_tokens=self.tokens).text)


def read_verdict(reply: str) -> Verdict | None:
    """The last verdict that a reply states, or the reply that is nothing else; None where it states none."""
    found = _VERDICT.findall(reply)
    return _MEANT.get((found[-1] if found else reply.strip(" \n.*[]\"'")).lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowJudge:
    name: str
    verdict: Callable[[str, str, str], str]
    parallel: int
    identity: str | None = None

    @property
    def at_once(self) -> int | None:
        return TURNS * self.parallel

    def __call__(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        return all_of(self._verdict, asked, self.parallel)

    def _verdict(self, one: Comparison) -> Verdict | None:
        said = self.verdict(one.prompt, one.first, one.second)
        return cast(Verdict, said) if said in VERDICTS else None

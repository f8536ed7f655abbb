"""Which columns of a record hold what, and the rows that they make: the table in formats.py at work."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import DOWN, UP, thumb_of
from kto_dist.data.columns import (
    ANSWERS,
    GUESSES,
    KWARGS,
    LABELS,
    MEDIA,
    PAIRS,
    PROMPTS,
    REJECTED,
    SIDES,
    TOOLS,
    TURNS,
    is_there,
)
from kto_dist.data.conversations import split_pair, without_prompt
from kto_dist.data.records import BadRecord, short
from kto_dist.data.rows import Row
from kto_dist.data.turns import Messages, settings_of, text, text_or_turns, tools_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which columns of a file hold what."""

    prompt: str | None
    """None: chosen and rejected are whole conversations."""
    answers: tuple[str, ...]
    """(): the prompt's last turn; one column; (better, worse); or (the worse one than the prompt's last turn)."""
    label: str | None
    """None: the first answer is the desirable one."""

    def used(self) -> set[str]:
        beside = {"input", "history"} if self.prompt == "instruction" else set()
        # the other names of a label are checked against the first one
        labels = {*LABELS} if self.label else set()
        return {*self.answers, *labels, *beside, "weight", "system", *TOOLS, KWARGS} | {self.prompt or ""}


def recognise(record: dict[str, Any]) -> Layout:
    """The layout that these columns belong to; raises for columns of no known layout."""

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if record.get(name) is not None), None)

    label, answer, turns = first(LABELS), first(ANSWERS), first(TURNS)
    prompt = first(PROMPTS)
    if {*PAIRS} <= {*record}:
        return Layout(prompt=prompt, answers=PAIRS, label=None)
    rejected = first(REJECTED)
    if turns and rejected and not label:
        whole = rejected == "rejected_messages"
        return Layout(prompt=None if whole else turns, answers=(turns, rejected) if whole else (rejected,), label=None)
    if prompt and label and {*SIDES} <= {*record}:
        return Layout(prompt=prompt, answers=SIDES, label=label)
    if prompt not in (None, *TURNS) and answer and label:
        return Layout(prompt=prompt, answers=(answer,), label=label)
    if turns and label:
        apart = answer is not None and _asks(record[turns])
        return Layout(prompt=turns, answers=(answer,) if answer and apart else (), label=label)
    if (prompt and answer) or turns:
        missing = f"lack a label column ({', '.join(LABELS)})"
    else:
        missing = "belong to no layout that is known"
    raise BadRecord(
        "unknown layout",
        f"its columns ({short(', '.join(record))}) {missing}: rename them to prompt, completion and label, "
        "to messages and label, or to prompt, chosen and rejected, or map them, as in data.columns: {prompt: ask}",
    )


def _asks(turns: Any) -> bool:
    """Whether a list of messages ends with somebody else than the assistant."""
    try:
        return text_or_turns(turns, "messages")[-1]["role"] != "assistant"  # type: ignore[index]
    except (BadRecord, TypeError):
        return False


def convert(
    layout: Layout,
    record: dict[str, Any],
    source: str,
    pairs: Iterator[int],
    origin: int,
    cuts: Mapping[str, str],
    *,
    soft: bool = False,
) -> Iterator[Row]:
    """`cuts`: what the row is told apart by; `soft`: a number as label is a probability."""
    weight = _weight(record)
    _refuse_media(record)
    prompt = None if layout.prompt is None else _prompt(layout, record)
    answers = [text_or_turns(_required(record, name), name) for name in layout.answers]
    label = 1.0 if layout.label is None else _label(record, layout.label, soft)
    _refuse_other_questions(layout, record, prompt)
    pair = None
    if not answers:
        prompt, answers = _last_turn(layout, prompt)
        _refuse_another_answer(answers[0], record)
    elif layout.answers[0] in REJECTED:
        prompt, [better] = _last_turn(layout, prompt)
        answers = [better, *answers]
    elif prompt is not None:
        answers = without_prompt(prompt, answers)[0]
    if len(answers) == 2:
        pair = next(pairs)
        whole = all(not isinstance(answer, str) and answer[0]["role"] != "assistant" for answer in answers)
        if prompt is None or whole:
            prompt, answers = split_pair(answers[0], answers[1], others(layout, record))
    assert prompt is not None
    # the label is the first answer's; the second one of a pair has the other
    for answer, probability in zip(answers, (label, 1 - label), strict=False):
        context, completion = _agree(prompt, answer, layout)
        context = _under_system(context, record)
        chat = not isinstance(context, str)
        yield Row(
            prompt=context,
            completion=completion,
            desirable=probability >= 0.5,
            probability=None if probability in (0, 1) else probability,
            weight=weight,
            source=source,
            pair=pair,
            origin=origin,
            cuts=cuts,
            tools=_tools(record) if chat else (),
            template_kwargs=settings_of(record.get(KWARGS), KWARGS) if chat else {},
        )


def _last_turn(layout: Layout, prompt: str | Messages | None) -> tuple[Messages, list[str | Messages]]:
    assert prompt is not None and not isinstance(prompt, str)
    if prompt[-1]["role"] != "assistant":
        raise BadRecord(
            "no answer",
            f"{layout.prompt}: the last turn ({short(prompt[-1])}) must be the assistant's, the answer "
            "that was rated; leave out what follows it",
        )
    return prompt[:-1], [prompt[-1:]]


def _refuse_another_answer(last: str | Messages, record: dict[str, Any]) -> None:
    """Beside a conversation that ends with an answer, a column with another one: either may be the rated one."""
    said = last if isinstance(last, str) else last[0]["content"]
    for name in (name for name in ANSWERS if is_there(record.get(name))):
        if not isinstance(record[name], str) or record[name].strip() != said.strip():
            raise BadRecord(
                "two answers",
                f"the conversation ends with {short(said)}, and {name} ({short(record[name])}) has another answer: "
                f"leave the one out that was not rated (data.columns: {{{name}: null}}, or the last turn)",
            )


def _prompt(layout: Layout, record: dict[str, Any]) -> str | Messages:
    column = layout.prompt or ""
    value = _required(record, column)
    if column != "instruction":
        try:
            prompt = text_or_turns(value, column)
        except BadRecord as error:
            if layout.answers != PAIRS or column not in TURNS:
                raise
            # distilabel keeps what it made the pair of in `conversation`, in a form of its own
            raise BadRecord(
                error.reason,
                f"{error}; if chosen and rejected are whole conversations, leave it out "
                f"(data.columns: {{{column}: null}})",
            ) from None
        if column in TURNS and isinstance(prompt, str):
            raise BadRecord("wrong type", f"{column} ({short(value)}) must be a list of messages, not text")
        return prompt
    # The layout puts the input below the instruction, and trainers render both through the chat template.
    asked = [part for part in (text(value, column), text(record.get("input") or "", "input")) if part]
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRecord("wrong type", f"history ({short(history)}) must be a list of [question, answer] pairs")
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
    turns.append(("user", "\n".join(asked)))
    return tuple({"role": role, "content": text(said, "history")} for role, said in turns)


def _under_system(prompt: str | Messages, record: dict[str, Any]) -> str | Messages:
    system = record.get("system")
    if not is_there(system) or not text(system, "system").strip():
        return prompt
    if isinstance(prompt, str):
        raise BadRecord(
            "system beside text",
            f"system ({short(system)}) stands beside a prompt of text, which is taken as it is: write the prompt as "
            'messages ([{"role": "user", "content": ...}]), call its column instruction (data.columns: {instruction: '
            "prompt}), or leave system out (data.columns: {system: null})",
        )
    return prompt if prompt and prompt[0]["role"] == "system" else ({"role": "system", "content": system}, *prompt)


def _agree(prompt: str | Messages, answer: str | Messages, layout: Layout) -> tuple[str | Messages, str | Messages]:
    """Both sides as text or both as messages, with the turns where they belong."""
    if isinstance(prompt, str) and not isinstance(answer, str):
        prompt = ({"role": "user", "content": prompt},) if prompt.strip() else ()
    elif isinstance(answer, str) and not isinstance(prompt, str):
        answer = ({"role": "assistant", "content": answer},)
    if not (prompt.strip() if isinstance(prompt, str) else any(turn["content"].strip() for turn in prompt)):
        raise BadRecord(
            "empty prompt",
            f"{layout.prompt or 'prompt'} ({short(prompt)}) must not be empty: an answer's first token needs a context",
        )
    if isinstance(prompt, str) or isinstance(answer, str):
        return prompt, answer
    if prompt[-1]["role"] == "assistant":
        raise BadRecord(
            "wrong turn",
            f"{layout.prompt or 'prompt'}: the turn before the rated answer ({short(prompt[-1])}) must not "
            "be the assistant's; join the two",
        )
    other = next((turn for turn in answer if turn["role"] != "assistant"), None)
    if other is not None:
        raise BadRecord(
            "wrong turn",
            f"{' or '.join(layout.answers)}: a rated answer has turns of the assistant only, not "
            f"{short(other)}; move what comes before the last answer into the prompt",
        )
    return prompt, answer


def _refuse_media(record: dict[str, Any]) -> None:
    name = next((name for name in MEDIA if is_there(record.get(name))), None)
    if name is not None:
        raise BadRecord(
            "more than text",
            f"{name} ({short(record[name])}) is nothing that a model of text sees, and its answer was rated with it: "
            f"leave such rows out, or train on the text alone with data.columns: {{{name}: null}}",
        )


def _refuse_other_questions(layout: Layout, record: dict[str, Any], prompt: str | Messages | None) -> None:
    """A second column that looks like a part of the prompt changes what was asked, unless the prompt holds it."""
    if layout.prompt in TURNS or layout.prompt is None:
        return
    asked = (*GUESSES, "instruction", "history")
    names = [name for name in asked if is_there(record.get(name)) and name not in layout.used()]
    held = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt or ())
    for name in names:
        if not isinstance(record[name], str) or record[name].strip() not in held:
            raise BadRecord(
                "two prompts",
                f"{layout.prompt} and {name} ({short(record[name])}) both look like the prompt, and one of them would "
                f"be left out: join them, or say that {name} is none (data.columns: {{{name}: null}})",
            )


def others(layout: Layout, record: dict[str, Any]) -> list[str]:
    """Columns with a value that nothing reads."""
    used = layout.used()
    if layout.label is not None:
        used -= {name for name in LABELS if name in record and name != layout.label and _meaning(record[name]) is None}
    return [name for name, value in record.items() if name not in used and is_there(value)]


def _tools(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    name = next((name for name in TOOLS if is_there(record.get(name))), None)
    return () if name is None else tuple(tools_of(record[name], name) or ())


def _required(record: dict[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise BadRecord(
            "missing field",
            f"{name} is missing or null; the first row has it, so every row of this file needs it",
        )
    return record[name]


def _label(record: dict[str, Any], name: str, soft: bool) -> float:
    """The probability that the answer is good: 1 or 0 but for `soft` labels."""
    value = _required(record, name)
    number = _number(value)
    if soft and number is not None and not 0 <= number <= 1:
        raise BadRecord(
            "no probability",
            f"{name} ({short(value)}) must be a probability, from 0 to 1, or a word for a thumb (data.soft_labels)",
        )
    label = _probability(value, soft)
    if label is None:
        fraction = number is not None and 0 < number < 1
        hint = "; of a probability, data.soft_labels: true takes p of both thumbs' losses" if fraction else ""
        raise BadRecord(
            "unknown label", f"{name} ({short(value)}) must be true or false, or one of {[*UP]} or {[*DOWN]}{hint}"
        )
    for other in (other for other in LABELS if other in record and other != name):
        # a column of comments may be called feedback as well
        if _probability(record.get(other), soft) not in (None, label):
            raise BadRecord(
                "two labels",
                f"{name} ({short(record[name])}) and {other} ({short(record[other])}) say different things: correct "
                f"one, or leave it out (data.columns: {{{other}: null}})",
            )
    return label


class Scale:
    """The numbers among a source's labels: raises where they make no thumbs of it."""

    def __init__(self, met: Iterable[float] = ()) -> None:
        self.met = {*met}

    def check(self, value: Any, name: str) -> None:
        """Raises `UserError` for a rating, whose 1 would count as a thumb, and for 0 beside -1."""
        number = _number(value)
        if number is None or number in self.met:
            return
        self.met.add(number)
        if trouble := self.trouble():
            raise UserError(f"{name} has {trouble}")

    def trouble(self) -> str | None:
        """Why the numbers make no thumbs."""
        thumbs, others = self.met & {-1.0, 0.0, 1.0}, sorted(self.met - {-1.0, 0.0, 1.0})
        if others and thumbs:
            listed = ", ".join(f"{found:g}" for found in sorted(thumbs))
            return (
                f"{listed} and {others[0]:g}: a rating, whose 1 would be read as a thumbs up: write true or "
                "false in its place, make rows of it with `kto-dist mine` (labels.up_from, labels.down_to), or set "
                "data.soft_labels where its numbers are probabilities"
            )
        if {-1.0, 0.0} <= self.met:
            return (
                "both 0 and -1, and 0 may mean no vote or thumbs down: leave out the rows without a vote, "
                "and write true or false for the others"
            )
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _probability(value: Any, soft: bool) -> float | None:
    """Of a good answer, as a label says it; None where it says nothing."""
    number = _number(value) if soft else None
    if number is not None:
        return number if 0 <= number <= 1 else None
    thumb = _meaning(value)
    return None if thumb is None else float(thumb)


def _meaning(value: Any) -> bool | None:
    return thumb_of(str(value)) if isinstance(value, bool | int | float | str) else None


def _weight(record: dict[str, Any]) -> float:
    value = record.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        raise BadRecord("bad weight", f"weight ({short(value)}) must be a finite number, 0 or more; leave it out for 1")
    return weight

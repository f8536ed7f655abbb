"""Thumbs logs in the layouts that people have -> canonical rows.

In:  `Source`s; one layout a source, recognised from its columns.
Out: `Row`s in file order, streamed; or, for what cannot be read, a `UserError` or a count in `BadRows`.

| columns                                             | known from                      | becomes          |
|-----------------------------------------------------|---------------------------------|------------------|
| prompt, completion/response/output, LABEL           | TRL, HALOs binary, NeMo-Aligner | one row          |
| messages or conversations, LABEL                    | LLaMA-Factory, ShareGPT, OpenAI | one; last turn   |
| instruction [input, system, history], output, LABEL | LLaMA-Factory (alpaca)          | one, as messages |
| prompt/messages/instruction, chosen, rejected       | TRL, LLaMA-Factory (DPO, ORPO)  | two              |
| chosen, rejected: whole conversations               | TRL, HH                         | two; same start  |
| prompt, output_A, output_B, label (1: A is better)  | HALOs pairwise                  | two              |

LABEL is the first of `label`, `kto_tag`, `preference`; base/vocabulary.py has its words. 0 and -1 mean undesirable.
Prompts and completions are text or chat messages (role/content, or ShareGPT's from/value). Text is taken as
it is, without a chat template; where one side is messages and the other text, the text becomes a turn.
`system` goes before a prompt made of turns. `weight` (a number, 0 or more) multiplies the row's loss; null
counts as 1. Other columns are ignored, `tools` too: a prompt that lists tools must hold them in its text.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import DOWN, ROLES, UP, role_of, thumb_of
from kto_dist.data.sources import BadRecord, Source, read_records, short

Messages = tuple[dict[str, Any], ...]

_TURNS = ("messages", "conversations")
_PROMPTS = ("prompt", "instruction", *_TURNS)
_ANSWERS = ("completion", "response", "output")
_LABEL_COLUMNS = ("label", "kto_tag", "preference")
_PAIRS = ("chosen", "rejected", "output_A", "output_B")
_COLUMNS = {*_PROMPTS, *_ANSWERS, *_LABEL_COLUMNS, *_PAIRS, "input", "system", "history", "weight"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rated answer. Prompt and completion are both text or both messages."""

    prompt: str | Messages
    completion: str | Messages
    """All turns are the assistant's. May be empty text: whether that can be trained on is decided after tokenising."""
    desirable: bool
    weight: float
    source: str
    """The row's place, "file:line" or "file:row 12", counted from 1."""
    pair: int | None = None
    """The number of the pair that the row is an answer of; None for an answer that was rated alone."""


@dataclass(kw_only=True, slots=True)
class BadRows:
    """Rows that were skipped: how many for each reason, and the first few messages."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, message: str) -> None:
        self.counts[reason] += 1
        self.examples = [*self.examples, message][:5]

    def extend(self, other: "BadRows") -> None:
        self.counts.update(other.counts)
        self.examples = [*self.examples, *other.examples][:5]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which columns of a file hold what."""

    prompt: str | None
    """None: chosen and rejected are whole conversations."""
    answers: tuple[str, ...]
    """(): the prompt's last turn; one column; or (better, worse)."""
    label: str | None
    """None: the first answer is the desirable one."""


def read_rows(sources: Sequence[Source], *, on_bad_row: Literal["error", "skip"], bad: BadRows) -> Iterator[Row]:
    """Rows of all sources, in order. One that cannot be read stops with a `UserError`, or is added to `bad`.

    A file without one usable row is an error either way: it is the wrong file rather than a bad row.
    """
    pairs = itertools.count()
    for source in sources:
        layout, records, rows, problem = None, 0, 0, ""
        for where, record in read_records(source, _COLUMNS):
            records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                layout = layout or _recognise(record)
                converted = list(_convert(layout, record, where, pairs))
            except BadRecord as error:
                message = f"{where}: {error}"
                if on_bad_row == "error":
                    raise UserError(f"{message} (data.on_bad_row: skip leaves such rows out)") from None
                bad.add(error.reason, message)
                problem = problem or message
                continue
            rows += len(converted)
            yield from converted
        if not records:
            raise UserError(f"{source.name} holds no rows: give a file with at least one rated answer")
        if not rows:
            raise UserError(f"{source.name}: not one of its {records} rows could be read; the first: {problem}")


def _recognise(record: dict[str, Any]) -> Layout:
    """The layout that these columns belong to; raises for columns of no known layout."""
    label = next((name for name in _LABEL_COLUMNS if name in record), None)
    prompt = next((name for name in _PROMPTS if name in record), None)
    answer = next((name for name in _ANSWERS if name in record), None)
    turns = next((name for name in _TURNS if name in record), None)
    if "chosen" in record and "rejected" in record:
        return Layout(prompt=prompt, answers=("chosen", "rejected"), label=None)
    if prompt and label and "output_A" in record and "output_B" in record:
        return Layout(prompt=prompt, answers=("output_A", "output_B"), label=label)
    if prompt not in (None, *_TURNS) and answer and label:
        return Layout(prompt=prompt, answers=(answer,), label=label)
    if turns and label:
        return Layout(prompt=turns, answers=(), label=label)
    if (prompt and answer) or turns:
        missing = f"lack a label column ({', '.join(_LABEL_COLUMNS)})"
    else:
        missing = "belong to no layout that is known"
    raise BadRecord(
        "unknown layout",
        f"its columns ({short(', '.join(record))}) {missing}: rename them to prompt, completion and label, "
        "to messages and label, or to prompt, chosen and rejected",
    )


def _convert(layout: Layout, record: dict[str, Any], source: str, pairs: Iterator[int]) -> Iterator[Row]:
    weight = _weight(record)
    prompt = None if layout.prompt is None else _prompt(layout.prompt, record)
    answers = [_text_or_turns(_required(record, name), name) for name in layout.answers]
    label = True if layout.label is None else _label(record, layout.label)
    pair = None
    if not answers:
        assert prompt is not None and not isinstance(prompt, str)
        if prompt[-1]["role"] != "assistant":
            raise BadRecord(
                "no answer",
                f"{layout.prompt}: the last turn ({short(prompt[-1])}) must be the assistant's, the answer "
                "that was rated; leave out what follows it",
            )
        prompt, answers = prompt[:-1], [prompt[-1:]]
    elif len(answers) == 2:
        pair = next(pairs)
        whole = all(not isinstance(answer, str) and answer[0]["role"] != "assistant" for answer in answers)
        if prompt is None or whole:
            prompt, answers = _split_conversations(*answers)
    assert prompt is not None
    # the label is the first answer's; the second one of a pair has the other
    for answer, desirable in zip(answers, (label, not label), strict=False):
        context, completion = _agree(prompt, answer, layout)
        yield Row(prompt=context, completion=completion, desirable=desirable, weight=weight, source=source, pair=pair)


def _prompt(column: str, record: dict[str, Any]) -> str | Messages:
    value = _required(record, column)
    if column == "instruction":
        # The layout puts the input below the instruction, and trainers render both through the chat template.
        asked = [text for text in (_text(value, column), _text(record.get("input") or "", "input")) if text]
        history = record.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRecord("wrong type", f"history ({short(history)}) must be a list of [question, answer] pairs")
        turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
        turns.append(("user", "\n".join(asked)))
        prompt: str | Messages = tuple({"role": role, "content": _text(text, "history")} for role, text in turns)
    else:
        prompt = _text_or_turns(value, column)
    if column in _TURNS and isinstance(prompt, str):
        raise BadRecord("wrong type", f"{column} ({short(value)}) must be a list of messages, not text")
    system = record.get("system")
    if system and not isinstance(prompt, str) and prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": _text(system, "system")}, *prompt)
    return prompt


def _split_conversations(chosen: str | Messages, rejected: str | Messages) -> tuple[Any, list[Any]]:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("wrong type", "chosen and rejected must be both text or both messages")
    limit = min(len(chosen), len(rejected)) - (not isinstance(chosen, str))
    cut = next((place for place in range(limit) if chosen[place] != rejected[place]), limit)
    if isinstance(chosen, str):
        # Two answers may begin with the same words, which belong to them and not to the prompt. HH marks the
        # turns.
        marker = chosen.rfind("\n\nAssistant:", 0, cut)
        cut = marker + len("\n\nAssistant:") if marker >= 0 else chosen.rfind(" ", 0, cut) + 1
    if cut <= 0:
        raise BadRecord(
            "empty prompt",
            f"chosen ({short(chosen)}) and rejected ({short(rejected)}) without a prompt must be whole "
            "conversations with the same start: add a prompt column",
        )
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


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


def _text_or_turns(value: Any, name: str) -> str | Messages:
    if isinstance(value, str):
        return _text(value, name)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be text or a non-empty list of messages")
    return tuple(_turn(turn, name) for turn in turns)


def _turn(turn: Any, name: str) -> dict[str, Any]:
    role_key, content_key = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or role_key not in turn:
        raise BadRecord("wrong type", f"{name}: message {short(turn)} must be an object with role and content")
    role = role_of(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise BadRecord("unknown role", f"{name}: role ({short(turn[role_key])}) must be one of {', '.join(ROLES)}")
    content = turn.get(content_key)
    # Arrow gives every message the keys of all; null ones were never there.
    more = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), f"{name}: content") for part in content)
    if content is None and more.get("tool_calls"):
        content = ""
    return {"role": role, "content": _text(content, f"{name}: content of the {role}'s message"), **more}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(
            "wrong type", f"{name} ({short(value)}) holds half of a surrogate pair: no valid text"
        ) from None
    return value


def _required(record: dict[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise BadRecord(
            "missing field",
            f"{name} is missing or null; the first row has it, so every row of this file needs it",
        )
    return record[name]


def _label(record: dict[str, Any], name: str) -> bool:
    value = _required(record, name)
    desirable = thumb_of(str(value)) if isinstance(value, bool | int | float | str) else None
    if desirable is None:
        raise BadRecord(
            "unknown label",
            f"{name} ({short(value)}) must be true or false, or one of {[*UP]} or {[*DOWN]}",
        )
    return desirable


def _weight(record: dict[str, Any]) -> float:
    value = record.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRecord("bad weight", f"weight ({short(value)}) must be a finite number, 0 or more; leave it out for 1")
    return float(value)

"""Rows -> text, and what of a row its text does not have.

In:  a `Row`, and the `ChatTemplate` where it is of messages. Out: a `Text`; what was found on the way is noted.

Text of messages is what the template writes. Text that was no messages is taken as it is: the prompt, and the answer
after it. Ends that an answer brings along are cut, since the template, or tokenising, writes one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.data.records import short
from kto_dist.data.rows import BadRows, Row
from kto_dist.data.spelling import bare, restored
from kto_dist.data.template import MARK, ChatTemplate, Untemplatable

ENDED = "answers that end with an end mark of their own: one is trained on, not two"
TYPED = "rows in which turn marks were typed into a message: spelled in ordinary tokens, they are no turns"
MARKED = "answers with turn marks inside, which are trained on as such"
THOUGHTS = "answers whose thoughts the chat template leaves out"
THOUGHTS_SIZE = "characters of such thoughts"
CUT = "prompts end before the template's header for new answers does, and the answers are without what is cut"
ARGUMENTS = "answers whose tool calls the chat template writes with other arguments"
UNCALLED = "rows with a tool call before the answer that the chat template leaves out"
_THOUGHT = re.compile(r"<(think|thinking)>(.*?)</\1>", re.DOTALL)
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class Unfit(Exception):
    """A row that cannot be trained on: `reason` is the kind to count, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A row as text; `MARK` stands for each of `typed`, which are over `full`."""

    row: Row
    prompt: str
    """What the model sees before it answers; the start of `full`."""
    full: str
    typed: tuple[str, ...] = ()
    cut_header: bool = False

    @property
    def plain(self) -> bool:
        """Whether the row was text."""
        return isinstance(self.row.prompt, str)

    @property
    def typed_before(self) -> tuple[str, ...]:
        """Those of `typed` that the prompt has."""
        return self.typed[: self.prompt.count(MARK)]

    @property
    def says_nothing(self) -> bool:
        completion = self.row.completion
        if isinstance(completion, str):
            return not completion.strip()
        return not any(turn["content"].strip() or turn.get("tool_calls") for turn in completion)


def as_text(row: Row, template: ChatTemplate | None, eos: str | None, seen: BadRows) -> Text:
    """Raises `Unfit`, and `UserError` for messages without a template."""
    if isinstance(row.prompt, str) or isinstance(row.completion, str):
        assert isinstance(row.prompt, str) and isinstance(row.completion, str)
        answer, ended = _without_end(row.completion, (eos,) if eos else ())
        if ended:
            seen.note(ENDED, row.source, short(ended))
        return Text(row=replace(row, completion=answer), prompt=row.prompt, full=row.prompt + answer)
    if template is None:
        raise UserError(
            f"{row.source} holds chat messages and the tokenizer has no chat template: use the "
            "instruction-tuned model's tokenizer, add a chat_template.jinja to the model's folder, or "
            "write prompts as text"
        )
    *before, last = row.completion
    content, ended = _without_end(last["content"], template.endings)
    sent = replace(row, completion=(*before, {**last, "content": content}))
    try:
        found = template.render(sent)
    except Untemplatable as error:
        raise Unfit("refused by the chat template", f"the chat template refuses this row: {error}") from None
    text = Text(row=sent, prompt=found.prompt, full=found.full, typed=found.forged, cut_header=bool(found.cut_header))
    if ended:
        seen.note(ENDED, row.source, short(ended))
    if any(found.forged):
        seen.note(TYPED, row.source, short(next(filter(None, found.forged))))
    if found.cut_header:
        seen.note(CUT, row.source, short(found.cut_header))
    if not text.says_nothing:
        _compare(text, template, seen)
    return text


def _without_end(answer: str, endings: tuple[str, ...]) -> tuple[str, str]:
    """An answer without the end marks at its end, and the last one of these."""
    ended = ""
    while True:
        bare = answer.rstrip()
        mark = next((mark for mark in endings if mark and bare.endswith(mark)), None)
        if mark is None:
            return answer, ended
        answer, ended = bare[: len(bare) - len(mark)], mark


def _compare(text: Text, template: ChatTemplate, seen: BadRows) -> None:
    """Notes what of the row the template left out. Raises `Unfit` where that is a part of the answer itself."""
    row = text.row
    assert not isinstance(row.prompt, str) and not isinstance(row.completion, str)
    whole = restored(text.full, text.typed)
    asked, said = bare(whole), bare(text.full[len(text.prompt) :])
    for key in template.unread_keys(row):
        seen.unused[f"a message's {key}"] += 1
    for key in template.unknown_settings([*row.template_kwargs]):
        seen.unused[f"chat_template_kwargs' {key}"] += 1
    if row.tools and not any(bare(name) in asked for name in map(_name_of, row.tools)):
        seen.unused["tools, which the chat template leaves out"] += 1
    for role in sorted({turn["role"] for turn in row.prompt if not _in(turn, asked)}):
        seen.note(f"rows with a message of the {role} that the chat template leaves out or changes", row.source)
    called = [call for turn in row.prompt for call in turn.get("tool_calls") or ()]
    unsaid = next((call for call in called if bare(_name_of(call)) not in asked), None)
    if unsaid is not None:
        seen.note(UNCALLED, row.source, short(unsaid))
    lost = 0
    for turn in row.completion:
        for part in _spoken(turn):
            if bare(part) not in said:
                raise Unfit(
                    "left out by the chat template",
                    f"the chat template leaves out or changes what the answer says ({short(part)}): it would not be "
                    "the answer that was rated",
                )
        lost += sum(len(thought) for thought in _thoughts(turn) if bare(thought) not in said)
        for call in turn.get("tool_calls") or ():
            if bare(_name_of(call)) not in said:
                raise Unfit(
                    "left out by the chat template",
                    f"the chat template leaves out the answer's tool call ({short(call)}): it would not be the answer "
                    "that was rated",
                )
            if not all(bare(leaf) in said or bare(json.dumps(leaf)[1:-1]) in said for leaf in _leaves(call)):
                seen.note(ARGUMENTS, row.source, short(call))
        if template.marks.search(turn["content"]):
            seen.note(MARKED, row.source, short(turn["content"]))
    if lost:
        seen.note(THOUGHTS, row.source)
        seen.note(THOUGHTS_SIZE, row.source, rows=lost)


def _in(turn: dict[str, Any], asked: str) -> bool:
    if turn["role"] == "assistant":  # templates leave out the thoughts of earlier answers, as they should
        return all(bare(part) in asked for part in _spoken(turn))
    content = turn["content"]
    return bare(content) in asked or bare(json.dumps(content, ensure_ascii=False)[1:-1]) in asked


def _spoken(turn: dict[str, Any]) -> list[str]:
    """What an assistant's message says, without its thoughts."""
    return [part for part in re.split(r"</?think(?:ing)?>", _THOUGHT.sub("<think>", turn["content"])) if part.strip()]


def _thoughts(turn: dict[str, Any]) -> Iterator[str]:
    yield from (found[2] for found in _THOUGHT.finditer(turn["content"]) if found[2].strip())
    named = [turn[key] for key in _THOUGHT_KEYS if isinstance(turn.get(key), str)]
    yield from dict.fromkeys(thought for thought in named if thought.strip())


def _name_of(call: dict[str, Any]) -> str:
    """Of a tool, or of a call of it."""
    function = call.get("function")
    named = function if isinstance(function, dict) else call
    return str(named.get("name", ""))


def _leaves(call: Any) -> Iterator[str]:
    """The texts among a call's arguments."""
    function = call.get("function")
    given = (function if isinstance(function, dict) else call).get("arguments")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return
    queue = [given]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, list):
            queue += value
        elif isinstance(value, str):
            yield value

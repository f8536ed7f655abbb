"""Where a whole conversation in one text, or in one list of messages, is cut into prompt and answers.

In:  the two sides of a pair that have no prompt of their own. Out: the prompt that they share, and the two answers.

A text is cut at the last assistant's mark that both share. Marks are those of the formats that people have written
conversations in; without them nobody can say where a prompt ends, since two answers may begin with the same words.
"""

import re
from dataclasses import dataclass
from typing import Any

from kto_dist.data.records import BadRecord, short
from kto_dist.data.turns import Messages


@dataclass(frozen=True, slots=True)
class Marks:
    """How a format marks who speaks."""

    user: re.Pattern[str]
    assistant: re.Pattern[str]


def _marks(user: str, assistant: str) -> Marks:
    return Marks(re.compile(user), re.compile(assistant))


_LINE = r"(?:\A|\n)[ \t]*(?:#+[ \t]*|\*\*)?(?:{}):(?:\*\*)?\n?"
FORMATS = (
    # Anthropic's HH
    _marks(r"(?:\A|\n\n)Human:", r"\n\nAssistant:"),
    _marks(
        _LINE.format("Human|HUMAN|User|USER|Prompter|Instruction"),
        _LINE.format("Assistant|ASSISTANT|AI|Bot|GPT|Response"),
    ),
    _marks(r"<\|im_start\|>user\n", r"<\|im_start\|>assistant\n"),
    _marks(
        r"<\|start_header_id\|>user<\|end_header_id\|>\n\n",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    ),
    _marks(r"<start_of_turn>user\n", r"<start_of_turn>model\n"),
    _marks(r"<\|(?:user|prompter)\|>\n?", r"<\|assistant\|>\n?"),
    _marks(r"\[INST\]", r"\[/INST\]"),
)


def split_pair(
    chosen: str | Messages, rejected: str | Messages, others: list[str]
) -> tuple[str | Messages, list[str | Messages]]:
    """The shared prompt, and both answers. `others`: columns of the record that nothing is known of."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _cut_of_text(chosen, rejected, others)
        return chosen[:cut], [chosen[cut:], rejected[cut:]]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecord("wrong type", "chosen and rejected must be both text or both messages")
    limit = min(len(chosen), len(rejected)) - 1
    cut = next((place for place in range(limit) if chosen[place] != rejected[place]), limit)
    if cut <= 0:
        raise BadRecord(
            "empty prompt",
            f"chosen ({short(list(chosen))}) and rejected ({short(list(rejected))}) without a prompt must be whole "
            f"conversations with the same start: {_add(others)}",
        )
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _cut_of_text(chosen: str, rejected: str, others: list[str]) -> int:
    shorter = min(len(chosen), len(rejected))
    same = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    for marks in FORMATS:
        found = [mark.end() for mark in marks.assistant.finditer(chosen) if mark.end() <= same]
        if not found or not marks.user.search(chosen, 0, found[-1]):
            continue
        cut = found[-1]
        for name, answer in (("chosen", chosen[cut:]), ("rejected", rejected[cut:])):
            turn = marks.user.search(answer) or marks.assistant.search(answer)
            if turn:
                raise BadRecord(
                    "parts too early",
                    f"{name} goes on with {short(answer[turn.start() : turn.start() + 60])} after the turn in which it "
                    "parts from the other side: the two must differ in the last answer alone",
                )
        return cut
    raise BadRecord(
        "no prompt",
        f"chosen ({short(chosen)}) and rejected have no prompt beside them, and no marked turns that would tell where "
        f"the answers start: {_add(others)}",
    )


def _add(others: list[str]) -> str:
    if not others:
        return "add a prompt column"
    listed = ", ".join(others)
    return f"if one of the other columns ({listed}) is the prompt, say so: data.columns: {{prompt: {others[0]}}}"


def goes_on(prompt: str, answer: str) -> str | None:
    """Where an answer to a prompt with marked turns holds the next turn of the user: that turn's start."""
    for marks in FORMATS:
        if marks.user.search(prompt) and marks.assistant.search(prompt):
            turn = marks.user.search(answer)
            return answer[turn.start() : turn.start() + 60] if turn else None
    return None


def without_prompt(prompt: Any, answers: list[Any]) -> tuple[list[Any], bool]:
    """Answers whose messages repeat the prompt's, without them; and whether texts repeat the prompt's text."""
    if isinstance(prompt, str):
        repeats = bool(prompt.strip()) and all(isinstance(a, str) and a.startswith(prompt) for a in answers)
        return answers, repeats
    if all(not isinstance(a, str) and len(a) > len(prompt) and a[: len(prompt)] == prompt for a in answers):
        return [answer[len(prompt) :] for answer in answers], False
    return answers, False

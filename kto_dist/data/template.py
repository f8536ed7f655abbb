"""What a tokenizer's chat template does, found once by trying, and rows rendered with it.

In:  a tokenizer, and `data.template_kwargs`. Out: a `ChatTemplate`, which makes a `Rendered` of a row of messages.

1. `look_at`   what the template wants: content as text or as parts, tool calls' arguments as objects or as text;
               what it knows: names of settings, keys of messages; which tokens it marks turns with
2. `render`    the prompt with the header that starts an answer, and the whole conversation

Turn marks that somebody typed are text. Every special token, every other added token that the template marks turns
with, and every mark of its own that is no token at all (`[/INST]`, `ASSISTANT:`, Zephyr's `<|user|>`), is set apart
where it stands in the text of the system, the user or a tool, and encoded as ordinary text, or in other tokens than the
template's (`spelling.py`): a prompt cannot forge a turn. The assistant's own text is left as it is.
"""

import difflib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
import jinja2.sandbox

from kto_dist.base.errors import UserError
from kto_dist.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters, which no text may hold: around a forged mark while it is rendered, and in its place afterwards.
_START, _END, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
_THOUGHT = re.compile(r"(</?think(ing)?>)+")
_ASK, _SAY, _CITY = "Qaskq", "Asaya", "Rcityr"
# What every template may use, and no user sets.
_OWN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token"}
_OWN |= {"eos_token", "pad_token", "unk_token", "namespace", "range", "dict", "lipsum", "cycler", "joiner"}
_REFUSALS = (
    # On purpose (roles must alternate); the others come out of expressions, as in `None + text`.
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Untemplatable(Exception):
    """The chat template rejects these messages, or hides where the completion starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A row of messages as text."""

    prompt: str
    """With the header that starts an answer, as far as the whole has it. `MARK` stands for each of `forged`."""
    full: str
    """With the answer."""
    forged: tuple[str, ...]
    """Turn marks in the text of others than the assistant, in order, over `full`; the first ones are the prompt's."""
    cut_header: str
    """What starts a new answer and is not there before this one; mostly empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    tokenizer: "PreTrainedTokenizerBase"
    settings: Mapping[str, Any]
    """`data.template_kwargs`."""
    content: Literal["text", "parts"]
    arguments: Literal["objects", "text"]
    variables: frozenset[str] | None
    """Names that the template looks up; None where it could not be read."""
    words: frozenset[str] | None
    """Attributes and texts in the template: a key of a message that is not among them is never read."""
    control: re.Pattern[str]
    """Tokens, and marks in plain text, that nobody but the template and the assistant may write."""
    marks: re.Pattern[str]
    """Those of them that stand around turns."""
    endings: tuple[str, ...]
    """Tokens that end an answer, EOS first."""
    reserved: frozenset[str]
    """Names that are no settings of the template, but the tokenizer's own."""

    def render(self, row: Row) -> Rendered:
        """Raises `Untemplatable`."""
        assert not isinstance(row.prompt, str) and not isinstance(row.completion, str)
        taken = self.reserved & {*row.template_kwargs}
        if taken:
            raise Untemplatable(f"chat_template_kwargs ({', '.join(sorted(taken))}) are no settings of a template")
        whole = [self._as_wanted(turn) for turn in (*row.prompt, *row.completion)]
        before, settings = len(row.prompt), {**self.settings, **self._marked(row.template_kwargs)}
        tools = [self._marked(tool) for tool in row.tools] or None
        prompt, _ = self._rendered(whole[:before], tools, settings, header=True)
        full, forged = self._rendered(whole, tools, settings, header=False)
        if full.startswith(prompt):
            return Rendered(prompt=prompt, full=full, forged=forged, cut_header="")
        shorter = min(len(prompt), len(full))
        same = next((place for place in range(shorter) if prompt[place] != full[place]), shorter)
        if same < len(self._rendered(whole[:before], tools, settings, header=False)[0]):
            raise Untemplatable("it renders the earlier turns differently once the answer follows them")
        return Rendered(prompt=prompt[:same], full=full, forged=forged, cut_header=prompt[same:])

    def unknown_settings(self, names: Sequence[str]) -> list[str]:
        """Those of the names that the template never looks up."""
        return [] if self.variables is None else [name for name in names if name not in self.variables]

    def unread_keys(self, row: Row) -> list[str]:
        """Keys of the row's messages that the template never reads."""
        if self.words is None:
            return []
        keys = {key for turn in (*row.prompt, *row.completion) if isinstance(turn, dict) for key in turn}
        thoughts = {"reasoning_content", "reasoning", "thinking"}
        # the tokenizer gives thoughts under all of their names
        return [
            key
            for key in sorted(keys - {"role", "content"})
            if not self.words & (thoughts if key in thoughts else {key})
        ]

    def _rendered(
        self, turns: list[dict[str, Any]], tools: Any, settings: Mapping[str, Any], *, header: bool
    ) -> tuple[str, tuple[str, ...]]:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=header, **settings
            )
        except _REFUSALS as error:
            raise Untemplatable(str(error) or type(error).__name__) from None
        assert isinstance(text, str)
        if _START not in text and _END not in text:
            return text, ()
        typed: list[str] = []

        def apart(found: re.Match[str]) -> str:
            # a mark that the template took one side of is still text; a side alone only keeps its neighbours apart
            typed.append(found["mark"] or "")
            return MARK

        pattern = f"{_START}(?P<mark>{self.control.pattern})?{_END}?|{_END}"
        return re.sub(pattern, apart, text), tuple(typed)

    def _as_wanted(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A message as the template wants it, with the marks that others than the assistant typed set apart."""
        wanted = dict(turn) if turn["role"] == "assistant" else self._marked(turn)
        if wanted.get("tool_calls"):
            wanted["tool_calls"] = [self._call(call) for call in wanted["tool_calls"]]
        if self.content == "parts":
            wanted["content"] = [{"type": "text", "text": wanted["content"]}]
        return wanted

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"])}
        given = call.get("arguments")
        if self.arguments == "objects" and isinstance(given, str):
            decoded = _decoded(given)
            return {**call, "arguments": decoded} if isinstance(decoded, dict) else call
        if self.arguments == "text" and isinstance(given, dict):
            return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
        return call

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            if any(sign in value for sign in (_START, _END, MARK)):
                raise Untemplatable("its text holds a noncharacter (U+FDD0 to U+FDD2), which no text may")
            return self.control.sub(rf"{_START}\g<0>{_END}", value)
        if isinstance(value, Mapping):
            return {key: self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list | tuple) else value


def look_at(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]) -> ChatTemplate | None:
    """None for a tokenizer without a chat template. Raises `UserError` for settings that the template does not know."""
    if not tokenizer.chat_template:
        return None
    variables, words = _read(tokenizer.chat_template)
    content = _content(tokenizer, settings)
    frame, ending = _frame(tokenizer, settings, content)
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    control = [token.content for token in added if token.special or token.content in frame]
    closing = sorted((text for text in control if text in ending), key=ending.index)
    plain = _plain_marks(frame, control)
    eos = tokenizer.eos_token
    template = ChatTemplate(
        tokenizer=tokenizer,
        settings=settings,
        content=content,
        arguments=_arguments(tokenizer, settings, content),
        variables=variables,
        words=words,
        control=_any_of([*control, *plain]),
        marks=_any_of([text for text in [*control, *plain] if text in frame and not _THOUGHT.fullmatch(text)]),
        endings=tuple(dict.fromkeys([*([eos] if isinstance(eos, str) else []), *closing])),
        reserved=frozenset({*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}),
    )
    taken = sorted(template.reserved & {*settings})
    for name in taken or template.unknown_settings([*settings]):
        known = sorted((variables or set()) - _OWN)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known) or 'no settings'}"
        raise UserError(f"data.template_kwargs: {name} is no setting of this model's chat template: {hint}")
    return template


def _any_of(texts: list[str]) -> re.Pattern[str]:
    # longer ones first: a mark may hold another one; (?!) matches nothing
    return re.compile("|".join(map(_as_pattern, sorted(texts, key=len, reverse=True))) or "(?!)")


def _as_pattern(mark: str) -> str:
    # a name with a colon (`User:`) is a mark at the start of a line alone
    return rf"(?<![^\n{_START}]){re.escape(mark)}" if mark[0].isalpha() else re.escape(mark)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _plain_marks(frame: str, control: list[str]) -> list[str]:
    """What the template writes between turns, right before what is said, that is neither a token nor a bare word."""
    tokens, found = _any_of(control), dict[str, None]()
    said = re.split(f"({_ASK}|{_SAY})", frame)
    # two questions in a row are the system's and the user's, or of two renderings
    for between in (said[place] for place in range(2, len(said) - 2, 2) if said[place - 1] != said[place + 1]):
        lines = [line.strip() for part in tokens.split(between) for line in part.split("\n")]
        found |= dict.fromkeys(line for line in lines if re.search(r"\w", line) and not re.fullmatch(r"[\w ]+", line))
    return [line for line in found if not _THOUGHT.fullmatch(line)]


def _read(template: str | dict[str, str]) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """Names that the template looks up, and its attributes and texts."""
    variables: set[str] = set()
    words: set[str] = set()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        for source in template.values() if isinstance(template, dict) else [template]:
            tree = environment.parse(_TAG.sub("", source))
            variables |= jinja2.meta.find_undeclared_variables(tree)
            words |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
            words |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    except jinja2.TemplateError:  # a tag that only its own library knows
        return None, None
    return frozenset(variables), frozenset(words)


def _tried(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[dict[str, Any]], settings: Mapping[str, Any], content: str
) -> str:
    """What the template makes of it; empty where it refuses."""
    if content == "parts":
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, **settings)
    except _REFUSALS:
        return ""
    return text if isinstance(text, str) else ""


def _content(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]) -> Literal["text", "parts"]:
    """Templates of models that see images may want parts, and leave out text without a word."""
    turns = [{"role": "user", "content": _ASK}, {"role": "assistant", "content": _SAY}]
    as_text = _tried(tokenizer, turns, settings, "text")
    if _ASK in as_text and _SAY in as_text:
        return "text"
    as_parts = _tried(tokenizer, turns, settings, "parts")
    return "parts" if _ASK in as_parts and _SAY in as_parts else "text"


def _arguments(
    tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any], content: str
) -> Literal["objects", "text"]:
    """Some templates write arguments as JSON, which encodes text twice; others join them to text."""

    def tried(arguments: Any) -> str:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": _ASK},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return _tried(tokenizer, turns, settings, content)

    as_objects, as_text = tried({"city": _CITY}), tried(json.dumps({"city": _CITY}))
    if _CITY in as_objects and f"'{_CITY}'" not in as_objects:
        return "objects"
    return "text" if _CITY in as_text and f'\\"{_CITY}' not in as_text else "objects"


def _frame(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any], content: str) -> tuple[str, str]:
    """What the template writes around turns, and what it writes after an answer."""
    system = {"role": "system", "content": _ASK}
    talk = [{"role": role, "content": said} for role, said in (("user", _ASK), ("assistant", _SAY))]
    around = [_tried(tokenizer, turns, settings, content) for turns in ([system, *talk, talk[0]], [*talk, talk[0]])]
    answered = _tried(tokenizer, talk, settings, content)
    return "\n".join([*around, answered]), answered.rpartition(_SAY)[2]

"""Chat messages as logs have them -> messages as chat templates want them.

In:  a cell: text, a list of messages, or JSON text of such a list.
Out: messages with `role` (system, developer, user, assistant, tool), `content` (text) and what else they had: tool
     calls as `tool_calls`, thoughts as `reasoning_content`. What is no text and no tool call is a `BadRecord`.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from kto_dist.base.vocabulary import ROLES, role_of
from kto_dist.data.records import BadRecord, loads, short

Messages = tuple[dict[str, Any], ...]

_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text")
_DEEPEST = 64
_TEXT_PARTS = ("text", "input_text", "output_text")
# A list of messages in a cell of text: JSON, or what pandas writes of Python's own objects into CSV.
_LISTED = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")


def text_or_turns(value: Any, name: str) -> str | Messages:
    """A side of a row. Text that is a list of messages in JSON is read as that list."""
    if isinstance(value, str):
        listed = listed_in(value)
        if listed is None:
            return text(value, name)
        value = listed
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be text or a non-empty list of messages")
    return tuple(_turn(turn, name) for turn in turns)


def listed_in(value: str) -> list[Any] | None:
    """The list of messages that a text spells, in JSON or as Python prints it; None for other text."""
    if not _LISTED.match(value):
        return None
    found = object_in(value)
    if isinstance(found, list) and all(_role_key(turn) and _content_key(turn) for turn in found):
        return found
    return None


def object_in(value: str) -> Any:
    """What a text spells, in JSON or as Python prints it; None for other text."""
    try:
        return loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value.strip())
    # the last two: text that nests too deep for the parser
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(
            "wrong type",
            f"{name} ({short(value)}) holds half of a surrogate pair or bytes that are no UTF-8: no valid text",
        ) from None
    return value


def valid(value: Any, name: str, depth: int = 0) -> Any:
    """A nested value whose texts are all valid, without its objects' nulls: Arrow gives each object the keys of all."""
    if depth > _DEEPEST:
        raise BadRecord("nests too deep", f"{name} nests deeper than {_DEEPEST} levels: no template can need that")
    if isinstance(value, str):
        return text(value, name)
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if item is not None}
        return {text(key, name): valid(item, name, depth + 1) for key, item in kept.items()}
    return [valid(item, name, depth + 1) for item in value] if isinstance(value, list | tuple) else value


def tools_of(value: Any, name: str) -> list[dict[str, Any]] | None:
    """A row's tools: a list, or JSON text of it, of functions with or without `{"type": "function"}` around them."""
    given = object_in(value) if isinstance(value, str) and value.strip() else value
    if not given and not isinstance(value, str):
        return None
    listed = [given] if isinstance(given, dict) else given
    if isinstance(listed, list):
        listed = [object_in(tool) if isinstance(tool, str) else tool for tool in listed]
    if not isinstance(listed, list) or not all(isinstance(tool, dict) and tool for tool in listed):
        if isinstance(value, str) and not value.strip():
            return None
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be a list of functions, or such a list as JSON")
    bare = [bool(tool.get("name")) and "function" not in tool and "type" not in tool for tool in listed]
    wrapped = [
        {"type": "function", "function": tool} if alone else tool for tool, alone in zip(listed, bare, strict=True)
    ]
    return valid(wrapped, name) or None


def settings_of(value: Any, name: str) -> dict[str, Any]:
    """A row's settings of the chat template: an object, or JSON text of it."""
    if value is None or value == "":
        return {}
    given = object_in(value) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise BadRecord("wrong type", f"{name} ({short(value)}) must be an object, or an object as JSON")
    return {key: item for key, item in valid(given, name).items() if item is not None}


def _role_key(turn: Any) -> str | None:
    return next((key for key in _ROLE_KEYS if isinstance(turn, dict) and isinstance(turn.get(key), str)), None)


def _content_key(turn: Any) -> str | None:
    return next((key for key in _CONTENT_KEYS if isinstance(turn, dict) and key in turn), None)


def _turn(turn: Any, name: str) -> dict[str, Any]:
    role_key, content_key = _role_key(turn), _content_key(turn)
    if role_key is None:
        raise BadRecord("wrong type", f"{name}: message {short(turn)} must be an object with role and content")
    role = role_of(turn[role_key])
    if role is None:
        raise BadRecord("unknown role", f"{name}: role ({short(turn[role_key])}) must be one of {', '.join(ROLES)}")
    # Arrow gives every message the keys of all, and OpenAI's API says null of what is not there.
    more = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    call = more.pop("function_call", None)
    calls = more.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = object_in(calls)
    said = turn.get(content_key) if content_key else None
    if not (call or calls) and turn[role_key].strip().casefold() == "function_call":
        calls = _called(said)
        said = None if calls else said
    if call and not calls:
        calls = [{"type": "function", "function": object_in(call) if isinstance(call, str) else call}]
    if calls:
        if not isinstance(calls, list) or not all(isinstance(item, dict) for item in calls):
            raise BadRecord("wrong type", f"{name}: tool_calls ({short(calls)}) must be a list of calls")
        more["tool_calls"] = calls
    content = said
    if isinstance(content, list):
        content, thoughts = _of_parts(content, name)
        if thoughts and "reasoning_content" not in more:
            more["reasoning_content"] = thoughts
    if content is None and calls:
        content = ""
    where = f"{name}: content of the {role}'s message"
    return {"role": role, "content": text(content, where), **valid(more, f"{name}: the {role}'s message")}


def _called(said: Any) -> list[dict[str, Any]]:
    """ShareGPT's turn of a `function_call`, whose text is the JSON of one call or of several; [] for other text."""
    found = object_in(said) if isinstance(said, str) else said
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _of_parts(parts: list[Any], name: str) -> tuple[str, str]:
    """Content in parts, as text and as thoughts."""
    said, thought = [], []
    for part in parts:
        if isinstance(part, str):
            said.append(text(part, f"{name}: content"))
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
            said.append(text(part.get("text"), f"{name}: content"))
        elif isinstance(part, dict) and part.get("type") == "thinking":
            thought.append(text(part.get("thinking"), f"{name}: content"))
        else:
            raise BadRecord(
                "wrong type", f"{name}: content ({short(part)}) must be text: nothing else can be trained on"
            )
    return "".join(said), "\n".join(thought)

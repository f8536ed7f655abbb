"""Turns of a conversation, in whatever dress an application keeps them -> role, text and calls of tools.

In:  a list of turns (or JSON text of one, an object around one, a map of turns by id), and the `turns` and `roles`
     sections.
Out: `Turn`s in the order of the conversation that led to the rated answer; `Bad` for what cannot be read.

What a turn holds and a prompt cannot take (images, thinking, attachments) is counted by name in `Unused`.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kto_dist.base.json_pointer import MISSING, find, opened
from kto_dist.base.vocabulary import role_of
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.pointers import parse, text_of

# Where applications keep who speaks. One of the first that is there decides; of the others, one with a known role.
_ROLES = ("role", "from", "message.role")
_WEAK_ROLES = ("type", "sender", "author", "speaker", "sender_type", "/author/role")
_WEAK_KEYS = tuple(parse(name).rest for name in _WEAK_ROLES)
_CONTENTS = ("content", "value", "message.content", "text", "message", "parts", "body")
_IDS = ("id", "messageId", "message_id", "uuid")
_PARENTS = ("parentId", "parent_id", "parentMessageId", "parent_message_id", "parent")
# Objects that some wrap a turn into: ChatGPT's exports, LangChain's messages.
_WRAPPERS = ("message", "data", "kwargs")
_TEXT_BLOCKS = (None, "text", "input_text", "output_text")
# Of a turn: read by people as part of it, and no part of a prompt.
_EXTRAS = (
    "reasoning_content", "reasoning", "thinking", "images", "image", "audio", "video", "files", "attachments",
    "refusal",
)  # fmt: skip
_DEEPEST = 100_000  # turns above an answer, so that a circle of parents ends


class Bad(Exception):
    """A row that cannot be used: a code of problems.py, and the value at fault."""

    def __init__(self, code: str, value: Any = None) -> None:
        super().__init__(code)
        self.code = code
        self.value = None if value is None else text_of(value)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, read."""

    role: str
    text: str
    calls: tuple[dict[str, Any], ...] = ()
    """Calls of tools, as OpenAI's API writes them: the arguments are JSON text."""
    call: str | None = None
    """Of a tool's turn: the id of the call that it answers."""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.calls:
            message["tool_calls"] = list(self.calls)
        if self.call is not None:
            message["tool_call_id"] = self.call
        return message


@dataclass(frozen=True, slots=True)
class Node:
    """A turn's place in its conversation."""

    turns: tuple[Turn, ...]
    """One, or several where one message holds results of tools and words; none where there is nothing to read."""
    id: str | None
    parent: str | None
    has_parent: bool


@dataclass(slots=True)
class Reader:
    """Reads turns under one config."""

    roles: Mapping[str, str]
    role_keys: tuple[tuple[str, ...], ...] | None
    content_keys: tuple[tuple[str, ...], ...]
    id_keys: tuple[tuple[str, ...], ...]
    parent_keys: tuple[tuple[str, ...], ...]
    joined_by: str
    in_a_row: str | None
    unused: Counter[str] = field(default_factory=Counter)
    """What the current row holds and no prompt can: name -> times."""
    called: bool = False
    """Whether some turn called tools."""

    @classmethod
    def of(cls, config: MiningConfig) -> "Reader":
        turns = config.turns

        def keys(setting: str | None, known: Sequence[str]) -> tuple[tuple[str, ...], ...]:
            return tuple(parse(name).rest for name in ([setting] if setting is not None else known))

        return cls(
            roles=config.roles.meanings(),
            role_keys=None if turns.role is None else keys(turns.role, ()),
            content_keys=keys(turns.content, _CONTENTS),
            id_keys=keys(turns.id, _IDS),
            parent_keys=keys(turns.parent, _PARENTS),
            joined_by=turns.joined_by,
            in_a_row=turns.answers_in_a_row,
        )

    def role(self, name: str) -> str | None:
        return self.roles.get(name.strip().casefold()) or role_of(name)

    def nodes(self, value: Any) -> list[Node]:
        """All turns of a list, or whatever holds one; their places lead from one to the next."""
        value = opened(value)
        if isinstance(value, dict) and isinstance(opened(value.get("messages")), list):
            value = opened(value["messages"])  # a request's body
        if isinstance(value, dict):
            within = [opened(turn) for turn in value.values()]
            if value and all(isinstance(turn, dict) for turn in within) and not self._is_turn(value):
                return [self._node(turn) for turn in within]
            value = [value]
        if not isinstance(value, list) or not value:
            raise Bad("messages", value)
        if all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            if all(isinstance(name, str) and self.role(name) is not None for name, _ in value):
                # [role, text], as FastChat logs it; an answer that has not come yet is null
                turns = [{"role": role, "content": text} for role, text in value if text is not None]
                return [self._node(turn) for turn in turns]
            # [question, answer] pairs, as Gradio keeps them; an answer that has not come yet is null
            value = [
                {"role": role, "content": text}
                for pair in value
                for role, text in zip(("user", "assistant"), pair, strict=True)
                if text is not None
            ]
        return [self._node(turn) for turn in value]

    def _is_turn(self, value: dict[str, Any]) -> bool:
        try:
            return bool(self._role(_unwrapped(value)))
        except Bad:
            return False

    def _node(self, raw: Any) -> Node:
        raw = opened(raw)
        if not isinstance(raw, dict):
            raise Bad("messages", raw)
        id, parent = _first(raw, self.id_keys), _first(raw, self.parent_keys)
        inner = raw.get("message", MISSING)
        # the root of a ChatGPT export has no message
        turns = () if inner is None and "role" not in raw and "content" not in raw else self.turns(_unwrapped(raw))
        return Node(
            turns=turns,
            id=None if isinstance(id, dict | list) else text_of(id),
            parent=None if isinstance(parent, dict | list) else text_of(parent),
            has_parent=parent is not MISSING,
        )

    def turns(self, raw: dict[str, Any]) -> tuple[Turn, ...]:
        """What one message says: one turn, or results of tools and then words."""
        role = self._role(raw)
        if role == "ignore":
            self.unused["turns of a role that is left out"] += 1
            return ()
        for name in _EXTRAS:
            if raw.get(name):
                self.unused[f"{name} of a turn"] += 1
        return self.said(role, _first(raw, self.content_keys), raw)

    def said(self, role: str, content: Any, raw: dict[str, Any]) -> tuple[Turn, ...]:
        """The turns of a message whose role and content are known; `raw` has its calls of tools."""
        text, calls, results = self.content(content, raw)
        calls = [*_calls(raw), *calls]
        self.called |= bool(calls)
        if text is None and not calls and not results:
            raise Bad("no text in a turn", raw)
        if text is None and not calls:
            return tuple(results)
        call = raw.get("tool_call_id") if role == "tool" else None
        return (*results, Turn(role, text or "", tuple(calls), call if isinstance(call, str) else None))

    def _role(self, raw: dict[str, Any]) -> str:
        keys: Sequence[tuple[str, ...]]
        if self.role_keys is not None:
            keys = self.role_keys
        else:
            strong = next(((name,) for name in _ROLES if raw.get(name) is not None), None)
            keys = _WEAK_KEYS if strong is None else (strong,)
        said: Any = None
        for key in keys:
            value = find(raw, key)
            name = None if isinstance(value, dict | list) else text_of(value)
            if name is not None:
                said = name if said is None else said
                role = self.role(name)
                if role is not None:
                    return role
        if said is None:
            raise Bad("messages", raw)
        raise Bad("role of a turn", said)

    def content(self, content: Any, raw: Any) -> tuple[str | None, list[dict[str, Any]], list[Turn]]:
        """(text, calls of tools, turns of tools) of a turn's content: text, or blocks of which some are text."""
        if isinstance(content, str):
            return content, [], []
        if content is None or content is MISSING:
            return None, [], []
        if isinstance(content, dict):
            inner = next((content[key] for key in ("parts", "text", "content", "value") if key in content), MISSING)
            if inner is MISSING:
                raise Bad("messages", raw)
            return self.content(inner, raw)
        if not isinstance(content, list):
            raise Bad("messages", raw)
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        results: list[Turn] = []
        for block in content:
            kind = block.get("type") if isinstance(block, dict) else None
            if isinstance(block, str):
                texts.append(block)
            elif not isinstance(block, dict):
                raise Bad("messages", raw)
            elif kind == "tool_use":
                calls.append(_call(block.get("id"), block.get("name"), block.get("input")))
            elif kind == "tool_result":
                said, _, _ = self.content(block.get("content"), raw)
                results.append(Turn("tool", said or "", call=text_of(block.get("tool_use_id"))))
            elif kind in _TEXT_BLOCKS and (said := _block_text(block)) is not None:
                texts.append(said)
            else:
                self.unused[f"{kind or 'other'} blocks"] += 1
        return ("".join(texts) if texts else None), calls, results

    def answer(self, value: Any) -> str:
        """The text of an answer: text, or one turn of the assistant, or content in blocks."""
        if value is None:
            return ""
        if not isinstance(value, dict | list):
            return text_of(value) or ""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            value = value[0]
        if isinstance(value, dict):
            value = _unwrapped(value)
            calls = _calls(value)
            try:
                role = self._role(value) if {*_ROLES} & value.keys() or self.role_keys else "assistant"
            except Bad:
                role = "assistant"
            text, more, results = self.content(_first(value, self.content_keys), value)
        else:
            role, calls = "assistant", []
            text, more, results = self.content(value, value)
        if calls or more or results:
            raise Bad("calls in the answer", value)
        if role != "assistant" or text is None:
            raise Bad("no answer text", value)
        return text

    def lead(self, nodes: Sequence[Node], rated: int) -> list[Turn]:
        """The turns before the rated one: those before it in the list or, where turns name their parents, above it."""
        if not is_tree(nodes):
            return [turn for node in nodes[:rated] for turn in node.turns]
        by_id = {node.id: node for node in nodes}
        above: list[Node] = []
        node = nodes[rated]
        while node.parent is not None and node.parent != node.id:
            upper = by_id.get(node.parent)
            if upper is None:
                if is_root(node.parent):
                    break
                raise Bad("no parent", node.parent)
            above.append(upper)
            node = upper
            if len(above) > min(len(nodes), _DEEPEST):
                raise Bad("parents in a circle", node.id)
        return [turn for node in reversed(above) for turn in node.turns]

    def told(self, turns: Sequence[Turn], *, tree: bool = False) -> list[Turn]:
        """Answers that follow each other directly become one, or the last of them, as `turns.answers_in_a_row` says."""
        result: list[Turn] = []
        for turn in turns:
            before = result[-1] if result else None
            if before is None or not (before.role == turn.role == "assistant") or before.calls or turn.calls:
                result.append(turn)
            elif before.text == turn.text:
                continue
            elif tree or self.in_a_row == "joined":
                result[-1] = replace(turn, text=self.joined_by.join(filter(None, (before.text, turn.text))))
            elif self.in_a_row == "alternatives":
                result[-1] = turn
            else:
                raise Bad("answers in a row", turn.text)
        return result


def answer_in(reader: Reader, text: str | None) -> str | None:
    """The text of an answer that a cell has as JSON; None: it is none."""
    try:
        return None if text is None else reader.answer(opened(text))
    except Bad:
        return None


def is_tree(nodes: Sequence[Node]) -> bool:
    """Turns name their parents, some of which are here, and not simply the turn before."""
    if len(nodes) < 2 or not all(node.id is not None and node.has_parent for node in nodes):
        return False
    ids = {node.id for node in nodes}
    return any(node.parent in ids for node in nodes) and any(
        node.parent != before.id for before, node in itertools.pairwise(nodes)
    )


def is_root(parent: str) -> bool:
    """Whether a parent that no turn is says "none": LibreChat writes zeros."""
    return not parent.strip("0-") or parent.casefold() in ("root", "client-created-root", "none", "null")


def _unwrapped(raw: dict[str, Any]) -> dict[str, Any]:
    for name in _WRAPPERS:
        inner = raw.get(name)
        if isinstance(inner, dict) and not any(key in raw for key in ("role", "content")):
            return {**_constructed(raw), **inner}
    return raw


def _constructed(raw: dict[str, Any]) -> dict[str, Any]:
    """LangChain's serialised messages say their role by the name of a class: [..., HumanMessage]."""
    id = raw.get("id")
    if "lc" not in raw or not isinstance(id, list) or not id:
        return raw
    name = str(id[-1]).removesuffix("Chunk").removesuffix("Message")
    return {**{key: value for key, value in raw.items() if key != "id"}, "type": name}


def _first(raw: dict[str, Any], keys: Sequence[tuple[str, ...]]) -> Any:
    """The first value that is there and not empty; else the first that is there and not null."""
    found = MISSING
    for key in keys:
        value = raw.get(key[0], MISSING) if len(key) == 1 else find(raw, key)
        if value is not MISSING:
            if value is not None and value != "" and value != []:
                return value
            found = value if found in (MISSING, None) else found
    return found


def _block_text(block: dict[str, Any]) -> str | None:
    text = block.get("text")
    if isinstance(text, dict):
        text = text.get("value")  # OpenAI's assistants, and LibreChat
    return text if isinstance(text, str) else None


def _calls(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """`tool_calls`, and `function_call` of the older API, as they are written today."""
    found = opened(raw.get("tool_calls"))
    calls = []
    for call in found if isinstance(found, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            calls.append(_call(call.get("id"), function.get("name"), function.get("arguments")))
        elif isinstance(call, dict) and "name" in call:  # LangChain
            calls.append(_call(call.get("id"), call.get("name"), call.get("args")))
    old = opened(raw.get("function_call"))
    if isinstance(old, dict) and old.get("name"):
        calls.append(_call(None, old.get("name"), old.get("arguments")))
    return calls


def _call(id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    said = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    call: dict[str, Any] = {"type": "function", "function": {"name": text_of(name) or "", "arguments": said}}
    return {"id": id, **call} if isinstance(id, str) else call

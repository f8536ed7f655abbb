"""A row of the log, as an object -> its judgements: prompt, answer and vote; or its turns.

In:  rows as Python objects (records.py), and a mining config.
Out: one `Vote` for each vote of the row (a turn without one, too), with texts as they are: mapping.py normalises and
     hashes them. `Bad` for a row that cannot be used; a vote may be bad alone.

Where columns.feedback (or winner, or user) goes through a list, each element that it chooses is a vote; other columns
that go through the same list stay with the element.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kto_dist.base.json_pointer import MISSING, opened
from kto_dist.feedback.chat import Bad, Node, Reader, Turn, is_tree
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.doubts import beside
from kto_dist.feedback.notices import IDS, PARENTS, Notices, named_by
from kto_dist.feedback.picks import Frame, Picker
from kto_dist.feedback.pointers import text_of
from kto_dist.feedback.vote import Vote, with_more

_MOST_VOTES = 1000  # of a row: their number is a part of a vote's key
_MOST_RANKED = 1000
_NAMED_LENGTH = 8  # an id shorter than this may be any number


@dataclass(slots=True)
class _Row:
    """What is the same for all votes of a row."""

    record: dict[str, Any]
    nodes: list[Node] | None = None


class Judge:
    """Reads rows under one config; counts in `notices` what they hold besides, and in `seen` what they have."""

    def __init__(self, config: MiningConfig, notices: Notices) -> None:
        self._picker = Picker(config)
        self._columns = self._picker.columns
        self._layout = config.columns.layout
        self._first = config.turns.first
        self._reader = Reader.of(config)
        self._notices = notices
        self._rated_turns = self._votes_lie_in_turns()

    @property
    def seen(self) -> set[str]:
        """Conditions that some row could meet or miss, and whether one had calls of tools."""
        return self._picker.seen | ({"tool_calls"} if self._reader.called else set())

    def _votes_lie_in_turns(self) -> bool:
        """columns.feedback is /messages[]/...: each turn carries its own vote."""
        messages = self._columns.get("messages", ())
        return bool(self._picker.chain) and len(messages) == 1 and not messages[0].levels and (
            self._picker.chain[0][0] == messages[0].rest
        )  # fmt: skip

    @property
    def wanted(self) -> set[str]:
        """Columns of a table that are looked at; the others may be large."""
        heads = self._picker.heads
        return {*heads, *self._notices.all_watched, *IDS, "tool_call_id", *beside(heads)}

    def unread(self, problem: str, detail: str | None) -> Vote:
        """A row that could not be read; of a turn, whose it is, where that can still be seen."""
        session = None
        pointers = self._columns.get("session", ())
        if detail is not None and len(pointers) == 1 and pointers[0].is_name:
            said = re.search(rf'"{re.escape(pointers[0].head)}"\s*:\s*"?([^"\\,}}]+)', detail)
            session = said and said[1].strip()
        return Vote(problem=problem, detail=detail, session=session)

    def votes(self, record: dict[str, Any]) -> list[Vote]:
        """The row's votes; a row without one has a single `Vote` without feedback. Raises `Bad`."""
        self._reader.unused.clear()
        self._notices.row(record)
        row = _Row(record)
        turns = self._layout == "turns"
        counts = self._picker.row_counts(record)
        if not counts and not turns:
            self._notices.counts["rows that `where` leaves out"] += 1
            return []
        frames = [
            frame for frame in self._picker.frames(record) if not (frame or turns) or self._has_vote(record, frame)
        ]
        if not frames and self._rated_turns:
            self._notices.counts["conversations without a vote"] += 1
            return []
        # a turn that is not to vote stays all the same: a conversation is whole
        chosen = [frame for frame in frames if counts and self._picker.vote_counts(record, frame)]
        if len(chosen) < len(frames):
            self._notices.counts["votes that `where` leaves out"] += len(frames) - len(chosen)
            if not chosen and not turns:
                return []
        read = self._turn if turns else self._judgements
        votes: list[Vote] = []
        if not chosen:
            votes += read(row, None)
        for frame in chosen:
            try:
                votes += list(read(row, frame))  # all of a pair, or nothing
            except Bad as bad:
                if len(chosen) == 1:
                    raise
                votes.append(Vote(problem=bad.code, detail=bad.value))
        if len(votes) > _MOST_VOTES:
            raise Bad("too many votes", len(votes))
        for sub, vote in enumerate(votes):
            vote.sub = sub
        self._notices.more(self._reader.unused)
        return votes

    def _about(self, row: _Row, frame: Frame | None) -> dict[str, str | None]:
        return {name: self._picker.text(row.record, frame, name) for name in ("user", "time", "model", "finish")}

    def _has_vote(self, record: dict[str, Any], frame: Frame) -> bool:
        """An element of the list may say nothing: a turn that nobody rated, a score that is null."""
        said = self._picker.text(record, frame, "winner" if self._layout == "duels" else "feedback")
        return said is not None and bool(said.strip())

    # A row a judgement, or a pair, a duel, a ranking of them

    def _judgements(self, row: _Row, frame: Frame | None) -> Iterator[Vote]:
        about = self._about(row, frame)
        if self._layout == "answers":
            lead, asked, completion = self._answer(row, frame)
            feedback = self._picker.text(row.record, frame, "feedback") if frame is not None else None
            yield _vote(lead, asked, completion, feedback, about)
        elif self._layout == "pairs":
            for name in ("chosen", "rejected"):
                yield _vote(*self._side(row, frame, name), name, about)
        elif self._layout == "duels":
            winner = self._picker.text(row.record, frame, "winner")
            for side in ("a", "b"):
                model = self._picker.text(row.record, frame, f"model_{side}")
                if model is not None and model == winner:
                    winner = f"model_{side}"  # the column names the model that won
            for side in ("a", "b"):
                model = self._picker.text(row.record, frame, f"model_{side}")
                said = None if winner is None or not winner.strip() else f"{side}: {winner}"
                made = about if model is None else {**about, "model": model}
                yield _vote(*self._side(row, frame, f"answer_{side}"), said, made)
        else:
            yield from self._ranked(row, frame, about)

    def _prompt(self, row: _Row, frame: Frame | None) -> tuple[list[Turn] | None, str | None]:
        """(turns, None) or (None, text); neither where no column has the prompt."""
        system = self._picker.text(row.record, frame, "system")
        told = [Turn("system", system)] if system is not None and system.strip() else []
        if "prompt" in self._columns:
            value = self._picker.value(row.record, frame, "prompt")
            if value is MISSING:
                raise Bad("no prompt", _keys(row.record))
            if isinstance(value, dict | list):
                raise Bad("prompt is no text", value)
            text = text_of(value) or ""
            return ([*told, Turn("user", text)], None) if told else (None, text)
        if "messages" in self._columns:
            turns = [turn for node in self._nodes(row, frame) for turn in node.turns]
            return [*told, *turns] if told and turns[:1] and turns[0].role != "system" else turns, None
        return None, None

    def _nodes(self, row: _Row, frame: Frame | None) -> list[Node]:
        if row.nodes is None or self._picker.chain:
            value = self._picker.value(row.record, frame, "messages")
            if value is MISSING:
                raise Bad("no messages", _keys(row.record))
            row.nodes = self._reader.nodes(value)
        return row.nodes

    def _answer(self, row: _Row, frame: Frame | None) -> tuple[list[Turn] | None, str | None, str]:
        """(turns before the answer, or prompt as text; the answer)."""
        if "response" not in self._columns:
            return self._rated(row, frame)
        turns, asked = self._prompt(row, frame)
        answer = self._said(row, frame, "response")
        if turns is None:
            return None, asked, answer
        if turns and turns[-1].role == "assistant" and turns[-1].text == answer:
            turns = turns[:-1]  # the conversation holds the answer as well
        whole = self._reader.told([*turns, Turn("assistant", answer)])
        return whole[:-1], None, whole[-1].text

    def _said(self, row: _Row, frame: Frame | None, name: str) -> str:
        value = self._picker.value(row.record, frame, name)
        if value is MISSING:
            raise Bad(f"no {name}", _keys(row.record))
        try:
            return self._reader.answer(value)
        except Bad as bad:
            raise Bad(bad.code if bad.code == "calls in the answer" else f"{name} is no text", value) from None

    def _rated(self, row: _Row, frame: Frame | None) -> tuple[list[Turn], None, str]:
        nodes = self._nodes(row, frame)
        place = self._rated_place(row, frame, nodes)
        rated = nodes[place]
        if not rated.turns or rated.turns[-1].role != "assistant":
            said = rated.turns[-1].message() if rated.turns else rated.id
            raise Bad("no answer" if place == len(nodes) - 1 else "another turn is rated", said)
        tree = is_tree(nodes)
        turns = [*self._reader.lead(nodes, place), *rated.turns]
        if not tree:
            turns += self._rest_of_answer(nodes[place + 1 :], rated.turns[-1])
        whole = self._reader.told(turns, tree=tree)
        if whole[-1].calls:
            raise Bad("calls in the answer", whole[-1].message())
        system = self._picker.text(row.record, frame, "system")
        if system is not None and system.strip() and whole[0].role != "system":
            whole = [Turn("system", system), *whole]
        return whole[:-1], None, whole[-1].text

    def _rest_of_answer(self, after: Sequence[Node], rated: Turn) -> list[Turn]:
        """Pieces of the rated answer that follow it."""
        rest: list[Turn] = []
        for node in after:
            if len(node.turns) != 1 or node.turns[0].role != "assistant" or rated.calls:
                break
            rest += node.turns
        return [] if self._reader.in_a_row == "alternatives" else rest

    def _rated_place(self, row: _Row, frame: Frame | None, nodes: list[Node]) -> int:
        if self._rated_turns and frame:
            key = frame[0][0]
            if isinstance(key, int):
                return key
            value = opened(self._picker.value(row.record, frame, "messages"))
            return list(value).index(key)
        if "rated" in self._columns:
            said = self._picker.text(row.record, frame, "rated")
            place = next((place for place, node in enumerate(nodes) if said is not None and node.id == said), None)
            if place is None:
                raise Bad("no rated turn", said)
            return place
        if "rated_index" in self._columns:
            said = self._picker.text(row.record, frame, "rated_index")
            try:
                place = int(float(said or "")) - self._first
            except (ValueError, OverflowError):
                raise Bad("no rated turn", said) from None
            if not 0 <= place < len(nodes):
                raise Bad("no rated turn", said)
            return place
        self._check_nobody_names_another(row, nodes)
        return len(nodes) - 1

    def _check_nobody_names_another(self, row: _Row, nodes: list[Node]) -> None:
        """The row names a turn beside its list, and it is not the last one: then that one was rated."""
        others = {node.id for node in nodes[:-1] if node.id and node.turns[-1:] and node.turns[-1].role == "assistant"}
        heads = {pointer.head for pointer in self._columns["messages"]}
        path = named_by(row.record, {id for id in others if len(id) >= _NAMED_LENGTH}, heads | self._notices.ignored)
        if path is not None:
            raise Bad("another turn is named", path)

    def _side(self, row: _Row, frame: Frame | None, name: str) -> tuple[list[Turn] | None, str | None, str]:
        """An answer of a pair, with the prompt before it, which a whole conversation brings along."""
        value = self._picker.value(row.record, frame, name)
        asks = "prompt" in self._columns or "messages" in self._columns
        held = value if asks else opened(value)
        if isinstance(held, list) and (len(held) > 1 or not asks):
            turns = [turn for node in self._reader.nodes(held) for turn in node.turns]
            whole = self._reader.told(turns)
            if whole[-1].role != "assistant" or whole[-1].calls:
                raise Bad("no answer", whole[-1].message())
            if asks:
                lead, asked = self._prompt(row, frame)
                last = asked if lead is None else next((t.text for t in reversed(lead) if t.role == "user"), None)
                if last not in [turn.text for turn in whole[:-1] if turn.role == "user"]:
                    raise Bad(f"{name} answers another prompt", whole[0].text)
            return whole[:-1], None, whole[-1].text
        if not asks:
            raise Bad(f"{name} is no conversation", MISSING if value is MISSING else value)
        lead, asked = self._prompt(row, frame)
        answer = self._said(row, frame, name)
        if lead is None:
            return None, asked, answer
        told = self._reader.told([*lead, Turn("assistant", answer)])
        return told[:-1], None, told[-1].text

    def _ranked(self, row: _Row, frame: Frame | None, about: dict[str, str | None]) -> Iterator[Vote]:
        lead, asked = self._prompt(row, frame)
        value = self._picker.value(row.record, frame, "responses")
        if value is MISSING:
            raise Bad("no responses", _keys(row.record))
        listed = opened(value)
        if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST_RANKED:
            raise Bad("ranks", value)
        ranks = [float(place) for place in range(len(listed))]
        if "ranks" in self._columns:
            given = opened(self._picker.value(row.record, frame, "ranks"))
            if not isinstance(given, list) or len(given) != len(listed) or not all(map(_is_number, given)):
                raise Bad("ranks", given)
            ranks = [float(rank) for rank in given]
        order = sorted(set(ranks))
        for answer, rank in zip(listed, ranks, strict=True):
            if answer is None or isinstance(answer, bool | int | float):
                raise Bad("ranks", value)
            try:
                said = self._reader.answer(answer)
            except Bad:
                raise Bad("ranks", answer) from None
            yield _vote(lead, asked, said, f"{order.index(rank) + 1} of {len(order)}", about)

    # A row a turn

    def _turn(self, row: _Row, frame: Frame | None) -> Iterator[Vote]:
        record = row.record
        session = self._picker.text(record, frame, "session") if "session" in self._columns else ""
        if session is None or ("session" in self._columns and not session.strip()):
            raise Bad("no session", _keys(record))
        ids = {name: self._picker.text(record, frame, name) for name in ("id", "parent")}
        if "parent" not in self._columns and not self._notices.ignored & {*PARENTS}:
            parent = next((name for name in PARENTS if name in record), None)
            if parent is not None:
                own = next((name for name in IDS if not isinstance(record.get(name), dict | list | None)), None)
                ids = {"id": text_of(record.get(own or "")), "parent": text_of(record[parent])}
        place = {"session": session, "turn": self._picker.text(row.record, frame, "turn"), **ids}
        about = self._about(row, frame)
        try:
            said = self._picker.text(row.record, frame, "role") or "null"
            role = self._reader.role(said)
            if role is None:
                raise Bad("role", said)
            if role == "ignore":
                self._notices.counts["turns of a role that is left out"] += 1
                return
            turns = self._turns_of(row, frame, role)
        except Bad as bad:
            # the conversation that lacks it is known: what comes after it is no longer what was said
            yield with_more(Vote(problem=bad.code, detail=bad.value), place | about)
            return
        feedback = self._picker.text(row.record, frame, "feedback") if frame is not None else None
        feedback = feedback if feedback is not None and feedback.strip() else None
        for number, turn in enumerate(turns, 1):
            voted = feedback if number == len(turns) else None
            lost = None
            if voted is not None and (turn.role != "assistant" or turn.calls):
                lost = "calls in the answer" if turn.calls else "rated turn"
            extra = {key: value for key, value in turn.message().items() if key not in ("role", "content")}
            vote = Vote(lost=lost, detail=voted if lost else None, feedback=None if lost else voted)
            vote.role, vote.text = turn.role, turn.text
            vote.extra = json.dumps(extra, ensure_ascii=False, separators=(",", ":")) if extra else None
            yield with_more(vote, place | about)

    def _turns_of(self, row: _Row, frame: Frame | None, role: str) -> tuple[Turn, ...]:
        value = self._picker.value(row.record, frame, "text")
        if value is MISSING and not row.record.get("tool_calls"):
            raise Bad("no text", _keys(row.record))
        content = value if isinstance(value, dict | list) else text_of(value)
        try:
            return self._reader.said(role, "" if content is None else content, row.record)
        except Bad:
            raise Bad("text is no text", value) from None


def _vote(
    lead: Sequence[Turn] | None, asked: str | None, answer: str, feedback: str | None, about: dict[str, str | None]
) -> Vote:
    context = None
    if lead is not None:
        context = json.dumps([turn.message() for turn in lead], ensure_ascii=False, separators=(",", ":"))
    return with_more(Vote(context=context, asked=asked, completion=answer, feedback=feedback), about)


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value

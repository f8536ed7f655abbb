"""What a log's columns, turns and roles are called: the sections of a mining config that a preset fills.

In:  names, or pointers into nested values (pointers.py).
Out: a mapping whose columns make one layout, or a `ValueError` that says what is missing.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from kto_dist.base.config import Section, Text
from kto_dist.feedback.pointers import Pointer, parse

Layout = Literal["answers", "turns", "pairs", "duels", "rankings"]
# One name or pointer, or several of which the first with a value counts.
Column = Text | Annotated[tuple[Text, ...], Field(min_length=1)]

_EVERYWHERE = {"user", "time", "model"}
_NEEDED: dict[Layout, set[str]] = {
    "answers": {"feedback"},
    "turns": {"role", "text", "feedback"},
    "pairs": {"chosen", "rejected"},
    "duels": {"answer_a", "answer_b", "winner"},
    "rankings": {"responses"},
}
_POSSIBLE: dict[Layout, set[str]] = {
    "answers": {"prompt", "messages", "system", "response", "rated", "rated_index", "finish"},
    "turns": {"session", "turn", "id", "parent", "finish"},
    "pairs": {"prompt", "messages", "system"},
    "duels": {"prompt", "messages", "system", "model_a", "model_b"},
    "rankings": {"prompt", "messages", "system", "ranks"},
}


class ColumnsConfig(Section):
    """The log's names for things. Nested JSON: a pointer from a slash on, as in /request/messages; of a list's
    elements, those that say so: /scores[name=user-feedback]/value, each one a vote. Of several names the first with a
    value counts."""

    prompt: Column | None = Field(None, description="what the user asked, as text")
    messages: Column | None = Field(
        None,
        description="in place of prompt: a list of role/content turns, in JSON; ends with the rated answer (see rated, "
        "rated_index), or with the user's turn where `response` has the answer",
    )
    system: Column | None = Field(
        None, description="what the model was told beforehand; the first turn of prompts that do not begin with one"
    )
    response: Column | None = Field(None, description="the answer that was rated")
    rated: Column | None = Field(None, description="messages: the id of the turn that was rated; null: the last turn")
    rated_index: Column | None = Field(None, description="messages: its number in the list; see turns.first")
    feedback: Column | None = Field(None, description="thumbs, likes, ratings, +1/-1 or words; see the labels section")
    user: Column | None = Field(None, description="who judged; without it nobody's influence can be limited")
    time: Column | None = Field(
        None,
        description="ISO 8601 (UTC where no offset says else), a date as 20260131, or seconds since"
        " 1970, also milli-, micro- or nanoseconds",
    )
    model: Column | None = Field(None, description="which model version answered")
    finish: Column | None = Field(None, description="why the answer ended; see clean.truncated_finish")
    session: Column | None = Field(None, description="a log with a row a turn: which conversation the turn belongs to")
    role: Column | None = Field(None, description="a row a turn: who speaks; see the roles section")
    text: Column | None = Field(None, description="a row a turn: what is said, as text or blocks of it")
    turn: Column | None = Field(None, description="a row a turn: its number; null: turns are ordered by time")
    id: Column | None = Field(None, description="a row a turn: the turn's id, where parent names others")
    parent: Column | None = Field(
        None,
        description="a row a turn: the id of the turn that it answers, where users edit questions and have answers "
        "regenerated; the turns above the rated answer are its prompt; null, zeros or the turn's own id: there is none",
    )
    chosen: Column | None = Field(None, description="pairs: the better answer; becomes a thumbs up")
    rejected: Column | None = Field(None, description="pairs: the worse answer; becomes a thumbs down")
    answer_a: Column | None = Field(None, description="duels: one answer, or the whole conversation that ends with it")
    answer_b: Column | None = Field(None, description="duels: the other one")
    winner: Column | None = Field(
        None, description="duels: which one is better; see labels.a_wins, b_wins, tie, both_good, both_bad"
    )
    model_a: Column | None = Field(None, description="duels: which model version gave answer_a")
    model_b: Column | None = Field(None, description="duels: which model version gave answer_b")
    responses: Column | None = Field(
        None, description="rankings: a list of answers, best first unless `ranks` says else"
    )
    ranks: Column | None = Field(None, description="rankings: a list of ranks of the answers, 1 is the best")

    @property
    def layout(self) -> Layout:
        if self.winner is not None or self.answer_a is not None:
            return "duels"
        if self.chosen is not None:
            return "pairs"
        if self.responses is not None:
            return "rankings"
        return "turns" if self.session is not None or self.parent is not None or self.text is not None else "answers"

    def given(self) -> dict[str, tuple[str, ...]]:
        """Our name -> the log's names, in the order of the fields above."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: (value,) if isinstance(value, str) else value for name, value in values if value is not None}

    def pointers(self) -> dict[str, tuple[Pointer, ...]]:
        return {name: tuple(map(parse, names)) for name, names in self.given().items()}

    @model_validator(mode="after")
    def _pointers_can_be_read(self) -> "ColumnsConfig":
        for name, names in self.given().items():
            for text in names:
                try:
                    parse(text)
                except ValueError as error:
                    raise ValueError(f"columns.{name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _columns_make_a_layout(self) -> "ColumnsConfig":
        given, layout = {*self.given()}, self.layout
        needed, possible = _NEEDED[layout], _POSSIBLE[layout]
        missing = sorted(needed - given)
        if missing:
            raise ValueError(
                f"columns ({', '.join(sorted(given)) or 'none'}) lack {', '.join(missing)}: give prompt (or messages), "
                "response and feedback; or session, role, text and feedback; or prompt, chosen and rejected; or "
                "answer_a, answer_b and winner; or prompt and responses"
            )
        extra = sorted(given - needed - possible - _EVERYWHERE)
        if extra:
            raise ValueError(
                f"columns {', '.join(extra)} have no meaning beside {', '.join(sorted(given & needed))}: leave them out"
            )
        for problem in self._problems(layout):
            raise ValueError(problem)
        return self

    def _problems(self, layout: Layout) -> Iterator[str]:
        both, neither = self.prompt is not None and self.messages is not None, self.prompt is self.messages is None
        if both or (neither and layout in ("answers", "rankings")):
            yield "columns need either prompt or messages, and not both: map the one that the log has"
        if layout == "answers" and self.prompt is not None and self.response is None:
            yield f"columns.prompt ({self.prompt}) needs columns.response: map the answer that was rated"
        chosen = [name for name in ("rated", "rated_index") if getattr(self, name) is not None]
        if len(chosen) > 1 or (chosen and (self.messages is None or self.response is not None)):
            yield (
                f"columns.{chosen[0]} says which turn of columns.messages was rated: give messages, and leave out "
                "response and the other one of rated and rated_index"
            )
        if layout == "turns":
            if (self.id is None) != (self.parent is None):
                yield "columns.id and columns.parent belong together: give both, or neither"
            if self.parent is None and self.session is None:
                yield "a row a turn needs columns.session (which conversation), or columns.id and columns.parent"
            if self.parent is None and self.turn is None and self.time is None:
                yield f"columns.session ({self.session}) needs columns.turn or columns.time: turns have an order"


class TurnsConfig(Section):
    """Turns in lists, and answers that follow each other."""

    role: Text | None = Field(
        None,
        description="key of a turn that says who speaks, or a pointer from the turn on; null: role, from, "
        "message.role, type, sender, ...",
    )
    content: Text | None = Field(
        None, description="key of what is said; null: content, value, message.content, text, message, ..."
    )
    id: Text | None = Field(None, description="key of a turn's id, for columns.rated; null: id, messageId, uuid, ...")
    parent: Text | None = Field(
        None, description="key of the id of the turn that it answers; null: parentId, parentMessageId, ..."
    )
    first: Literal[0, 1] = Field(0, description="number of the first turn, for columns.rated_index")
    answers_in_a_row: Literal["joined", "alternatives"] | None = Field(
        None,
        description="answers that follow each other directly: one answer that was sent in pieces, or alternatives of "
        "which the last one goes on; null: an error where it matters; where turns name their parents, these tell",
    )
    joined_by: str = Field("\n", description="joined: what stands between the pieces")


Role = Literal["system", "developer", "user", "assistant", "tool", "ignore"]


def _as_text(key: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(key, str(key)) if not isinstance(key, str) else key


class _Open(Section):
    """A section whose keys are the log's own words."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_text(cls, tree: Any) -> Any:
        return {_as_text(key): value for key, value in tree.items()} if isinstance(tree, dict) else tree


class RolesConfig(_Open):
    """The log's own names of roles, beside the known ones; `ignore` leaves such turns out."""

    __pydantic_extra__: dict[str, Role]

    def meanings(self) -> dict[str, str]:
        return {name.strip().casefold(): role for name, role in (self.__pydantic_extra__ or {}).items()}


Scalar = bool | int | float | str | None


class WhereConfig(_Open):
    """Which rows, or which votes of a row, count: name or pointer -> the value, or the values, that it must have. In a
    log with a row a turn, which votes: turns stay."""

    __pydantic_extra__: dict[str, Scalar | tuple[Scalar, ...]]

    def conditions(self) -> dict[str, tuple[Scalar, ...]]:
        given = (self.__pydantic_extra__ or {}).items()
        return {name: value if isinstance(value, tuple) else (value,) for name, value in given}

    @model_validator(mode="after")
    def _pointers_can_be_read(self) -> "WhereConfig":
        for name in self.conditions():
            parse(name)
        return self

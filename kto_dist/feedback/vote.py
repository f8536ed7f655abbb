"""One judgement, or one turn, as a row of the log has it: texts, before anything is normalised or hashed."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Vote:
    """One judgement, or one turn; what a layout has not is None."""

    sub: int = 0
    problem: str | None = None
    """Of the row, or of the turn."""
    lost: str | None = None
    """Of the vote alone: the turn that it was given to stays in its conversation."""
    detail: str | None = None
    """The value at fault."""
    asked: str | None = None
    """The prompt as text."""
    context: str | None = None
    """Or as turns, in JSON."""
    completion: str | None = None
    feedback: str | None = None
    user: str | None = None
    time: str | None = None
    model: str | None = None
    finish: str | None = None
    session: str | None = None
    role: str | None = None
    text: str | None = None
    extra: str | None = None
    """Of a turn: calls of tools, in JSON."""
    turn: str | None = None
    id: str | None = None
    parent: str | None = None

    def size(self) -> int:
        """Characters of what may be long."""
        return sum(len(text) for text in (self.asked, self.context, self.completion, self.text, self.detail) if text)


FIELDS = tuple(Vote.__dataclass_fields__)


def with_more(vote: Vote, more: dict[str, str | None]) -> Vote:
    for name, value in more.items():
        setattr(vote, name, value)
    return vote

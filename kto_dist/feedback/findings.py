"""What an audit found: the record that becomes `audit.json` (docs/audit.md says what each key means) and the page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kto_dist.base.files import sha256_of
from kto_dist.feedback.agreement import Agreement
from kto_dist.feedback.checks import Check
from kto_dist.feedback.concentration import Users
from kto_dist.feedback.content import Conflicts, Lengths, StepCounts
from kto_dist.feedback.drift import Balance, Drift

# Of audit.json: raise it when a key changes its meaning or goes away.
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that the audit describes."""

    name: str
    split: str
    rows: int
    sha256: str

    @classmethod
    def of(cls, path: Path, split: str, rows: int) -> "File":
        return cls(name=path.name, split=split, rows=rows, sha256=sha256_of(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """What was read."""

    votes: int
    """Readable ones, with or without a label."""
    unreadable: int
    """Rows that input.on_bad_row: skip left out."""
    unreadable_by_reason: dict[str, int]
    """Of them, by what is wrong with them: most rows first."""
    unused: dict[str, int]
    """What rows hold besides and looks as if it belonged -> rows that have it; most rows first."""
    judgements: int
    kept: int
    """Votes that the dataset rests on."""
    users: int
    prompts: int
    """Distinct, of judgements, as users and responses are."""
    responses: int
    files: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    version: int
    kto_dist: str
    """The version that made it."""
    files: tuple[File, ...]
    """Empty: the audit was made without writing a dataset."""
    checks: tuple[Check, ...]
    log: Log
    steps: tuple[StepCounts, ...]
    balance: Balance
    agreement: Agreement
    users: Users | None
    """None: the log has no users."""
    drift: Drift
    lengths: Lengths
    conflicts: Conflicts
    user_ids_hashed: bool
    settings: dict[str, Any]
    """The mining config, without the salt."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

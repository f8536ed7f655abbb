"""Audits of logs whose truth is known: the config that mines a generated log, and small logs as tables."""

from pathlib import Path
from typing import Any

import duckdb
from feedback_log import fill, vote

from kto_dist.base.config import build
from kto_dist.feedback import MiningConfig
from kto_dist.feedback.audit import audit
from kto_dist.feedback.findings import Audit

COLUMNS = {
    "prompt": "prompt",
    "response": "response",
    "feedback": "feedback",
    "user": "user_id",
    "time": "created_at",
    "model": "model",
}


SALT = "a-secret-salt"


def mining_config(folder: Path, log: Path, **sections: Any) -> MiningConfig:
    tree: dict[str, Any] = {
        "input": {"files": [str(log)]},
        "columns": COLUMNS,
        "users": {"salt": SALT},
        "output": {"folder": str(folder / "mined")},
        "resources": {"work": str(folder / "work"), "threads": 2},
    }
    return build(
        {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}, kind=MiningConfig
    )


def config(**sections: Any) -> MiningConfig:
    return build({"input": {"files": ["log.jsonl"]}, "columns": COLUMNS, **sections}, kind=MiningConfig)


def audited(votes: list[dict[str, Any]], **sections: Any) -> Audit:
    with duckdb.connect() as connection:
        fill(connection, votes)
        return audit(connection, config(**sections))


def crowd(
    responses: int = 60, voters: int = 3, users: int = 25, up: float = 0.6, **changes: Any
) -> list[dict[str, Any]]:
    """Users who always agree."""
    return [
        vote(
            f"answer {number:03}",
            number < up * responses,
            f"u{(number * voters + place) % users}",
            prompt=f"question {number}",
            day=(number * 7) % 28,
            model=f"v{number % 2}",
            **changes,
        )
        for number in range(responses)
        for place in range(voters)
    ]

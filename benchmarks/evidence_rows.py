"""The rows behind `evidence.py`: the demo's answers, with the thumbs that each question asks for.

In:  launch/demo/thumbs.jsonl, whose answers stay as they are, and the wish (launch/demo/wish.py) that its simulated
     users had, which says what was meant. Out: JSONL and Parquet files as `kto-dist train` takes them.

Held-out rows have the wish's own labels, whatever the training rows have: what is asked is whether the wish was
learned.
"""

import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import records

sys.path.append(str(records.ROOT / "launch" / "demo"))
from wish import approves

Row = dict[str, Any]
USERS = 48
VOTERS = 3
"""Users who rate one answer, where answers are rated more than once."""
CRITICS = 4
"""Heavy downvoters, of USERS."""
CRITICS_SHARE = 0.5
"""Of all votes."""
CRITICAL = 0.8
"""Share of the answers that they like, and press thumbs down on."""


def read(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def question(row: Row) -> str:
    return str(row["prompt"][-1]["content"])


def liked(row: Row) -> bool:
    """By the wish."""
    return approves(question(row), row["completion"][0]["content"])


def split(rows: Sequence[Row], prompts: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and those of so many prompts that are held out, with the wish's labels: the same in every run."""
    apart = set(random.Random(0).sample(sorted({question(row) for row in rows}), prompts))
    train = [row for row in rows if question(row) not in apart]
    return train, [row | {"label": liked(row)} for row in rows if question(row) in apart]


def fewer_good(rows: Sequence[Row], removed: float, seed: int) -> list[Row]:
    """Without this share of the desirable rows."""
    good = [place for place, row in enumerate(rows) if row["label"]]
    gone = set(random.Random(seed).sample(good, round(removed * len(good))))
    return [row for place, row in enumerate(rows) if place not in gone]


def flipped(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Each answer rated by VOTERS users, who press what they do not mean in this share of their votes."""
    rng = random.Random(seed)
    votes = []
    for row in rows:
        meant = liked(row)
        for user in rng.sample(range(USERS), VOTERS):
            votes.append(row | {"label": meant != (rng.random() < share), "user": f"u{user:03d}"})
    return votes


def downvoted(rows: Sequence[Row], seed: int) -> list[Row]:
    """Each answer rated once; CRITICS users rate CRITICS_SHARE of them, and dislike most of what they like."""
    rng = random.Random(seed)
    weights = [
        CRITICS_SHARE / CRITICS if user < CRITICS else (1 - CRITICS_SHARE) / (USERS - CRITICS) for user in range(USERS)
    ]
    edges = list(accumulate(weights))
    votes = []
    for row in rows:
        (user,) = rng.choices(range(USERS), cum_weights=edges)
        label = liked(row) and not (user < CRITICS and rng.random() < CRITICAL)
        votes.append(row | {"label": label, "user": f"u{user:03d}"})
    return votes


def wrong(rows: Iterable[Row]) -> float:
    """The share whose label is not what was meant."""
    miss = [bool(row["label"]) != liked(row) for row in rows]
    return sum(miss) / max(1, len(miss))


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def mined(log: Path, folder: Path, **users: float) -> Path:
    """What `kto-dist mine` makes of a log, at its defaults but for `users`; nothing is held out."""
    from kto_dist.feedback import MiningConfig, mine

    settings = MiningConfig(
        input={"files": str(log)},
        columns={
            "messages": "prompt",
            "response": "/completion/0/content",
            "feedback": "label",
            "user": "user",
            "time": "time",
        },
        users={"hash_ids": False, **users},
        split={"heldout": 0.0},
        output={"folder": str(folder)},
        resources={"work": str(folder.with_name(f"{folder.name}-work")), "memory_mebibytes": 512},
    )
    mine(settings)
    return folder / "train.parquet"


def mined_rows(file: Path) -> list[Row]:
    """As `wrong` takes them."""
    import pyarrow.parquet as pq

    return [dict(row) for row in pq.read_table(file).to_pylist()]

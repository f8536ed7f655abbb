"""Logs of thumbs whose truth is known, and small ones as the pipeline's tables.

`generate` draws a log as an application would keep it: users of very unequal activity vote on answers whose quality is
known (an answer without an "e" is good), and miss it at a known rate; critics dislike nearly everything; some lines are
there twice, some answers are near copies; the share of good answers differs by model version and moves over the weeks.
"""

import json
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

START = datetime(2026, 1, 5)  # a Monday


@dataclass(frozen=True, kw_only=True)
class Generated:
    rows: list[dict[str, Any]]
    """id, prompt, response, feedback (up, down), user_id, created_at, model"""
    good: dict[str, bool]
    """response -> whether it is good"""
    critics: frozenset[str]
    exact_copies: int
    """lines that are there twice"""
    near_copies: int
    """answers that are another one with a sign added"""
    wrong_votes: int
    """of honest users, without copies of lines"""
    honest_votes: int

    def write(self, path: Path) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


def is_good(response: str) -> bool:
    return "e" not in response


Answer = tuple[str, str, str, datetime]
"""Prompt, response, model, when it was given."""


def _answers(
    rng: random.Random,
    *,
    prompts: int,
    answers: int,
    words_each: tuple[int, int],
    near_copies: float,
    share: Callable[[str, int], float],  # of good ones, by model and week
    models: list[str],
    weeks: int,
) -> tuple[list[Answer], int]:
    """What was answered, and how many of the answers are near copies of the one before."""

    def words(count: int, letters: str) -> list[str]:
        return ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(count)]

    asked = {" ".join(words(rng.randint(2, 4), "abcdghilmnoe")) + "?" for _ in range(2 * prompts)}
    asked = sorted(asked)[:prompts]
    pool: list[Answer] = []
    near = 0
    for prompt in asked:
        week = rng.randrange(weeks)
        for _ in range(answers):
            model = rng.choice(models)
            wanted = rng.random() < share(model, week)
            text = words(rng.randint(*words_each), "abcdghilmno")
            if not wanted:
                for place in rng.sample(range(len(text)), rng.randint(1, len(text))):
                    text[place] = text[place][:-1] + "e"
            given = START + timedelta(weeks=week, seconds=rng.randrange(5 * 86400))
            pool.append((prompt, " ".join(text), model, given))
            if rng.random() < near_copies:
                pool.append((prompt, " ".join(text) + "!", model, given))
                near += 1
    return pool, near


class _Ballot:
    """Who has voted on what: nobody votes on an answer twice."""

    def __init__(self, rng: random.Random, pool: list[Answer]):
        self.rng, self.pool = rng, pool
        self.rows: list[dict[str, Any]] = []
        self.seen: set[tuple[str, str]] = set()

    def unseen(self, user: str) -> Answer:
        while True:
            answer = self.rng.choice(self.pool)
            if (user, answer[1]) not in self.seen:
                return answer

    def vote(self, user: str, up: bool, answer: Answer) -> None:
        prompt, response, model, given = answer
        self.seen.add((user, response))
        self.rows.append(
            {
                "prompt": prompt,
                "response": response,
                "feedback": "up" if up else "down",
                "user_id": user,
                "created_at": (given + timedelta(seconds=self.rng.randrange(86400))).isoformat() + "Z",
                "model": model,
            }
        )


def generate(
    *,
    votes: int = 4000,
    prompts: int = 200,
    answers: int = 4,  # a prompt
    words_each: tuple[int, int] = (3, 6),  # of an answer: at least, at most
    users: int = 100,
    noise: float = 0.1,
    critics: int = 0,
    critic_votes: int = 0,  # of each critic, who dislikes nearly everything
    critic_down_rate: float = 0.95,
    contrary: bool = False,  # critics dislike good answers instead, and like bad ones
    exact_copies: float = 0.0,  # share of the votes
    near_copies: float = 0.0,  # share of the answers
    good_share: float = 0.7,
    drift: float = 0.0,  # change of good_share from the first week to the last
    models: dict[str, float] | None = None,  # change of good_share by model version
    weeks: int = 8,
    seed: int = 0,
) -> Generated:
    rng = random.Random(seed)
    models = models or {"v1": 0.0}

    pool, near = _answers(
        rng,
        prompts=prompts,
        answers=answers,
        words_each=words_each,
        near_copies=near_copies,
        share=lambda model, week: good_share + models[model] + drift * (week / max(1, weeks - 1) - 0.5),
        models=sorted(models),
        weeks=weeks,
    )
    good = {response: is_good(response) for _, response, _, _ in pool}
    ballot = _Ballot(rng, pool)

    names = [f"user-{number}@example.org" for number in range(users)]
    worst = [f"critic-{number}@example.org" for number in range(critics)]
    activity = [1 / (rank + 5) for rank in range(users)]
    wrong = 0
    for _ in range(votes):
        user = rng.choices(names, activity)[0]
        answer = ballot.unseen(user)
        misses = rng.random() < noise
        wrong += misses
        ballot.vote(user, good[answer[1]] != misses, answer)
    for user in worst:
        for _ in range(critic_votes):
            answer = ballot.unseen(user)
            dislikes = good[answer[1]] or not contrary
            ballot.vote(user, (rng.random() >= critic_down_rate) == dislikes, answer)
    rows = ballot.rows
    copied = rng.sample(rows, round(exact_copies * len(rows)))
    rows += [dict(row) for row in copied]
    rng.shuffle(rows)
    return Generated(
        rows=[{"id": number, **row} for number, row in enumerate(rows)],
        good=good,
        critics=frozenset(worst),
        exact_copies=len(copied),
        near_copies=near,
        wrong_votes=wrong,
        honest_votes=votes,
    )


def key(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text))


def vote(
    response: str,
    up: bool | None,
    user: str | None = None,
    *,
    prompt: str = "why?",
    day: int | None = None,
    model: str | None = None,
    removed: str | None = None,
    weight: float = 1.0,
) -> dict[str, Any]:
    """One vote for `fill`."""
    return {
        "prompt": prompt,
        "completion": response,
        "label": up,
        "user_key": user,
        "time": None if day is None else START + timedelta(days=day),
        "model": model,
        "removed": removed,
        "weight": weight,
    }


def fill(connection: Any, votes: Iterable[dict[str, Any]]) -> None:
    """The tables as the pipeline leaves them, with a row for each response by its majority; ties leave."""
    votes = list(votes)
    connection.execute(
        "CREATE TABLE votes (vote UBIGINT, prompt VARCHAR, completion VARCHAR, prompt_key UUID, response_key UUID, "
        'label BOOLEAN, raw_feedback VARCHAR, "user" UUID, user_key VARCHAR, time TIMESTAMP, model VARCHAR, '
        "source VARCHAR, removed VARCHAR, weight DOUBLE, characters INTEGER)"
    )
    connection.execute(
        'CREATE TABLE steps (number INTEGER, step VARCHAR, label BOOLEAN, "before" BIGINT, removed BIGINT)'
    )
    connection.execute(
        "CREATE TABLE examples (prompt VARCHAR, completion VARCHAR, label BOOLEAN, weight DOUBLE, split VARCHAR, "
        "votes_up INTEGER, votes_down INTEGER, prompt_key UUID, response_key UUID, characters INTEGER, vote UBIGINT, "
        "probability DOUBLE)"
    )
    kept = defaultdict(list)
    for entry in votes:
        if entry["removed"] is None and entry["label"] is not None:
            kept[entry["prompt"], entry["completion"]].append(entry)
    rows = []
    for (prompt, completion), entries in kept.items():
        ups = sum(entry["label"] for entry in entries)
        label = 2 * ups > len(entries)
        for entry in entries:
            if 2 * ups == len(entries) or entry["label"] != label:
                entry["removed"] = "conflict"
        winners = [entry["weight"] for entry in entries if entry["removed"] is None]
        if winners:
            keys = key(prompt), key(prompt + completion)
            counts = ups, len(entries) - ups
            weight = sum(winners) / len(winners)
            first = next(number for number, entry in enumerate(votes) if entry is entries[0])
            rows.append(
                (prompt, completion, label, weight, "train", *counts, *keys, len(completion), first, float(label))
            )
    columns = ("vote", "prompt", "completion", "label", "user_key", "time", "model", "source", "removed", "weight")
    records = [{**entry, "vote": number, "source": "log.jsonl"} for number, entry in enumerate(votes)]
    table = pa.table({name: [record[name] for record in records] for name in columns})
    keys = pa.table(
        {
            "prompt_key": [key(record["prompt"]) for record in records],
            "response_key": [key(record["prompt"] + record["completion"]) for record in records],
            "characters": [len(record["completion"]) for record in records],
            "user": [record["user_key"] and key(record["user_key"]) for record in records],
        }
    )
    for name, column in zip(keys.column_names, keys.columns, strict=True):
        table = table.append_column(name, column)
    connection.register("given", table)
    connection.execute("INSERT INTO votes BY NAME SELECT * FROM given")
    connection.unregister("given")
    connection.execute("CREATE VIEW texts AS SELECT vote, prompt, completion FROM votes")
    if rows:
        connection.executemany(f"INSERT INTO examples VALUES ({', '.join('?' * 12)})", rows)
    before = Counter(entry["label"] for entry in votes)
    for number, step in enumerate(dict.fromkeys(entry["removed"] for entry in votes if entry["removed"])):
        taken = Counter(entry["label"] for entry in votes if entry["removed"] == step)
        for label in before:
            connection.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?)", [number, step, label, before[label], taken[label]]
            )
        before -= taken

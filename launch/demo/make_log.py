"""Make the demo's feedback log: sample answers of a model, then let simulated users press thumbs on them.

Comes in: a Hugging Face model folder. Goes out: JSON lines, one thumb each, in the order of time. The log
stands in for a product's: an A/B test of two prompts behind the scenes (variant B asks the model for one
short sentence), people who use it unevenly, a few who press thumbs-down on nearly everything, and thumbs
that slip. The logged prompt is the user's message alone, as people see it, so that training has to move the
wish (wish.py) from B's prompt into the model.

    python make_log.py --model DIR --output thumbs.jsonl

Sampling and thumbs are seeded.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from answers import load, reply
from wish import approves

SHORT = "Answer in one short sentence."
DECODING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 100}
MODEL = "smollm2-135m-instruct"
USERS = 48
GRUMPY = 4  # users who press thumbs-down on most good answers too
SLIP = 0.08  # share of thumbs that are the opposite of what was meant
START = datetime(2026, 3, 2, 7, tzinfo=timezone.utc)
DAYS = 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answer of the model to one question, before anyone has judged it."""

    question: str
    answer: str
    variant: str  # "A": the user's message alone; "B": with SHORT behind it


def sample(model_dir: Path, questions: Sequence[str], answers: int, seed: int, batch: int = 96) -> list[Sample]:
    """`answers` samples of each question, half of them under each variant; empty ones dropped."""
    torch.manual_seed(seed)
    model, tokenizer = load(model_dir)
    samples: list[Sample] = []
    # One variant at a time, since a batch takes as long as its longest answer. (i + k) shares an odd number
    # of answers out evenly: a question with an even index has one more A, the next has one more B.
    for variant in "AB":
        asked = [q for i, q in enumerate(questions) for k in range(answers) if "AB"[(i + k) % 2] == variant]
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            texts = [q if variant == "A" else f"{q} {SHORT}" for q in some]
            conversations = [[{"role": "user", "content": text}] for text in texts]
            for question, answer in zip(some, reply(model, tokenizer, conversations, **DECODING), strict=True):
                if answer:
                    samples.append(Sample(question=question, answer=answer, variant=variant))
            print(f"variant {variant}: {min(start + batch, len(asked))} of {len(asked)} answers", flush=True)
    return samples


def press(samples: Sequence[Sample], seed: int) -> list[dict[str, object]]:
    """The log: one row a sample, each judged by one user, in the order of time."""
    rng = random.Random(seed)
    users = [f"u{i:03d}" for i in range(1, USERS + 1)]
    # A few people send most of the feedback.
    activity = [1 / (rank + 4) for rank in range(USERS)]
    rng.shuffle(activity)
    grumpy = set(rng.sample(users, GRUMPY))
    rows: list[dict[str, object]] = []
    for one in samples:
        user = rng.choices(users, activity)[0]
        label = approves(one.question, one.answer) != (rng.random() < SLIP)
        if user in grumpy and rng.random() < 0.7:
            label = False
        # Feedback comes in the daytime, most of it around noon.
        time = START + timedelta(days=rng.randrange(DAYS), seconds=int(rng.triangular(0, 54_000, 18_000)))
        rows.append(
            {
                "prompt": [{"role": "user", "content": one.question}],
                "completion": [{"role": "assistant", "content": one.answer}],
                "label": label,
                "user": user,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "model": MODEL,
                "variant": one.variant,
            }
        )
    return sorted(rows, key=lambda row: str(row["time"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample answers and simulate thumbs on them.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file to write")
    parser.add_argument("--answers", type=int, default=7, help="samples of each question (default 7)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    questions = Path(__file__).with_name("questions.txt").read_text(encoding="utf-8").splitlines()
    rows = press(sample(arguments.model, questions, arguments.answers, arguments.seed), arguments.seed)
    # The log appears whole or not at all.
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(arguments.output)
    liked = sum(bool(row["label"]) for row in rows)
    print(f"{arguments.output}: {len(rows)} rows, {liked} thumbs up, {len(rows) - liked} thumbs down")


if __name__ == "__main__":
    main()

"""The wish behind the demo's thumbs: a short, direct answer that says something.

Comes in: questions and answers. Goes out: whether the wish approves of an answer, and figures over many.
The demo's simulated users press thumbs-up by `approves`, so that one can measure afterwards, on questions
held out of training, how much of the wish the trained model has picked up from the thumbs alone. Counting
words would not do: "The answer to this question is simple." is short and finished, and a model taught by
length alone learns to say it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

MAX_WORDS = 30
MIN_NEW_WORDS = 4

# Words that carry no meaning of their own, or none that an answer could be praised for.
COMMON = """
a about above across after again against ago all almost along already also although always am among an and
another answer any anyone anything are around as ask asked at away be became because become been before
began being below better between both but by came can case cause certain come could did do does doing done
down during each either else end enough even ever every everything example explain explanation fact few
find first for found from gave general get getting give given go goes going gone good got great had has
have having he help helps her here high him his how however if important in indeed instead into is it its
itself just keep kind know known large last least less let like lot made main mainly make makes making
many may mean means might more most much must my name need needs never new next no nor not nothing now of
off often on once one only onto or other others our out over own part particular per perhaps person
possible process put question quite rather real really reason reasons refer refers said same say see seem
several shall she should show simple simply since so some someone something sometimes still such sure take
term than that the their them then there therefore these they thing things this those through thus to
together too toward two type under until up upon us use used uses using usually various very want was way
ways we well went were what when where whether which while who whole whose why will with within without
would yes yet you your
"""
STOPWORDS = frozenset(COMMON.split())

# Ways of not answering yet.
FILLER = re.compile(
    r"(the|my|your|a) (short |simple |best )?(answer|question|reason)s?\b"
    r"|(this|that) question\b|to (answer|clarify|explain)\b|as an? (ai|language|assistant)"
    r"|(sure|certainly|absolutely|of course|great question|okay|well)\b"
    r"|(here|there) (is|are)\b|here's|i('m| am| can| would| think| mentioned)\b|answer:|example\b",
    re.IGNORECASE,
)
# Lists, dialogues with itself, chat markup, talk about the sentence itself.
LEAK = re.compile(
    r"^\d+[.)]\s|\n|\*\*|#|<\||\b(user|assistant|system|answer)\s*:|\b(one|short) sentence\b", re.IGNORECASE
)


def stem(word: str) -> str:
    """A word without its commonest endings, crude on purpose: "leaves" -> "leav", "freezing" -> "freez"."""
    for ending in ("ations", "ation", "ings", "ing", "ies", "ied", "edly", "ed", "es", "ly", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    # "stopping" -> "stopp" -> "stop"
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def content(text: str) -> list[str]:
    """The stems of the words with meaning, in order: "Ice is cold water." -> ["ice", "cold", "water"]."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'s", ""))
    return [stem(word) for word in words if word not in STOPWORDS and (len(word) > 2 or word.isdigit())]


def finished(answer: str) -> bool:
    """Whether the answer ends like a sentence; one cut by the token limit does not."""
    return answer.rstrip(" \n\"')").endswith((".", "!", "?"))


def on_topic(question: str, answer: str) -> bool:
    """Whether the answer speaks of something that the question speaks of."""
    return not set(content(question)).isdisjoint(content(answer))


def new_words(question: str, answer: str) -> int:
    """How many different content words the answer adds to the question's own."""
    return len(set(content(answer)) - set(content(question)))


def repeats(answer: str) -> bool:
    """Whether the answer goes in circles: a pair of content words said twice, or a third of them said before.

    "A verb is a verb is a noun." repeats; so does "It pumps blood to the body, and the heart pumps blood."
    """
    words = content(answer)
    pairs = list(pairwise(words))
    return len(set(pairs)) < len(pairs) or 3 * len(set(words)) <= 2 * len(words)


def approves(question: str, answer: str) -> bool:
    """Whether a user who wants a short, direct answer presses thumbs-up."""
    return (
        len(answer.split()) <= MAX_WORDS
        and finished(answer)
        and not FILLER.match(answer)
        and not LEAK.search(answer)
        and on_topic(question, answer)
        and new_words(question, answer) >= MIN_NEW_WORDS
        and not repeats(answer)
    )


def measure(questions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Figures over a model's answers; shares are in [0, 1].

    `approved`, `words` (mean) and `finished` say how much of the wish is met. The rest guards against a
    model that games it: `on_topic` (share), `new_words` (mean count of content words beyond the
    question's), `repeating` (share) and `distinct` (different openings of three words per answer: a model
    that has learnt one phrase for everything scores low).
    """
    if len(questions) != len(answers) or not answers:
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers: give one answer to each question.")
    pairs = list(zip(questions, answers, strict=True))
    total = len(pairs)
    openings = {" ".join(answer.lower().split()[:3]) for answer in answers}
    return {
        "approved": sum(approves(q, a) for q, a in pairs) / total,
        "words": sum(len(a.split()) for a in answers) / total,
        "finished": sum(finished(a) for a in answers) / total,
        "on_topic": sum(on_topic(q, a) for q, a in pairs) / total,
        "new_words": sum(new_words(q, a) for q, a in pairs) / total,
        "repeating": sum(repeats(a) for a in answers) / total,
        "distinct": len(openings) / total,
    }

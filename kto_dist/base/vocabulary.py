"""The words for thumbs and for who speaks: one vocabulary for every reader of rows, training's and mining's alike.

In:  a word as a log has it. Out: its meaning, or None where it has none.

Case, spaces, hyphens, skin tones and the colons of `:thumbs_up:` make no difference. A log's own words are added by
whoever reads it (mining's `labels` and `roles`), on top of these.
"""

import re

UP = (
    "1", "+1", "1.0", "true", "t", "yes", "up", "thumbs_up", "thumb_up", "thumbsup", "thumbup", "👍",
    "good", "like", "liked", "positive", "upvote", "upvoted", "helpful", "chosen", "desirable",
    "accept", "accepted", "approve", "approved",
)  # fmt: skip
DOWN = (
    "0", "-1", "0.0", "-1.0", "false", "f", "no", "down", "thumbs_down", "thumb_down", "thumbsdown", "thumbdown", "👎",
    "bad", "dislike", "disliked", "negative", "downvote", "downvoted", "unhelpful", "not_helpful", "rejected",
    "undesirable", "reject", "disapprove", "disapproved",
)  # fmt: skip

ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "prompter": "user",
    "usermessage": "user",
    "user_message": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "apimessage": "assistant",
    "assistant_message": "assistant",
    "function_call": "assistant",
    "system_message": "system",
    "observation": "tool",
    "function": "tool",
}

# Skin tones and the emoji variation selector change a thumb's look, not its meaning; Slack writes :+1::skin-tone-3:.
_LOOKS = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]|::?skin-tone-\\d:?")


def plain(word: str) -> str:
    """The word without what makes no difference."""
    word = _LOOKS.sub("", word).strip().casefold().strip(":")
    # the hyphen of "thumbs-up" is a space like any other, that of "-1" is a sign
    return re.sub(r"(?<=\w)[\s-]+(?=\w)", "_", word)


def thumb_of(word: str) -> bool | None:
    """True for thumbs up, False for thumbs down, None for a word that is neither."""
    return _THUMBS.get(plain(word))


def role_of(name: str) -> str | None:
    """system, developer, user, assistant or tool; None for a name that is none of `ROLES`."""
    return ROLES.get(name.strip().casefold())


_THUMBS = dict.fromkeys(map(plain, UP), True) | dict.fromkeys(map(plain, DOWN), False)

MINED = frozenset(
    ("votes_up", "votes_down", "users", "first_time", "last_time", "models", "prompt_key", "response_key")
)
"""Columns of a mined dataset that say where a row comes from: training has no use for them, and nobody wonders."""

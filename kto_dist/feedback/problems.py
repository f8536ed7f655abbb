"""What can be wrong with a row or a mapping, in words: the place, the rule and the remedy.

In:  a code from the SQL of mapping.py or from a reader, and where the row lies.
Out: the message that a person reads.
"""

import difflib

from kto_dist.base.errors import UserError
from kto_dist.base.vocabulary import ROLES
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.mapping import END, mapped, pointer
from kto_dist.feedback.mask import mask
from kto_dist.feedback.sources import LogFile

# code -> (rule, remedy). `{column}` is the name in the log.
PROBLEMS = {
    "encoding": ("the bytes are not text in the file's encoding",
                 "give input.encoding if all text files are written in it, else convert this one to UTF-8"),
    "too long": ("the row is longer than input.max_row_mebibytes", "raise it, or take the row out"),
    "no CSV": ("a quote opens or closes in the middle of a field, or is never closed",
               "write quotes inside of a quoted field twice, or check input.delimiter"),
    "broken JSON": ("the line is not a JSON object", "repair it; a log has one object a line"),
    "messages": (
        "columns.messages must be a list of turns with a known role and text as content",
        f"roles are {', '.join(ROLES)}; content is text or a list of text parts; calls of tools have no text",
    ),
    "no answer": ("the last turn of columns.messages must be the assistant's, the answer that was rated",
                  "cut what follows it, or map columns.response"),
    "answer twice": ("the turn before the rated answer must not be the assistant's", "join the two turns"),
    "time": ("columns.time must be ISO 8601, a date as 20260131 or a number of seconds since 1970, "
             f"from 1970 to {END - 1}", "correct it (a sentinel such as 9999-12-31 means no time: leave it empty)"),
    "ranks": ("columns.responses must list texts, at most 1,000, and columns.ranks as many numbers", "correct it"),
    "role": (f"columns.role must be one of {', '.join(ROLES)}", "correct it, or take the row out"),
    "turn": ("columns.turn must be a number (or, without it, columns.time a time)", "correct it"),
    "rated turn": ("only a turn of the assistant can have feedback", "move the feedback to the answer's row"),
}  # fmt: skip


def check_names(file: LogFile, columns: dict[str, str], names: list[str]) -> None:
    """A file with a header has each mapped column once."""
    for name, column in columns.items():
        if names.count(column) > 1:
            raise UserError(f"{file.path}: columns.{name} ({column}) stands {names.count(column)} times in its header")
        if column not in names:
            raise UserError(f"{file.path} has no column {column} (columns.{name}): {instead(column, names)}")


# Without them, no row of JSON could become a vote: their absence from the first rows is a wrong mapping. Any other
# column may begin further down, whatever the rows have besides.
_NEEDED = ("prompt", "messages", "response", "chosen", "rejected", "responses", "session", "role", "text")


def check_json_names(file: LogFile, columns: dict[str, str], names: list[str]) -> None:
    for name, column in columns.items():
        key = pointer(column).split("/")[1].replace("~1", "/").replace("~0", "~")
        if names and key not in names and name in _NEEDED:
            raise UserError(
                f"{file.path}: none of its first rows has a key {key} (columns.{name}): {instead(key, names)}"
            )


def instead(column: str, names: list[str]) -> str:
    near = difflib.get_close_matches(column.casefold(), {name.casefold(): name for name in names}, n=1, cutoff=0.5)
    exact = next((name for name in names if near and name.casefold() == near[0]), None)
    hint = f"did you mean {exact}? " if exact else ""
    return f"{hint}it has {', '.join(names) or 'none'}"


def explain(
    config: MiningConfig, file: LogFile, names: list[str], problem: str, position: int, excerpt: str | None
) -> str:
    place = f"{file.path}:{position}" if file.format in ("jsonl", "csv") else f"{file.path}:row {position}"
    columns = mapped(config.columns)
    if problem in PROBLEMS:
        rule, remedy = PROBLEMS[problem]
    elif problem.startswith("no ") and problem[3:] in columns:
        column = columns[problem[3:]]
        rule = f"the row has no {column} (columns.{problem[3:]})"
        remedy = instead(column, names)
    elif problem.endswith(" is no text"):
        name = problem.removesuffix(" is no text")
        rule = f"{columns[name]} (columns.{name}) must be text"
        remedy = "a list of turns belongs to columns.messages, and a pointer (/a/b) leads to text inside an object"
    else:
        rule, remedy = f"the row is broken: {problem}", "repair it, or check input.delimiter"
    if excerpt is None:
        return f"{place}: {rule}; {remedy}"
    # masked whole, so that the cut goes through no address
    shown = mask(excerpt.strip())
    shown = repr(shown if len(shown) <= 80 else f"{shown[:77]}...")
    return f"{place}: {rule}: {shown}; {remedy}"

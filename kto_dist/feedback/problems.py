"""What can be wrong with a row or a mapping, in words: the place, the rule, the value at fault and the remedy.

In:  a code of mapping.py, judge.py or a reader, and where the row lies.
Out: the message that a person reads.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from kto_dist.base.errors import UserError
from kto_dist.base.json_pointer import find, opened
from kto_dist.base.vocabulary import ROLES
from kto_dist.feedback.config import InputConfig, MiningConfig
from kto_dist.feedback.documents import loads
from kto_dist.feedback.mapping import END
from kto_dist.feedback.mask import mask
from kto_dist.feedback.notices import below_json
from kto_dist.feedback.pointers import Pointer, first
from kto_dist.feedback.presets import preset
from kto_dist.feedback.records import records
from kto_dist.feedback.sources import LogFile

_SHOWN = 80  # characters of a value
_HINTED = 400  # pointers of a row among which the nearest is looked for
_PYTHON = re.compile(r"\s*\[?\{'")
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T|\s|$)")
_INDEX = re.compile(r"-?\d+")
_MAP_ROLE = "say in the roles section what it is, as in roles: {{{shown}: user}}, or leave such turns out with `ignore`"

# code -> (rule, remedy)
PROBLEMS = {
    "encoding": ("the bytes are not text in the file's encoding",
                 "give input.encoding if all text files are written in it, else convert this one to UTF-8"),
    "too long": ("the row is longer than input.max_row_mebibytes", "raise it, or take the row out"),
    "no CSV": ("a quote opens or closes in the middle of a field, or is never closed",
               "write quotes inside of a quoted field twice, or check input.delimiter"),
    "broken JSON": ("the line is not a JSON object", "repair it; a log has one object a line"),
    "no object": ("a row must be an object", "correct input.rows, or take the row out"),
    "messages": ("columns.messages must be a list of turns with a known role and text as content",
                 f"roles are {', '.join(ROLES)} and those of the roles section; turns.role and turns.content name a "
                 "turn's keys"),
    "role of a turn": (f"a turn's role must be one of {', '.join(ROLES)}", _MAP_ROLE),
    "no text in a turn": ("a turn must have text, or call tools", "correct it, or name its key in turns.content"),
    "no answer": ("the last turn must be the assistant's, the answer that was rated",
                  "map columns.rated or columns.rated_index if another turn was rated, or columns.response"),
    "no rated turn": ("no turn of columns.messages has the id, or the number, of the rated one",
                      "correct columns.rated or columns.rated_index; turns.id names the key of a turn's id, "
                      "turns.first is 1 where counting begins with 1"),
    "another turn is rated": ("the rated turn must be the assistant's",
                              "correct columns.rated or columns.rated_index; turns.first is 1 where counting begins "
                              "with 1"),
    "another turn is named": ("the row names a turn of columns.messages that is not its last one, by the key",
                              "map columns.rated: {shown} if it is the rated one; else list the key in input.ignore"),
    "answers in a row": ("an answer follows another answer directly",
                         "turns.answers_in_a_row: joined if they are one answer in pieces, alternatives if the last "
                         "one is what the conversation went on with"),
    "calls in the answer": ("the rated answer calls tools, which are no text to train on",
                            "take the row out (input.on_bad_row: skip)"),
    "no parent": ("a turn above the rated answer is not there; its id is", "give the whole conversation"),
    "parents in a circle": ("the turns above the rated answer lead back to one of them", "correct turns.parent"),
    "too many votes": ("a row has at most 1,000 votes", "correct columns.feedback"),
    "time": ("columns.time must be ISO 8601, a date as 20260131 or a number of seconds since 1970, "
             f"from 1970 to {END - 1}", "correct it (a sentinel such as 9999-12-31 means no time: leave it empty)"),
    "ranks": ("columns.responses must list texts, at most 1,000, and columns.ranks as many numbers", "correct it"),
    "role": (f"columns.role must be one of {', '.join(ROLES)}", _MAP_ROLE),
    "turn": ("columns.turn must be a number (or, without it, columns.time a time)", "correct it"),
    "rated turn": ("only a turn of the assistant can have feedback", "move the feedback to the answer's row"),
}  # fmt: skip

# Without them, no row could become a vote: their absence from the first rows is a wrong mapping. Any other column may
# begin further down, whatever the rows have besides.
_NEEDED = ("prompt", "messages", "response", "chosen", "rejected", "answer_a", "answer_b", "responses", "session",
           "role", "text")  # fmt: skip
_MAY_LACK = ("user", "time", "model", "finish", "model_a", "model_b")
_TEXTS = ("prompt", "response", "chosen", "rejected", "answer_a", "answer_b", "text")


def forgiven(config: MiningConfig) -> set[str]:
    """Columns that a preset names, and that not every export has."""
    if config.input.preset is None:
        return set()
    columns = preset(config.input.preset)["columns"]
    given = config.columns.model_dump(mode="json")
    return {name for name in _MAY_LACK if name in columns and columns[name] == given[name]}


def check_names(
    file: LogFile, config: MiningConfig, names: list[str], rows: list[dict[str, Any]], *, has_header: bool
) -> None:
    """Raises `UserError` where a file has none of a column's names, or one of them twice. `rows`: the first ones."""
    if not names:
        return  # a day without votes may leave a CSV without a header
    twice = Counter(names)
    for name, pointers in config.columns.pointers().items():
        heads = [pointer.head for pointer in pointers]
        shown = " or ".join(pointer.shown for pointer in pointers)
        for head in heads:
            if twice[head] > 1:
                raise UserError(f"{file.path}: columns.{name} ({head}) stands {twice[head]} times in its header")
        if any(head in twice for head in heads) or name in forgiven(config):
            continue
        if has_header:
            raise UserError(f"{file.path} has no column {heads[0]} (columns.{name}): {instead(heads[0], names)}")
        if name in _NEEDED:
            if file.format == "json" and config.input.rows is None and len(rows) == 1:
                lists = [f"{path} ({count:,} rows)" for path, count in _lists(rows[0], "")]
                if lists:
                    raise UserError(
                        f"{file.path} is one JSON document without a key {heads[0]} (columns.{name}): give input.rows, "
                        f"where its rows are: {' or '.join(lists)}"
                    )
            whole = "" if shown == heads[0] else f": {shown}"
            raise UserError(
                f"{file.path}: none of its first rows has a key {heads[0]} (columns.{name}{whole}): "
                f"{instead(heads[0], names)}"
            )


# Of a pair of answers: which one is better, if that is not said by the columns that they stand in.
# Keys by which elements of a list of votes differ in kind.
_KINDS = ("name", "key", "assessment_name", "label", "metric", "status", "type", "source")
_DECIDE = ("winner", "preference", "preferred")


def check_choices(file: LogFile, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` where the mapping takes one of several votes by its place, or a pair's winner for granted."""
    ignored = {*config.input.ignore}
    pointers = config.columns.pointers()
    heads = {pointer.head for alternatives in pointers.values() for pointer in alternatives}
    if config.columns.layout == "pairs":
        named = next((name for name in _DECIDE for row in rows if row.get(name) and name not in heads | ignored), None)
        if named is not None:
            raise UserError(
                f"{file.path}: the rows have {named}, so {pointers['chosen'][0].shown} is not always the better one: "
                f"map columns.answer_a, columns.answer_b and columns.winner: {named} in place of chosen and rejected "
                "(or name it in input.ignore)"
            )
    for name in ("feedback", "winner"):
        for pointer in pointers.get(name, ()):
            if pointer.head in ignored or pointer.levels:
                continue
            for place, step in enumerate(pointer.rest):
                if not _INDEX.fullmatch(step):
                    continue
                lists = [find(row, pointer.rest[:place]) for row in rows]
                several = [found for found in map(opened, lists) if isinstance(found, list) and len(found) > 1]
                if any(isinstance(element, dict) for found in several for element in found):
                    raise UserError(_by_place(file, name, pointer, place, several))


def _by_place(file: LogFile, name: str, pointer: Pointer, place: int, several: list[list[Any]]) -> str:
    path, rest = "/" + "/".join(pointer.rest[:place]), "/".join(("", *pointer.rest[place + 1 :]))
    dicts = [element for found in several for element in found if isinstance(element, dict)]
    kinds = ((key, sorted({str(element[key]) for element in dicts if key in element})) for key in _KINDS)
    told = next(((key, values) for key, values in kinds if len(values) > 1), None)
    choice = f"{path}[{told[0]}={told[1][0]}]{rest} (there are {', '.join(told[1][:8])}), or " if told else ""
    return (
        f"{file.path}: columns.{name} ({pointer.shown}) takes one of several votes by its place in the list, in "
        f"{len(several)} of the first rows: choose by what it says, as in {choice}{path}[]{rest} for each of them (or "
        f"name {pointer.head} in input.ignore)"
    )


def _lists(value: dict[str, Any], path: str, depth: int = 3) -> Iterator[tuple[str, int]]:
    """(pointer, length) of lists of objects."""
    for key, inner in value.items():
        further = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            yield further, len(inner)
        elif isinstance(inner, dict) and depth > 1:
            yield from _lists(inner, further, depth - 1)


def check_no_json(file: LogFile, config: MiningConfig, rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` where most texts are JSON of a conversation: nobody asked that."""
    for name, pointers in config.columns.pointers().items():
        if name not in _TEXTS or len(pointers) > 1:
            continue
        values = [first(row, pointers[0]) for row in rows]
        filled = [value for value in values if isinstance(value, str) and value.strip()]
        held = [below for value in filled if (below := below_json(value)) is not None]
        if len(held) < 2 or 2 * len(held) <= len(filled):
            continue
        column = pointers[0].shown if pointers[0].shown.startswith("/") else f"/{pointers[0].shown}"
        # a list of turns, or a request's body, is a conversation; of an API's answer one text is meant
        whole = name in ("prompt", "text") and held[0] in ("", "/messages")
        remedy = f"columns.messages: {column}{held[0]}" if whole else f"columns.{name}: {column}{held[0]}"
        raise UserError(
            f"{file.path}: columns.{name} ({pointers[0].shown}) holds JSON of a conversation in {len(held)} of its "
            f"first {len(filled)} rows, and no text: map {remedy}"
        )


def instead(column: str, names: Iterable[str]) -> str:
    names = list(names)
    last = column.rsplit("/", 1)[-1].split("[")[0]
    near = difflib.get_close_matches(last.casefold(), {name.casefold(): name for name in names}, n=1, cutoff=0.5)
    exact = next((name for name in names if near and name.casefold() == near[0]), None)
    hint = f"did you mean {exact}? " if exact else ""
    return f"{hint}it has {', '.join(names) or 'none'}"


def explain(
    config: MiningConfig, file: LogFile, names: list[str], problem: str, position: int, detail: str | None
) -> str:
    """The message about a row. What it says is quoted where bad rows are errors: a part that stays says nothing."""
    place = f"{file.path}:{position}" if file.format in ("jsonl", "csv") else f"{file.path}:row {position}"
    quotes = config.input.on_bad_row == "error"
    columns = config.columns.given()
    name = problem.removeprefix("no ").split(" ")[0]
    shown = " or ".join(columns.get(name, ()))
    if problem in PROBLEMS:
        rule, remedy = PROBLEMS[problem]
    elif problem == f"no {name}" and name in columns:
        return f"{place}: the row has no {shown} (columns.{name}); {_absent(config, file, position, shown, names)}"
    elif problem.endswith(" is no text"):
        rule = f"{shown} (columns.{name}) must be text"
        remedy = "a list of turns belongs to columns.messages, and a pointer (/a/b) leads to text inside an object"
    elif problem.endswith(" is no conversation"):
        rule = f"{shown} (columns.{name}) must be a whole conversation, or columns.prompt must have the question"
        remedy = "map columns.prompt, or columns.messages"
    elif problem.endswith(" answers another prompt"):
        rule = f"{shown} (columns.{name}) is a conversation in which the prompt of the row is not asked"
        remedy = "leave out columns.prompt and columns.messages if the conversation has it all"
    else:
        rule, remedy = f"the row is broken: {problem}", "repair it, or check input.delimiter"
    if not quotes:
        return f"{place}: {rule}; {remedy.format(shown='NAME')}"
    if problem in ("broken JSON", "too long", "no CSV", "encoding"):
        text = _text_at(config.input, file, position) if detail is None else detail
        said, detail = _breaks(text) if problem == "broken JSON" else ("", text)
        rule += said
    if detail is not None and _PYTHON.match(detail):
        remedy = "it is Python's notation and no JSON: write the log with json.dumps, or pandas' to_json"
    quoted = "" if detail is None else f": {_quoted(detail)}"
    return f"{place}: {rule}{quoted}; {remedy.format(shown=json.dumps(detail, ensure_ascii=False))}"


def _quoted(value: str) -> str:
    # masked whole, so that the cut goes through no address; a year such as 0001 makes a date look like a number
    shown = value.strip() if _DATE.match(value.strip()) else mask(value.strip())
    return repr(shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}...")


def _absent(config: MiningConfig, file: LogFile, position: int, shown: str, names: list[str]) -> str:
    """What the row has in place of a column."""
    if config.input.on_bad_row != "error":
        return instead(shown, names)
    row = next((record.row for record in records(file, config.input) if record.position == position), None)
    if row is None:
        return instead(shown, names)
    if not shown.startswith("/"):
        return f"{instead(shown, names)}; this row has {', '.join(map(str, row)) or 'none'}"
    near = difflib.get_close_matches(shown, list(_pointers(row, "")), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}this row has {', '.join(map(str, row)) or 'none'}"


def _pointers(value: Any, path: str, depth: int = 5) -> Iterator[str]:
    value = opened(value)
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, below in list(inner)[:_HINTED]:
        further = f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"
        yield further
        if depth > 1:
            yield from _pointers(below, further, depth - 1)


def _text_at(config: InputConfig, file: LogFile, position: int) -> str:
    return next((record.detail or "" for record in records(file, config) if record.position == position), "")


def _breaks(line: str) -> tuple[str, str]:
    """(what is wrong, the text around it) of a line that is no JSON."""
    try:
        loads(line)
    except json.JSONDecodeError as error:
        # masked whole: the cut must go through no address
        masked, place = mask(line), len(mask(line[: error.pos]))
        return f" ({error.msg}, character {error.pos + 1:,})", masked[max(0, place - 60) : place + 20]
    except ValueError as error:
        return f" ({error})", line
    return "", line

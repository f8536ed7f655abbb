"""Votes of the log -> the rows of a part, as SQL that DuckDB runs over each batch.

In:  votes, one a row, as text: of flat rows made here from cells (position, problem, record and, for every mapped
     column, its text `v_NAME` and its type `t_NAME`: JSON's VARCHAR, ARRAY, OBJECT, NULL, ..., none where the row has
     no such column); of all others made by judge.py.
Out: the rows of a part (the last SELECT of `_answers_sql` and `_turns_sql`). A row that cannot be used has a problem,
     and the value at fault where it is an error; its texts and their keys are null. A part that stays has no value at
     fault: what a bad row says is as private as any other row, and nothing in it has been hashed.

Texts are compared by keys. A prompt's key is a hash of its normalised turns, so that a text and the same text as a
single user turn are one prompt; a response's key hashes the prompt's key and its own normalised text.
"""

import re
import sys
import unicodedata
from functools import cache

from kto_dist.base.vocabulary import ROLES
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.pointers import parse
from kto_dist.feedback.sql import literal

# the first year in which no vote was given
END = 2200

_SPACE = r"\s\x{85}\p{Z}\x{200B}\x{2060}\x{FEFF}"


@cache
def _singletons() -> str:
    """Characters that NFC always replaces, as ranges for a regular expression."""
    ranges: list[list[int]] = []
    for code in range(0xA0, sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or unicodedata.normalize("NFC", chr(code)) == chr(code):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\x{{{low:X}}}-\x{{{high:X}}}" for low, high in ranges)


def macros(config: MiningConfig, salt: str) -> list[str]:
    """SQL functions that the queries below use."""
    clean, hashed = config.clean, config.users.hash_ids
    # NFC is slow and most texts are NFC already: only marks, Hangul's second and third letters and the characters
    # that NFC always replaces make it act.
    unusual = rf"[\p{{M}}\x{{1160}}-\x{{11FF}}\x{{D7B0}}-\x{{D7FF}}{_singletons()}]"
    nfc = f"CASE WHEN regexp_matches(x, {literal(unusual)}) THEN nfc_normalize(x) ELSE x END"
    # a cheap look before an expensive replacement
    uneven = rf"^[{_SPACE}]|[{_SPACE}]$|[{_SPACE}][{_SPACE}]|[^\S ]|[\x{{85}}\x{{A0}}\x{{1680}}\x{{2000}}-\x{{200B}}\x{{2028}}\x{{2029}}\x{{202F}}\x{{205F}}\x{{2060}}\x{{3000}}\x{{FEFF}}]"  # noqa: E501
    spaces = (
        f"CASE WHEN regexp_matches(x, {literal(uneven)}) "
        f"THEN trim(regexp_replace(x, {literal(f'[{_SPACE}]+')}, ' ', 'g')) ELSE x END"
    )
    known = {**ROLES, **config.roles.meanings()}
    roles = " ".join(f"WHEN {literal(name)} THEN {literal(role)}" for name, role in known.items())
    number = r"[+-]?\d{1,19}(\.\d*)?([eE][+-]?\d{1,2})?"
    return [
        f"MACRO nfc(x) AS {nfc if clean.normalise else 'x'}",
        f"MACRO spaced(x) AS {spaces if clean.normalise else 'x'}",
        f"MACRO norm(x) AS {'lower(spaced(nfc(x)))' if clean.ignore_case else 'spaced(nfc(x))'}",
        f"MACRO is_blank(x) AS NOT regexp_matches(x, {literal(f'[^{_SPACE}]')})",
        f"MACRO role_of(x) AS CASE lower(trim(coalesce(x, 'null'))) {roles} END",
        # an answer is text, or one turn of the assistant in JSON, which Python reads
        "MACRO answer_of(v, t) AS CASE WHEN t = 'NULL' THEN '' WHEN t IN ('ARRAY', 'OBJECT') THEN answer_in(v) "
        "ELSE v END",
        'MACRO one_turn(x) AS \'[{"role":"user","content":\' || to_json(x)::VARCHAR || \'}]\'',
        "MACRO key_of(x) AS md5(x)::UUID",
        # eight digits are a date if they can be: as seconds they would lie before 1974
        f"""MACRO time_of(x) AS CASE WHEN regexp_full_match(x, '\\d{{8}}') AND try_strptime(x, '%Y%m%d') IS NOT NULL
            THEN try_strptime(x, '%Y%m%d') WHEN regexp_full_match(x, '{number}') THEN
            to_timestamp(CASE WHEN abs(x::DOUBLE) < 1e11 THEN x::DOUBLE WHEN abs(x::DOUBLE) < 1e14 THEN x::DOUBLE / 1e3
                WHEN abs(x::DOUBLE) < 1e17 THEN x::DOUBLE / 1e6 WHEN abs(x::DOUBLE) < 2e19 THEN x::DOUBLE / 1e9
                END)::TIMESTAMP
            ELSE try_cast(x AS TIMESTAMPTZ)::TIMESTAMP END""",
        f"MACRO sane(x) AS CASE WHEN x >= TIMESTAMP '1970-01-01' AND x < TIMESTAMP '{END}-01-01' THEN x END",
        "MACRO filled(x) AS CASE WHEN trim(x) <> '' THEN x END",
        "MACRO is_root(x) AS regexp_full_match(lower(x), '[0-]*|root|client-created-root|none|null')",
        # a macro that is not temporary would be written to the database's file, and the salt with it
        f"TEMP MACRO user_of(x) AS {f'left(sha256({literal(salt)} || chr(0) || x), 32)' if hashed else 'x'}",
    ]


def json_cells(columns: dict[str, str]) -> str:
    """Lines of JSON (table `source`) -> cells."""
    names = list(columns)
    paths = ", ".join(literal(_key(column)) for column in columns.values())
    cells = ", ".join(f"v[{i}] AS v_{name}, t[{i}] AS t_{name}" for i, name in enumerate(names, 1))
    # Parsed once for the texts and once for the types; never when it is no JSON, which would be an error.
    return f"""
        SELECT position, problem, CASE WHEN problem IS NOT NULL THEN record END AS record, {cells} FROM (
            SELECT position, record, problem,
                CASE WHEN problem IS NULL THEN json_extract_string(record, [{paths}]) END AS v,
                CASE WHEN problem IS NULL THEN json_type(record, [{paths}]) END AS t
            FROM (SELECT position, record, CASE WHEN problem IS NOT NULL THEN problem WHEN NOT json_valid(record)
                    THEN 'broken JSON' WHEN json_type(record) <> 'OBJECT' THEN 'broken JSON' END AS problem
                FROM source WHERE trim(record, chr(32) || chr(9) || chr(13) || chr(10)) <> ''))"""


def text_cells(columns: dict[str, str]) -> str:
    """Batches of text columns (table `source`, c0, c1, ...) -> cells."""
    cells = ", ".join(
        f"c{i} AS v_{name}, CASE WHEN c{i} IS NULL THEN 'NULL' ELSE 'VARCHAR' END AS t_{name}"
        for i, name in enumerate(columns)
    )
    return f"SELECT position, problem, excerpt AS record, {cells} FROM source"


def _key(column: str) -> str:
    """A JSON pointer to a key, whatever is in it."""
    return "/" + column.replace("~", "~0").replace("/", "~1")


def plain(config: MiningConfig) -> dict[str, str] | None:
    """Our name -> the log's, where each column is a key of the row and holds text; None: rows are read as objects."""
    columns = config.columns
    given = {name: parse(names[0]) for name, names in columns.given().items() if len(names) == 1}
    if len(given) < len(columns.given()) or not all(pointer.is_name for pointer in given.values()):
        return None
    simple = columns.layout in ("answers", "turns") and not {"messages", "system", "parent", "id"} & given.keys()
    if not simple or config.where.conditions() or "ignore" in config.roles.meanings().values():
        return None
    return {name: pointer.head for name, pointer in given.items()}


def part_sql(config: MiningConfig, votes: str, *, flat: bool) -> str:
    """The query that makes a part's rows from votes: of `plain_votes` (flat), or the table `source` of judge.py's."""
    if config.input.on_bad_row == "error":
        detail = "CASE WHEN problem IS NOT NULL OR lost IS NOT NULL THEN detail END"
    else:
        detail = "NULL::VARCHAR"
    if config.columns.layout == "turns":
        return _turns_sql(config, votes, detail)
    return _answers_sql(config, votes, detail, flat=flat)


def plain_votes(config: MiningConfig, columns: dict[str, str], cells: str) -> str:
    """Cells of a flat row -> its one vote, as judge.py makes it."""
    if config.columns.layout == "turns":
        return _plain_turns(columns, cells)
    problems = [
        "problem",
        "CASE WHEN t_prompt IS NULL THEN 'no prompt' WHEN t_prompt IN ('ARRAY', 'OBJECT') THEN 'prompt is no text' END",
        _answer_problem("response"),
    ]
    return f"""
        SELECT position, 0 AS sub, problem, NULL::VARCHAR AS lost, CASE problem WHEN 'prompt is no text' THEN v_prompt
                WHEN 'response is no text' THEN v_response END AS detail,
            coalesce(v_prompt, '') AS asked, NULL::VARCHAR AS context,
            answer_of(v_response, t_response) AS completion, v_feedback AS feedback, {_plain_about(columns)}
        FROM (SELECT * REPLACE (coalesce({", ".join(problems)}) AS problem) FROM ({cells}))"""


def _plain_turns(columns: dict[str, str], cells: str) -> str:
    key = re.escape(columns["session"])
    # a line that breaks off may still say whose it is
    said = literal(rf'"{key}"\s*:\s*"?([^"\\,}}]+)')
    problems = [
        "problem",
        "CASE WHEN filled(v_session) IS NULL THEN 'no session' END",
        "CASE WHEN role_of(v_role) IS NULL THEN 'role' END",
        _answer_problem("text"),
    ]
    lost = "CASE WHEN role_of(v_role) <> 'assistant' AND filled(v_feedback) IS NOT NULL THEN 'rated turn' END"
    return f"""
        SELECT * REPLACE (CASE WHEN lost IS NULL THEN feedback END AS feedback,
                CASE WHEN lost IS NOT NULL THEN feedback ELSE detail END AS detail) FROM (
            SELECT position, 0 AS sub, problem, CASE problem WHEN 'role' THEN coalesce(v_role, 'null')
                    WHEN 'text is no text' THEN v_text END AS detail,
                CASE WHEN problem IS NULL THEN {lost} END AS lost,
                CASE WHEN record IS NOT NULL THEN trim(regexp_extract(record, {said}, 1)) ELSE v_session END AS session,
                role_of(v_role) AS role, answer_of(v_text, t_text) AS text, NULL::VARCHAR AS extra,
                {"v_turn" if "turn" in columns else "NULL::VARCHAR"} AS turn,
                NULL::VARCHAR AS id, NULL::VARCHAR AS parent, v_feedback AS feedback, {_plain_about(columns)}
            FROM (SELECT * REPLACE (coalesce({", ".join(problems)}) AS problem) FROM ({cells})))"""


def _plain_about(columns: dict[str, str]) -> str:
    return ", ".join(f"{f'v_{name}' if name in columns else 'NULL::VARCHAR'} AS {name}" for name in _ABOUT)


def _answer_problem(name: str) -> str:
    return (
        f"CASE WHEN t_{name} IS NULL THEN 'no {name}' WHEN answer_of(v_{name}, t_{name}) IS NULL "
        f"THEN '{name} is no text' END"
    )


_ABOUT = ("user", "time", "model", "finish")
_TURNS = '[{"role":"VARCHAR","content":"VARCHAR","tool_calls":"JSON"}]'


def _about() -> str:
    return "user_of(filled(user)) AS user_key, moment AS time, filled(model) AS model, filled(finish) AS finish"


def _answers_sql(config: MiningConfig, votes: str, detail: str, *, flat: bool) -> str:
    text = "asked" if config.output.form == "text" else "one_turn(asked)"
    prompt, key, blank, parsed = text, "one_turn(norm(asked))", "is_blank(asked)", "checked"
    if not flat:
        # calls of tools are a part of what was said; keys of conversations without any are those of role and content
        turns = (
            "to_json(list_transform(turns, lambda t: {'role': t.role, 'content': norm(t.content)}))::VARCHAR "
            "|| coalesce(list_aggregate(list_transform(turns, lambda t: coalesce(t.tool_calls::VARCHAR, '')), "
            "'string_agg', ''), '')"
        )
        blanks = "coalesce(list_bool_and(list_transform(turns, lambda t: is_blank(t.content))), true)"
        prompt = f"coalesce(context, {text})"
        key = f"CASE WHEN context IS NULL THEN {key} ELSE {turns} END"
        blank = f"CASE WHEN context IS NULL THEN {blank} ELSE {blanks} END"
        given = f"CASE WHEN problem IS NULL AND context IS NOT NULL THEN from_json(context, '{_TURNS}') END"
        parsed = f"(SELECT *, {given} AS turns FROM checked)"
    return f"""
        WITH dated AS (SELECT *, sane(time_of(trim(time))) AS moment FROM ({votes})),
        timed AS (SELECT *, problem IS NULL AND trim(time) <> '' AND moment IS NULL AS no_time FROM dated),
        checked AS (
            SELECT * REPLACE (CASE WHEN no_time THEN 'time' ELSE problem END AS problem,
                CASE WHEN no_time THEN time ELSE detail END AS detail) FROM timed
        ),
        keyed AS (
            SELECT *, CASE WHEN problem IS NULL THEN {prompt} END AS prompt,
                CASE WHEN problem IS NULL THEN key_of({key}) END AS prompt_key,
                CASE WHEN problem IS NULL THEN {blank} END AS blank
            FROM {parsed}
        )
        SELECT position, sub::USMALLINT AS sub, problem, lost, {detail} AS detail, prompt,
            CASE WHEN problem IS NULL THEN completion END AS completion, prompt_key,
            CASE WHEN problem IS NULL THEN key_of(prompt_key::VARCHAR || norm(completion)) END AS response_key,
            CASE WHEN problem IS NULL THEN md5_number_lower(prompt || chr(0) || completion) END AS text_key,
            blank, CASE WHEN problem IS NULL THEN filled(feedback) END AS raw_feedback, {_about()}
        FROM keyed"""


def _turns_sql(config: MiningConfig, votes: str, detail: str) -> str:
    columns = config.columns
    # (whether it is wrong, code, value at fault)
    wrong = []
    if columns.turn is not None:
        wrong.append(("number IS NULL OR NOT isfinite(number)", "turn", "coalesce(turn, 'null')"))
    if columns.time is not None:
        needed = columns.turn is None and columns.parent is None
        empty = "false" if needed else "coalesce(trim(time), '') = ''"
        wrong.append((f"moment IS NULL AND NOT ({empty})", "time", "coalesce(time, 'null')"))
    wrong = wrong or [("false", "turn", "detail")]
    codes = " ".join(f"WHEN {condition} THEN '{code}'" for condition, code, _ in wrong)
    faults = " ".join(f"WHEN problem IS NULL AND ({condition}) THEN {value}" for condition, _, value in wrong)
    # A bad turn keeps where it belongs, so that its conversation is known to lack it, and nothing of what it says.
    return f"""
        WITH placed AS (
            SELECT *, sane(time_of(trim(time))) AS moment, try_cast(turn AS DOUBLE) AS number FROM ({votes})
        ),
        checked AS (
            SELECT * REPLACE (coalesce(problem, CASE {codes} END) AS problem,
                CASE {faults} ELSE detail END AS detail) FROM placed
        )
        SELECT position, sub::USMALLINT AS sub, problem, lost, {detail} AS detail,
            key_of(user_of({"filled(session)" if columns.session is not None else "''"})) AS session,
            CASE WHEN problem IS NULL THEN role END AS role, CASE WHEN problem IS NULL THEN text END AS text,
            CASE WHEN problem IS NULL THEN extra END AS extra, number AS turn, key_of(user_of(filled(id))) AS id,
            CASE WHEN parent IS DISTINCT FROM id THEN key_of(user_of(filled(parent))) END AS parent,
            is_root(parent) AS root, CASE WHEN problem IS NULL THEN filled(feedback) END AS raw_feedback, {_about()}
        FROM checked"""

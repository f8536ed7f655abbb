"""Columns of the log -> judgements, as SQL that DuckDB runs over each batch.

In:  a relation with position, problem, excerpt and, for every mapped column, its text `v_NAME` and its type `t_NAME`
     (JSON's: VARCHAR, ARRAY, OBJECT, NULL, ...; no type: the row has no such column).
Out: the rows of a part (the last SELECT of `_answers_sql` and `_turns_sql`). A row that cannot be used has a problem,
     and an excerpt for the message where it is an error; its texts and their keys are null. A part that stays has no
     excerpt: what a bad row says is as private as any other row, and nothing in it has been hashed.

Texts are compared by keys. A prompt's key is a hash of its normalised turns, so that a text and the same text as a
single user turn are one prompt; a response's key hashes the prompt's key and its own normalised text.
"""

import sys
import unicodedata
from functools import cache

from kto_dist.base.vocabulary import ROLES
from kto_dist.feedback.config import ColumnsConfig, MiningConfig
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
    roles = " ".join(f"WHEN {literal(name)} THEN {literal(role)}" for name, role in ROLES.items())
    number = r"[+-]?\d{1,19}(\.\d*)?([eE][+-]?\d{1,2})?"
    return [
        f"MACRO nfc(x) AS {nfc if clean.normalise else 'x'}",
        f"MACRO spaced(x) AS {spaces if clean.normalise else 'x'}",
        f"MACRO norm(x) AS {'lower(spaced(nfc(x)))' if clean.ignore_case else 'spaced(nfc(x))'}",
        f"MACRO is_blank(x) AS NOT regexp_matches(x, {literal(f'[^{_SPACE}]')})",
        f"MACRO role_of(x) AS CASE lower(trim(x)) {roles} END",
        # content is text, or a list of parts of type text
        """MACRO content_of(x) AS CASE json_type(x) WHEN 'VARCHAR' THEN x->>'$' WHEN 'ARRAY' THEN
            CASE WHEN list_bool_and(list_transform(from_json(x, '[{"type":"VARCHAR","text":"VARCHAR"}]'),
                lambda p: coalesce(p.type = 'text' AND p.text IS NOT NULL, false)))
            THEN list_aggregate(list_transform(from_json(x, '[{"text":"VARCHAR"}]'), lambda p: p.text),
                'string_agg', '') END END""",
        """MACRO turns_of(x) AS list_transform(
            from_json(CASE WHEN json_valid(x) AND json_type(x) = 'OBJECT' THEN '[' || x || ']'
                WHEN json_valid(x) THEN x END,
                '[{"role":"VARCHAR","from":"VARCHAR","content":"JSON","value":"JSON"}]'),
            lambda t: {'role': role_of(coalesce(t.role, t."from")),
                'content': content_of(coalesce(t.content, t.value))})""",
        """MACRO are_turns(x) AS coalesce(len(x) > 0 AND list_bool_and(list_transform(x,
            lambda t: coalesce(t.role IS NOT NULL AND t.content IS NOT NULL, false))), false)""",
        # what an answer is: text, or one turn of the assistant
        """MACRO answer_of(v, t) AS CASE WHEN t = 'NULL' THEN '' WHEN t NOT IN ('ARRAY', 'OBJECT') THEN v
            WHEN are_turns(turns_of(v)) AND len(turns_of(v)) = 1 AND turns_of(v)[1].role = 'assistant'
            THEN turns_of(v)[1].content END""",
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
        # a macro that is not temporary would be written to the database's file, and the salt with it
        f"TEMP MACRO user_of(x) AS {f'left(sha256({literal(salt)} || chr(0) || x), 32)' if hashed else 'x'}",
    ]


def json_cells(columns: dict[str, str]) -> str:
    """Lines of JSON (table `source`) -> cells."""
    names = list(columns)
    paths = ", ".join(literal(pointer(column)) for column in columns.values())
    cells = ", ".join(f"v[{i}] AS v_{name}, t[{i}] AS t_{name}" for i, name in enumerate(names, 1))
    # Parsed once for the texts and once for the types; never when it is no JSON, which would be an error.
    return f"""
        SELECT position, problem, left(record, 200) AS excerpt, {cells} FROM (
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
    return f"SELECT position, problem, excerpt, {cells} FROM source"


def pointer(column: str) -> str:
    """A JSON pointer: as given when it starts with a slash, else a key whatever is in it."""
    return column if column.startswith("/") else "/" + column.replace("~", "~0").replace("/", "~1")


def mapped(columns: ColumnsConfig) -> dict[str, str]:
    """Our name -> the log's."""
    return {name: value for name in type(columns).model_fields if (value := getattr(columns, name)) is not None}


def part_sql(config: MiningConfig, cells: str) -> str:
    """The query that makes a part's rows from `cells`."""
    columns = mapped(config.columns)
    shown = config.input.on_bad_row == "error"
    excerpt = "CASE WHEN problem IS NOT NULL THEN excerpt END" if shown else "NULL::VARCHAR"
    if config.columns.layout == "turns":
        return _turns_sql(columns, cells, excerpt)
    return _answers_sql(config, columns, cells, excerpt)


def _common(columns: dict[str, str]) -> str:
    user = "user_of(filled(v_user))" if "user" in columns else "NULL::VARCHAR"
    time = "sane(time_of(trim(v_time)))" if "time" in columns else "NULL::TIMESTAMP"
    model = "filled(v_model)" if "model" in columns else "NULL::VARCHAR"
    finish = "filled(v_finish)" if "finish" in columns else "NULL::VARCHAR"
    return f"{user} AS user_key, {time} AS time, {model} AS model, {finish} AS finish"


def _text_problem(name: str, *, is_answer: bool) -> str:
    """Code of what is wrong with a column that must be text."""
    wrong = f"answer_of(v_{name}, t_{name}) IS NULL" if is_answer else f"t_{name} IN ('ARRAY', 'OBJECT')"
    return f"CASE WHEN t_{name} IS NULL THEN 'no {name}' WHEN {wrong} THEN '{name} is no text' END"


def _answers_sql(config: MiningConfig, columns: dict[str, str], cells: str, excerpt: str) -> str:
    layout = config.columns.layout
    answers = {"answers": ["response"], "pairs": ["chosen", "rejected"], "rankings": []}[layout]
    answers = [name for name in answers if name in columns]
    problems = ["problem"]
    if "messages" in columns:
        turns = "turns_of(v_messages)"
        whole = layout == "answers" and "response" not in columns
        context = "turns[:-2]" if whole else "turns"
        prompt, blank = (
            "to_json(context)::VARCHAR",
            "list_bool_and(list_transform(context, lambda t: is_blank(t.content)))",
        )
        key = "to_json(list_transform(context, lambda t: {'role': t.role, 'content': norm(t.content)}))::VARCHAR"
        problems += ["CASE WHEN t_messages IS NULL THEN 'no messages' WHEN NOT are_turns(turns) THEN 'messages' END"]
        problems += ["CASE WHEN turns[-1].role <> 'assistant' THEN 'no answer' END"] if whole else []
        problems += [f"CASE WHEN ({context})[-1].role = 'assistant' THEN 'answer twice' END"]
    else:
        turns, context, whole = "NULL", "NULL", False
        text = "coalesce(v_prompt, '')"
        prompt = text if config.output.form == "text" else f"one_turn({text})"
        blank, key = f"is_blank({text})", f"one_turn(norm({text}))"
        problems += [_text_problem("prompt", is_answer=False)]
    problems += [_text_problem(name, is_answer=True) for name in answers]
    if "time" in columns:
        problems += ["CASE WHEN trim(v_time) <> '' AND sane(time_of(trim(v_time))) IS NULL THEN 'time' END"]

    ranked = "NULL"
    if layout == "pairs":
        sides = ", ".join(
            f"{{'sub': {sub}, 'completion': answer_of(v_{name}, t_{name}), 'feedback': '{name}'}}"
            for sub, name in enumerate(answers)
        )
        judged = f"[{sides}]"
    elif layout == "rankings":
        given = (
            "from_json(CASE WHEN json_valid(v_ranks) THEN v_ranks END, '[\"DOUBLE\"]')"
            if "ranks" in columns
            else "list_transform(texts, lambda x, i: i::DOUBLE)"
        )
        ranked = given
        problems += [
            "CASE WHEN t_responses IS NULL THEN 'no responses' WHEN len(texts) BETWEEN 1 AND 1000 "
            "AND list_bool_and(list_transform(texts, lambda x: coalesce(json_type(x) = 'VARCHAR', false))) "
            "AND len(ranks) = len(texts) AND list_bool_and(list_transform(ranks, lambda x: x IS NOT NULL)) "
            "THEN NULL ELSE 'ranks' END"
        ]
        # the rank among the distinct ranks: 1 of 3 is the best of three
        judged = (
            "list_transform(texts, lambda x, i: {'sub': i - 1, 'completion': x->>'$', 'feedback': "
            "(1 + len(list_distinct(list_filter(ranks, lambda r: r < ranks[i])))) || ' of ' "
            "|| len(list_distinct(ranks))})"
        )
    else:
        completion = "turns[-1].content" if whole else "answer_of(v_response, t_response)"
        judged = f"[{{'sub': 0, 'completion': {completion}, 'feedback': filled(v_feedback)}}]"
    listed = "from_json(CASE WHEN json_valid(v_responses) THEN v_responses END, '[\"JSON\"]')"
    texts = listed if layout == "rankings" else "NULL"

    # One pass, since batches come only once: a row with a problem has one judgement that is null.
    return f"""
        WITH parsed AS (SELECT *, {turns} AS turns, {texts} AS texts FROM ({cells})),
        ranked AS (SELECT *, {context} AS context, {ranked} AS ranks FROM parsed),
        checked AS (SELECT * REPLACE (coalesce({", ".join(problems)}) AS problem) FROM ranked),
        judged AS (
            SELECT position, problem, {excerpt} AS excerpt,
                CASE WHEN problem IS NULL THEN {prompt} END AS prompt,
                CASE WHEN problem IS NULL THEN key_of({key}) END AS prompt_key,
                CASE WHEN problem IS NULL THEN {blank} END AS blank,
                unnest(CASE WHEN problem IS NULL THEN {judged} ELSE [NULL] END) AS one, {_common(columns)}
            FROM checked
        )
        SELECT position, coalesce(one.sub, 0)::USMALLINT AS sub, problem, excerpt, prompt, one.completion AS completion,
            prompt_key, key_of(prompt_key::VARCHAR || norm(one.completion)) AS response_key,
            md5_number_lower(prompt || chr(0) || one.completion) AS text_key,
            blank, one.feedback::VARCHAR AS raw_feedback, user_key, time, model, finish
        FROM judged"""


def _turns_sql(columns: dict[str, str], cells: str, excerpt: str) -> str:
    turn = "try_cast(v_turn AS DOUBLE)" if "turn" in columns else "NULL::DOUBLE"
    problems = [
        "problem",
        "CASE WHEN filled(v_session) IS NULL THEN 'no session' END",
        "CASE WHEN role_of(v_role) IS NULL THEN 'role' END",
        _text_problem("text", is_answer=False),
        "CASE WHEN role_of(v_role) <> 'assistant' AND filled(v_feedback) IS NOT NULL THEN 'rated turn' END",
    ]
    if "turn" in columns:
        problems.append(f"CASE WHEN {turn} IS NULL OR NOT isfinite({turn}) THEN 'turn' END")
    if "time" in columns:
        given = "trim(v_time) <> ''" if "turn" in columns else "true"
        problems.append(f"CASE WHEN {given} AND sane(time_of(trim(v_time))) IS NULL THEN 'time' END")
    return f"""
        WITH cells AS ({cells}),
        checked AS (SELECT * REPLACE (coalesce({", ".join(problems)}) AS problem) FROM cells)
        SELECT position, 0::USMALLINT AS sub, problem, {excerpt} AS excerpt,
            CASE WHEN problem IS NULL THEN key_of(user_of(v_session)) END AS session, role_of(v_role) AS role,
            coalesce(v_text, '') AS text, {turn} AS turn, filled(v_feedback) AS raw_feedback, {_common(columns)}
        FROM checked"""

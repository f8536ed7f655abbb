"""Logs with a row a turn -> judgements of answers with the conversation before them as the prompt.

In:  the view `parts` of turns: session, role, text, turn, time, id, parent, ...; and `bad_turns`, which could not be
     read.
Out: the view `parts` of judgements, as the other layouts have it, over Parquet files in the run's folder.

A conversation may lie in several files, so this happens over all parts. Conversations are put together in as many
portions as memory asks for.

A line of turns is ordered by `turn`, or else by time; at the same place by role (system, user, tool, assistant). A turn
that was logged twice counts once. Answers that follow each other directly are one in pieces, or alternatives of which
the last one belongs to what comes after, as `turns.answers_in_a_row` says. Where turns name their parents, those above
an answer are its prompt, and no order is needed.

Conversations are whole or not at all: from a turn on that could not be read, the rated answers leave, and are counted.
Where a bad row does not say whose turn it was, it may be anybody's: then they leave from the first place on where turns
do not alternate.
"""

from pathlib import Path

import duckdb

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sql import literal, one, path_literal

_PORTION = 64 << 20
_ORDER = "CASE role WHEN 'system' THEN 0 WHEN 'developer' THEN 1 WHEN 'user' THEN 2 WHEN 'tool' THEN 3 ELSE 4 END"
_DEEPEST = 10_000  # turns above an answer, so that a circle of parents ends
BROKEN = "conversation with an unreadable turn"
_CALLS = '{"tool_calls":"JSON","tool_call_id":"VARCHAR"}'


def assemble(connection: duckdb.DuckDBPyConnection, config: MiningConfig, folder: Path) -> None:
    """Replaces the view `parts`. Raises `UserError` where the turns allow more than one reading."""
    connection.execute("ALTER VIEW parts RENAME TO turns")
    tree = config.columns.parent is not None
    if not tree:
        _check_line(connection, config)
    size = one(connection, "SELECT coalesce(sum(strlen(text)) + 200 * count(*), 0) FROM turns")[0]
    portions = max(1, min(256, int(size) // _PORTION + 1))
    place = "turn" if config.columns.turn is not None else "epoch(time)"
    _mark_damage(connection, place)
    cut, files, lost = folder / "turns", [], dict[int, int]()
    connection.execute(
        f"COPY (SELECT *, {place} AS place, (hash(session) % {portions})::INTEGER AS portion FROM turns) "
        f"TO {literal(str(cut))} "
        "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 4194304, PARTITION_BY (portion))"
    )
    for portion in range(portions):
        found = sorted((cut / f"portion={portion}").glob("*.parquet"))
        if not found:
            continue
        files.append(folder / f"judged-{portion}.parquet")
        source = f"read_parquet([{', '.join(path_literal(str(path)) for path in found)}], hive_partitioning = false)"
        rated = _above(source, config) if tree else _before(connection, source, config)
        for number, count in _leave_broken(connection, rated, files[-1]):
            lost[number] = lost.get(number, 0) + count
        for path in found:
            path.unlink()
    for number, count in lost.items():
        connection.execute(
            "INSERT INTO bad_rows SELECT file, ?, ?, '' FROM sources WHERE number = ?", [BROKEN, count, number]
        )
    listed = ", ".join(path_literal(str(path)) for path in files)
    connection.execute(f"CREATE VIEW parts AS SELECT * FROM read_parquet([{listed}], hive_partitioning = false)")
    if not one(connection, "SELECT count(*) FROM parts")[0]:
        raise UserError(_nothing(connection, config, sum(lost.values())))


def _nothing(connection: duckdb.DuckDBPyConnection, config: MiningConfig, lost: int) -> str:
    if not lost:
        return (
            f"columns.feedback ({config.columns.feedback}): no turn of the assistant has feedback: map the column that "
            "holds the thumbs"
        )
    reasons = connection.execute(
        "SELECT reason, sum(rows), any_value(example) FROM bad_rows WHERE reason <> ? GROUP BY reason ORDER BY 2 DESC",
        [BROKEN],
    ).fetchall()
    first = f": {reasons[0][2]}" if reasons else ""
    return (
        f"all {lost:,} rated answers come after a turn that is not there or could not be read{first}; repair these "
        "turns, or see what the mapping says of them"
    )


def _check_line(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Raises `UserError` where turns that are to be read as a line name their parents, and several the same."""
    (branches,) = one(
        connection,
        """SELECT count(*) FROM (
            SELECT session FROM turns WHERE id IS NOT NULL
            GROUP BY session, parent, root, role HAVING count(DISTINCT id) > 1
        ) WHERE EXISTS (SELECT 1 FROM turns WHERE parent IS NOT NULL AND NOT root)""",
    )
    if branches:
        raise UserError(
            f"{branches:,} times several turns of a conversation answer the same turn, so conversations are trees and "
            "no lines: map columns.parent and columns.id (parentMessageId and messageId, ...), or name the key of the "
            "parent in input.ignore if it is something else"
        )


def _mark_damage(connection: duckdb.DuckDBPyConnection, place: str) -> None:
    """Makes `damage` (session, from_place; null: all of it) and `unknown_damage` (one row: is there any)."""
    connection.execute(
        f"""CREATE TABLE damage AS
        SELECT session, CASE WHEN bool_or({place} IS NULL) THEN NULL ELSE min({place}) END AS from_place
        FROM bad_turns WHERE session IS NOT NULL GROUP BY session"""
    )
    connection.execute(
        "CREATE TABLE unknown_damage AS SELECT count(*) > 0 AS there_is FROM bad_turns WHERE session IS NULL"
    )


def _before(connection: duckdb.DuckDBPyConnection, source: str, config: MiningConfig) -> str:
    """SQL of the rated answers of lines of turns: before (turns), text, broken, and what the vote has."""
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE numbered AS
        SELECT t.*, dense_rank() OVER (PARTITION BY t.session ORDER BY place, {_ORDER}, md5(text), extra) AS i,
            d.session IS NOT NULL AND (d.from_place IS NULL OR place >= d.from_place) AS broken
        FROM {source} t LEFT JOIN damage d ON d.session = t.session"""
    )
    # of a run of answers, each with what it is a piece of; repetitions of an answer are that answer
    connection.execute(
        """CREATE OR REPLACE TEMP TABLE line AS
        WITH once AS (
            SELECT session, i, any_value(role) AS role, any_value(text) AS text, any_value(extra) AS extra,
                any_value(place) AS place, bool_or(raw_feedback IS NOT NULL) AS rated
            FROM numbered WHERE NOT broken GROUP BY session, i
        ),
        seen AS (
            SELECT *, lag(role) OVER w AS role_before, lag(text) OVER w AS text_before,
                lag(extra) OVER w AS extra_before
            FROM once WINDOW w AS (PARTITION BY session ORDER BY i)
        ),
        begun AS (
            -- an answer that calls tools is a turn of its own
            SELECT *, NOT coalesce(role = 'assistant' AND role_before = 'assistant'
                AND extra IS NULL AND extra_before IS NULL, false) AS begins,
                coalesce(role_before = 'assistant' AND text_before = text, false) AS repeats
            FROM seen
        )
        SELECT *, min(place) OVER (PARTITION BY session, run) AS run_place FROM (
        SELECT *, sum(begins::INTEGER) OVER (PARTITION BY session ORDER BY i) AS run,
            -- where a turn may be missing: no question before an answer, no answer between two questions
            NOT begins OR (role = 'user' AND role_before = 'user')
                OR (role = 'assistant' AND coalesce(role_before, 'system') IN ('system', 'developer')) AS odd
        FROM begun)"""
    )
    mode = config.turns.answers_in_a_row
    if mode is None:
        _check_runs(connection)
    pieces = f"string_agg(text, {literal(config.turns.joined_by)} ORDER BY i) FILTER (NOT repeats OR begins)"
    said = pieces if mode == "joined" else "arg_max(text, i)"
    # an answer of several pieces is what all of them say; of alternatives each is itself
    own = "r.text" if mode == "joined" else "n.text"
    odd_from = "CASE WHEN begins THEN place ELSE run_place END" if mode == "joined" else "place"
    return f"""
        WITH runs AS (
            SELECT session, run, min(i) AS i, any_value(role) AS role, {said} AS text, arg_max(extra, i) AS extra
            FROM line GROUP BY session, run
        ),
        talks AS (
            SELECT session, list({{'i': i, 'role': role, 'content': text, 'extra': extra}} ORDER BY i) AS turns
            FROM runs GROUP BY session
        ),
        odd AS (SELECT session, min({odd_from}) AS from_place FROM line WHERE odd GROUP BY session),
        rated AS (
            SELECT n.* EXCLUDE (text, i, broken), {own} AS text,
                list_transform(list_filter(coalesce(t.turns, []), lambda x: x.i < r.i),
                    lambda x: {{'role': x.role, 'content': x.content, 'extra': x.extra}}) AS before,
                (SELECT there_is FROM unknown_damage) AND coalesce(n.place >= o.from_place, false) AS broken
            FROM numbered n JOIN line l ON l.session = n.session AND l.i = n.i
            JOIN runs r ON r.session = n.session AND r.run = l.run
            LEFT JOIN talks t ON t.session = n.session LEFT JOIN odd o ON o.session = n.session
            WHERE NOT n.broken AND n.role = 'assistant' AND n.raw_feedback IS NOT NULL
        )
        SELECT * FROM rated UNION ALL BY NAME
        SELECT * EXCLUDE (i) FROM numbered WHERE broken AND role = 'assistant' AND raw_feedback IS NOT NULL"""


def _check_runs(connection: duckdb.DuckDBPyConnection) -> None:
    """Raises `UserError` where a rated answer, or its prompt, has answers that follow each other."""
    count, source, position = one(
        connection,
        """WITH rated AS (
            -- where a turn is missing of a conversation that is not known, there may be runs because it is missing
            SELECT session, max(run) AS run FROM line WHERE rated AND NOT (SELECT there_is FROM unknown_damage)
            GROUP BY session
        ),
        runs AS (
            SELECT l.session, min(l.i) AS i FROM line l JOIN rated r ON r.session = l.session AND l.run <= r.run
            WHERE NOT l.begins AND NOT l.repeats GROUP BY l.session
        )
        SELECT count(DISTINCT runs.session), arg_min(s.file, n.vote), min(n.position)
        FROM runs JOIN numbered n ON n.session = runs.session AND n.i = runs.i JOIN sources s ON s.number = n.source""",
    )
    if count:
        raise UserError(
            f"in {count:,} conversations an answer follows another answer directly, such as {source}:{position}: give "
            "turns.answers_in_a_row: joined if they are one answer that was sent in pieces, or alternatives if the "
            "user had it regenerated and the last one is what the conversation went on with"
        )


def _above(source: str, config: MiningConfig) -> str:
    """SQL of the rated answers of trees of turns, as `_before` has it."""
    joined = literal(config.turns.joined_by)
    # materialised: DuckDB 2.0 waits for ever where a recursion reads Parquet with one thread and none that reads ahead
    return f"""
        WITH RECURSIVE nodes AS MATERIALIZED (
            SELECT session, id, any_value(parent) AS parent, any_value(root) AS root, any_value(role) AS role,
                any_value(text) AS text, any_value(extra) AS extra
            FROM {source} WHERE id IS NOT NULL GROUP BY session, id
        ),
        votes AS MATERIALIZED (SELECT * FROM {source} WHERE role = 'assistant' AND raw_feedback IS NOT NULL),
        climb AS (
            SELECT vote, session, parent, root, 0 AS depth, NULL::VARCHAR AS role, NULL::VARCHAR AS text,
                NULL::VARCHAR AS extra FROM votes
            UNION ALL
            SELECT c.vote, c.session, n.parent, n.root, c.depth + 1, n.role, n.text, n.extra
            FROM climb c JOIN nodes n ON n.session = c.session AND n.id = c.parent WHERE c.depth < {_DEEPEST}
        ),
        paths AS (
            SELECT vote, list({{'role': role, 'content': text, 'extra': extra}} ORDER BY depth DESC)
                    FILTER (depth > 0) AS above,
                arg_max(struct_pack(parent := parent, root := root), depth) AS top
            FROM climb GROUP BY vote
        ),
        -- a message that goes on with the one above it is one answer with it
        ends AS (
            SELECT vote, coalesce(above, []) AS above,
                top.parent IS NOT NULL AND NOT coalesce(top.root, false) AS broken,
                coalesce(nullif(list_position(list_reverse(list_transform(above, lambda x: x.role <> 'assistant'
                    OR x.extra IS NOT NULL)), true), 0) - 1, len(above), 0) AS tail FROM paths
        )
        SELECT v.* EXCLUDE (text), array_to_string(list_append(list_transform(above[len(above) - tail + 1:],
                lambda x: x.content), v.text), {joined}) AS text,
            above[:len(above) - tail] AS before, broken
        FROM votes v JOIN ends USING (vote)"""


def _leave_broken(connection: duckdb.DuckDBPyConnection, rated: str, target: Path) -> list[tuple[int, int]]:
    """Writes the judgements; returns (source, how many left) of broken conversations."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE rated AS {rated}")
    connection.execute(
        f"COPY ({_judgements()}) TO {literal(str(target))} "
        "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 16777216)"
    )
    lost = connection.execute("SELECT source, count(*) FROM rated WHERE broken GROUP BY source ORDER BY 1").fetchall()
    for table in ("rated", "numbered", "line"):
        connection.execute(f"DROP TABLE IF EXISTS {table}")
    return lost


def _judgements() -> str:
    # only conversations that call tools have the keys of calls, so that the keys of all others are what they were
    plain = "list_transform(before, lambda x: {'role': x.role, 'content': x.content})"
    calls = f"list_transform(before, lambda x: from_json(coalesce(x.extra, '{{}}'), '{_CALLS}'))"
    full = (
        "list_transform(before, lambda x: {'role': x.role, 'content': x.content, "
        f"'tool_calls': from_json(coalesce(x.extra, '{{}}'), '{_CALLS}').tool_calls, "
        f"'tool_call_id': from_json(coalesce(x.extra, '{{}}'), '{_CALLS}').tool_call_id}})"
    )
    has_calls = "list_bool_or(list_transform(before, lambda x: x.extra IS NOT NULL))"
    normal = "list_transform(before, lambda x: {'role': x.role, 'content': norm(x.content)})"
    called = f"list_aggregate(list_transform({calls}, lambda x: coalesce(x.tool_calls::VARCHAR, '')), 'string_agg', '')"
    return f"""
        WITH keyed AS (
            SELECT *, CASE WHEN {has_calls} THEN to_json({full})::VARCHAR ELSE to_json({plain})::VARCHAR END AS prompt,
                key_of(to_json({normal})::VARCHAR || CASE WHEN {has_calls} THEN {called} ELSE '' END) AS prompt_key
            FROM rated WHERE NOT broken
        )
        SELECT vote, source, position, sub, prompt, text AS completion, prompt_key,
            key_of(prompt_key::VARCHAR || norm(text)) AS response_key,
            md5_number_lower(prompt || chr(0) || text) AS text_key,
            coalesce(list_bool_and(list_transform(before, lambda x: is_blank(x.content))), true) AS blank,
            raw_feedback, user_key, time, model, finish
        FROM keyed"""

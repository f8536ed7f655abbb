"""Logs with a row a turn -> judgements of answers with the conversation before them as the prompt.

In:  the view `parts` of turns: session, role, text, turn, time, ...
Out: the view `parts` of judgements, as the other layouts have it, over Parquet files in the run's folder.

A conversation may lie in several files, so this happens over all parts. Turns are ordered by `turn`, or else by time;
at the same place by role (system, user, tool, assistant). A turn that was logged twice counts once. Of answers that
follow each other directly (the user had one regenerated), only the last belongs to what comes after; each of them may
be judged, with the same prompt. Conversations are put together in as many portions as memory asks for.
"""

from pathlib import Path

import duckdb

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sql import literal, one, path_literal

_PORTION = 64 << 20
_ORDER = "CASE role WHEN 'system' THEN 0 WHEN 'developer' THEN 1 WHEN 'user' THEN 2 WHEN 'tool' THEN 3 ELSE 4 END"


def assemble(connection: duckdb.DuckDBPyConnection, config: MiningConfig, folder: Path) -> None:
    """Replaces the view `parts`."""
    connection.execute("ALTER VIEW parts RENAME TO turns")
    size = one(connection, "SELECT coalesce(sum(strlen(text)) + 200 * count(*), 0) FROM turns")[0]
    portions = max(1, min(256, int(size) // _PORTION + 1))
    cut = folder / "turns"
    connection.execute(
        f"COPY (SELECT *, (hash(session) % {portions})::INTEGER AS portion FROM turns) TO {literal(str(cut))} "
        "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 4194304, PARTITION_BY (portion))"
    )
    place = "turn" if config.columns.turn is not None else "time"
    files = []
    for portion in range(portions):
        found = sorted((cut / f"portion={portion}").glob("*.parquet"))
        if not found:
            continue
        files.append(folder / f"judged-{portion}.parquet")
        source = f"read_parquet([{', '.join(path_literal(str(path)) for path in found)}], hive_partitioning = false)"
        connection.execute(
            f"COPY ({_judgements(source, place)}) TO {literal(str(files[-1]))} "
            "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE_BYTES 16777216)"
        )
        for path in found:
            path.unlink()
    listed = ", ".join(path_literal(str(path)) for path in files)
    connection.execute(f"CREATE VIEW parts AS SELECT * FROM read_parquet([{listed}], hive_partitioning = false)")
    if not one(connection, "SELECT count(*) FROM parts")[0]:
        raise UserError(
            f"columns.feedback ({config.columns.feedback}): no turn of the assistant has feedback: map the column that "
            "holds the thumbs"
        )


def _judgements(source: str, place: str) -> str:
    return f"""
        WITH numbered AS (
            SELECT *, dense_rank() OVER (PARTITION BY session ORDER BY {place}, {_ORDER}, md5(text)) AS i FROM {source}
        ),
        once AS (SELECT session, i, any_value(role) AS role, any_value(text) AS text FROM numbered GROUP BY session, i),
        followed AS (SELECT *, lead(role) OVER (PARTITION BY session ORDER BY i) AS next FROM once),
        talks AS (
            SELECT session, list({{'i': i, 'role': role, 'content': text}} ORDER BY i) AS turns
            FROM followed WHERE NOT (role = 'assistant' AND coalesce(next = 'assistant', false)) GROUP BY session
        ),
        rated AS (
            SELECT n.*, list_transform(list_filter(coalesce(t.turns, []), lambda x: x.i < n.i),
                lambda x: {{'role': x.role, 'content': x.content}}) AS before
            FROM numbered n LEFT JOIN talks t USING (session) WHERE n.role = 'assistant' AND n.raw_feedback IS NOT NULL
        ),
        keyed AS (
            SELECT *, to_json(before)::VARCHAR AS prompt, key_of(to_json(list_transform(before,
                lambda x: {{'role': x.role, 'content': norm(x.content)}}))::VARCHAR) AS prompt_key FROM rated
        )
        SELECT vote, source, position, sub, prompt, text AS completion, prompt_key,
            key_of(prompt_key::VARCHAR || norm(text)) AS response_key,
            md5_number_lower(prompt || chr(0) || text) AS text_key,
            coalesce(list_bool_and(list_transform(before, lambda x: is_blank(x.content))), true) AS blank,
            raw_feedback, user_key, time, model, finish
        FROM keyed"""

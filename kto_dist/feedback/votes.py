"""Parts -> ballots: every judgement as a narrow row, its texts left on disk; and the bookkeeping of who leaves when.

    ballots      one row a judgement, fixed-size columns; `removed` names the step that took it, null: kept
    people       user -> user_key, where ids are not hashed
    models       number -> name of the model version
    steps        number, step, label, before, removed: what each step did to each class

    votes        a view: ballots with the user's key, the model's and the file's name and the vote's weight
    texts        a view: vote, prompt, completion

Texts stay in Parquet because they are what is larger than memory; they are no part of `votes`, since DuckDB would
join them even where a query does not ask for them. A step gets a query for the votes that it removes.
"""

import duckdb

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sql import literal, one

STEPS = (
    "no_label",
    "exact_duplicate",
    "changed_mind",
    "empty",
    "error",
    "refusal",
    "truncated",
    "script",
    "length",
    "language",
    "near_duplicate",
    "user_cap",
    "conflict",
    "balance",
    "stratify",
)
# What removes a vote or an answer for what it is.
CLEANING = STEPS[STEPS.index("exact_duplicate") : STEPS.index("near_duplicate") + 1]
MAX_MODELS = 1000


def load(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes the tables from `parts` and `words`."""
    connection.execute(f"CREATE TYPE step AS ENUM ({', '.join(map(literal, STEPS))})")
    connection.execute(
        "CREATE TABLE steps (number INTEGER, step VARCHAR, label BOOLEAN, before BIGINT, removed BIGINT)"
    )
    _make_models(connection, config)
    user = "user_key::UUID" if config.users.hash_ids else "key_of(user_key)"
    connection.execute(
        f"""CREATE TABLE ballots AS
        SELECT vote, source::UINTEGER AS source, prompt_key, response_key, text_key, words.label, raw_feedback,
            {user} AS user, time, models.number AS model, length(completion)::INTEGER AS characters,
            coalesce(finish IN ({_words(config.clean.truncated_finish)}), false) AS cut,
            CASE WHEN words.label IS NULL THEN 'no_label'::step END AS removed
        FROM parts LEFT JOIN words USING (raw_feedback) LEFT JOIN models ON models.name = parts.model"""
    )
    if not config.users.hash_ids:
        connection.execute(
            "CREATE TABLE people AS SELECT DISTINCT key_of(user_key) AS user, user_key FROM parts "
            "WHERE user_key IS NOT NULL"
        )
    total, removed = one(connection, "SELECT count(*), count(removed) FROM ballots")
    for label in (True, False, None):
        before = one(connection, "SELECT count(*) FROM ballots WHERE label IS NOT DISTINCT FROM ?::BOOLEAN", [label])[0]
        gone = before if label is None else 0
        connection.execute("INSERT INTO steps VALUES (1, 'no_label', ?, ?, ?)", [label, before, gone])
    if removed == total:
        raise UserError(
            f"not one of {total:,} votes is a thumbs up or down: check columns.feedback "
            f"({config.columns.feedback}) and the labels section"
        )


def _make_models(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    connection.execute(
        "CREATE TABLE models AS SELECT (row_number() OVER (ORDER BY name) - 1)::USMALLINT AS number, name FROM "
        f"(SELECT DISTINCT model AS name FROM parts WHERE model IS NOT NULL LIMIT {MAX_MODELS + 1})"
    )
    if one(connection, "SELECT count(*) FROM models")[0] > MAX_MODELS:
        raise UserError(
            f"columns.model ({config.columns.model}) has more than {MAX_MODELS:,} different values: that is no version "
            "of a model; map another column, or none"
        )


def _words(values: tuple[str, ...]) -> str:
    return ", ".join(map(literal, values)) or "NULL"


def remove(connection: duckdb.DuckDBPyConnection, step: str, query: str) -> int:
    """Takes the kept votes that `query` (of one column, `vote`) finds; what the step did goes to `steps`."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE leaving AS {query}")
    number = STEPS.index(step) + 1
    connection.execute(
        """INSERT INTO steps SELECT ?, ?, label, count(*), count(leaving.vote)
        FROM ballots LEFT JOIN leaving USING (vote) WHERE removed IS NULL GROUP BY label""",
        [number, step],
    )
    count = one(connection, "SELECT count(*) FROM leaving")[0]
    if count:
        connection.execute(
            f"UPDATE ballots SET removed = {literal(step)}::step FROM leaving "
            "WHERE ballots.vote = leaving.vote AND removed IS NULL"
        )
    connection.execute("DROP TABLE leaving")
    return count


def view_votes(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes `votes`, once there are weights, and `texts`."""
    user = "replace(b.user::VARCHAR, '-', '')" if config.users.hash_ids else "people.user_key"
    people = "" if config.users.hash_ids else "LEFT JOIN people ON people.user = b.user"
    connection.execute(
        f"""CREATE VIEW votes AS SELECT b.vote, b.prompt_key, b.response_key, b.label, b.raw_feedback, b.user,
            {user} AS user_key, b.time, models.name AS model, sources.file AS source, b.characters,
            b.removed::VARCHAR AS removed,
            coalesce(CASE WHEN b.label THEN w.up_weight ELSE w.down_weight END, 1.0) AS weight
        FROM ballots b
        LEFT JOIN models ON models.number = b.model
        LEFT JOIN sources ON sources.number = b.source
        LEFT JOIN user_weights w ON w.user = b.user {people}"""
    )
    connection.execute("CREATE VIEW texts AS SELECT vote, prompt, completion FROM parts")

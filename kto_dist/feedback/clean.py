"""Which votes leave before anyone's taste is looked at, step by step.

1. exact_duplicate   the same user's same judgement again; without user ids, the same judgement at the same time,
                     where the time is finer than a day
2. changed_mind      a user's earlier votes on an answer that they judged both ways; where no time tells which was
                     last, the order in the log does, and between equal times with different labels all of them leave
                     (not in pairs and rankings: who finds b worse than a and better than c has changed no mind)
3. empty ... length  by what the answer says; the first rule that matches names the step
4. language          answers that are of another language than the wanted ones (language.py)
5. near_duplicate    answers that differ in little from one with more votes (near.py)

Rules see one text an answer: texts that differ in white space alone are one answer, and its text is the one with the
smallest hash, whatever order the log is in.
"""

import duckdb

from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.language import find_other_languages
from kto_dist.feedback.near import find_near_duplicates
from kto_dist.feedback.sql import literal
from kto_dist.feedback.votes import remove

_RULES = ("empty", "error", "refusal", "truncated", "script", "length")
# Of a vote: who gave it. Without a user id, votes at the same time are one (a log that was delivered twice), if the
# time is finer than a day: all votes of a day have its date.
_WHO = "coalesce(user, CASE WHEN time::TIME <> TIME '00:00:00' THEN key_of(time::VARCHAR) END)"


def clean(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    if config.clean.exact_duplicates:
        remove(connection, "exact_duplicate", _repeated())
    if config.clean.last_vote_counts and config.columns.layout not in ("pairs", "rankings"):
        remove(connection, "changed_mind", _superseded(connection))
    _judge_texts(connection, config)
    for step in _RULES:
        remove(
            connection,
            step,
            "SELECT vote FROM ballots JOIN verdicts USING (response_key) "
            f"WHERE removed IS NULL AND verdict = {literal(step)}"
            + (" UNION SELECT vote FROM ballots WHERE removed IS NULL AND cut" if step == "truncated" else ""),
        )
    if config.clean.languages:
        find_other_languages(connection, config.clean.languages, config.clean.min_language_probability)
        remove(
            connection,
            "language",
            "SELECT vote FROM ballots JOIN other_languages USING (response_key) WHERE removed IS NULL",
        )
    if config.clean.near_duplicates is not None:
        find_near_duplicates(connection, config.clean.near_duplicates, config.clean.near_duplicate_scope)
        remove(
            connection,
            "near_duplicate",
            "SELECT vote FROM ballots JOIN near_duplicates USING (response_key) WHERE removed IS NULL",
        )


def _repeated() -> str:
    # the last of equal judgements stays: it is the one that counts against a change of mind in between
    return f"""
        WITH doubled AS (
            SELECT response_key, label, {_WHO} AS who FROM ballots
            WHERE removed IS NULL AND {_WHO} IS NOT NULL GROUP BY ALL HAVING count(*) > 1
        )
        SELECT vote FROM (
            SELECT vote, row_number() OVER (PARTITION BY b.response_key, b.label, who
                ORDER BY time DESC NULLS LAST, vote DESC) AS place
            FROM ballots b JOIN doubled d ON b.response_key = d.response_key AND b.label = d.label AND {_WHO} = d.who
            WHERE removed IS NULL
        ) WHERE place > 1"""


def _superseded(connection: duckdb.DuckDBPyConnection) -> str:
    return """
        WITH torn AS (
            SELECT response_key, user FROM ballots WHERE removed IS NULL AND user IS NOT NULL
            GROUP BY ALL HAVING bool_or(label) AND NOT bool_and(label)
        ),
        theirs AS (SELECT b.* FROM ballots b JOIN torn USING (response_key, user) WHERE removed IS NULL),
        last AS (
            SELECT response_key, user, max(time) AS time, bool_and(time IS NULL) AS timeless, max(vote) AS vote
            FROM theirs GROUP BY ALL
        ),
        at_last AS (
            SELECT t.response_key, t.user, t.vote, t.label FROM theirs t JOIN last l USING (response_key, user)
            WHERE CASE WHEN l.timeless THEN t.vote = l.vote ELSE t.time = l.time END
        ),
        decided AS (
            SELECT response_key, user FROM at_last GROUP BY ALL HAVING bool_or(label) = bool_and(label)
        )
        SELECT vote FROM theirs WHERE vote NOT IN (SELECT vote FROM at_last JOIN decided USING (response_key, user))"""


def _judge_texts(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes `verdicts`: response_key -> the first rule that its text breaks, for those that break one."""
    rules = config.clean
    verdict = " ".join(
        f"WHEN {condition} THEN {literal(step)}"
        for step, condition in (
            ("empty", "blank OR is_blank(completion)" if rules.empty else "blank"),
            ("error", _any_match(rules.errors)),
            ("refusal", _any_match(rules.refusals)),
            ("truncated", _any_match(rules.truncated)),
            ("script", _other_scripts(config)),
            ("length", _out_of_bounds(config)),
        )
    )
    _make_responses(connection)
    connection.execute(
        f"""CREATE TABLE verdicts AS SELECT response_key, verdict FROM (
            SELECT r.response_key, CASE {verdict} END AS verdict
            FROM parts JOIN responses r ON parts.vote = r.representative
        ) WHERE verdict IS NOT NULL"""
    )


def _make_responses(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes `responses`: each answer that still has votes, and the vote whose text stands for it."""
    connection.execute(
        """CREATE TABLE responses AS
        SELECT response_key, any_value(prompt_key) AS prompt_key, arg_min(vote, text_key) AS representative
        FROM ballots WHERE removed IS NULL GROUP BY response_key"""
    )


def _any_match(patterns: tuple[str, ...]) -> str:
    return " OR ".join(f"regexp_matches(completion, {literal(pattern)})" for pattern in patterns) or "false"


def _other_scripts(config: MiningConfig) -> str:
    """Too few of the letters belong to the scripts; an answer without letters belongs to any."""
    if not config.clean.scripts:
        return "false"
    wanted = "".join(rf"\p{{{script}}}" for script in config.clean.scripts)
    letters = r"length(regexp_replace(completion, '\P{L}+', '', 'g'))"
    theirs = rf"length(regexp_replace(regexp_replace(completion, '\P{{L}}+', '', 'g'), '[^{wanted}]+', '', 'g'))"
    return f"{letters} > 0 AND {theirs} < {config.clean.min_script_share!r} * {letters}"


def _out_of_bounds(config: MiningConfig) -> str:
    most = config.clean.max_characters
    return f"length(completion) < {config.clean.min_characters}" + (
        "" if most is None else f" OR length(completion) > {most}"
    )

"""The pipeline's tables -> figures about the feedback and the dataset that came of it, and what is wrong with them.

In:  a DuckDB connection with `votes`, `texts`, `steps` and `examples`, and the config that made them.
Out: `Audit`, which becomes `audit.json` (docs/audit.md says what each key means) and `report.html`.

1. judgements    votes that a person meant: labelled, on a real answer, one a user and answer
2. voices        of them, one for each user of each response that several users judged -> agreement
3. users         votes and downvotes by user -> concentration, heavy downvoters, shares of the loss
4. the rest      steps, balance, drift, lengths, conflicts
5. checks        each figure against its threshold

Taste and agreement are those of judgements, before caps and majorities act on them. Texts are read only for the few
samples; everything else is sums over narrow columns, so that the audit's memory is that of its group-bys, which spill.
The same tables give the same bytes: nothing here depends on the clock.
"""

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np

from kto_dist import __version__
from kto_dist.feedback.agreement import (
    Agreement,
    Estimate,
    agreement_of,
    intervals,
    share_of_good,
    unanimity,
    wrong_labels,
)
from kto_dist.feedback.checks import checks_of
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.content import conflicts_of, lengths_of, steps_of
from kto_dist.feedback.drift import Balance, Classes, balance_of, drift_of
from kto_dist.feedback.findings import VERSION, Audit, File, Log
from kto_dist.feedback.influence import TABLES, users_of
from kto_dist.feedback.sql import one
from kto_dist.feedback.votes import STEPS

# Votes that these steps removed are no person's judgement of a real answer, or not that person's last one. Those after
# them look at how answers and users stand to one another.
NO_JUDGEMENT = STEPS[: STEPS.index("language") + 1]
# These choose among answers by their votes.
_CHOICES = STEPS[STEPS.index("conflict") :]
_TABLES = ("voices", "audit_conflicts", *TABLES)


def audit(
    connection: duckdb.DuckDBPyConnection,
    config: MiningConfig,
    *,
    files: Sequence[File] = (),
    settings: dict[str, Any] | None = None,  # to be shown; must not hold the salt
) -> Audit:
    """All figures of the tables. Reads them only, apart from temporary tables of its own."""
    try:
        _define(connection)
        balance = _balance(connection, config)
        users = users_of(connection, config, balance)
        agreed = _agreement(connection, config, has_users=users is not None)
        drift = drift_of(
            _counts(connection, "CAST(time AS DATE)"),
            _counts(connection, "model"),
            significance=config.audit.significance,
        )
        lengths, steps = lengths_of(connection, config.audit.max_one_length), steps_of(connection)
        conflicts = conflicts_of(connection, config.audit.samples)
        return Audit(
            version=VERSION,
            kto_dist=__version__,
            files=tuple(files),
            checks=checks_of(
                agreement=agreed,
                users=users,
                balance=balance,
                drift=drift,
                lengths=lengths,
                steps=steps,
                config=config,
            ),
            log=_log(connection),
            steps=steps,
            balance=balance,
            agreement=agreed,
            users=users,
            drift=drift,
            lengths=lengths,
            conflicts=conflicts,
            user_ids_hashed=config.users.hash_ids,
            settings=settings or {},
        )
    finally:
        connection.execute("DROP VIEW IF EXISTS judgements")
        for name in _TABLES:
            connection.execute(f"DROP TABLE IF EXISTS {name}")


def _define(connection: duckdb.DuckDBPyConnection) -> None:
    """`judgements`, and `voices`: a user's last vote on a response; without users each vote is another's."""
    connection.execute(
        'CREATE OR REPLACE TEMP VIEW judgements AS SELECT vote, prompt_key, response_key, label, "user", time, model '
        f"FROM votes WHERE label IS NOT NULL AND (removed IS NULL OR removed NOT IN {NO_JUDGEMENT})"
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE voices AS "
        "SELECT response_key, \"user\", arg_max(label, (coalesce(time, TIMESTAMP '0001-01-01'), vote)) AS label "
        "FROM judgements SEMI JOIN "
        "(SELECT response_key FROM judgements GROUP BY 1 HAVING count(*) > 1) AS shared USING (response_key) "
        'GROUP BY response_key, "user", CASE WHEN "user" IS NULL THEN vote END'
    )


def _counts(connection: duckdb.DuckDBPyConnection, key: str) -> list[tuple[Any, int, int]]:
    return connection.execute(
        f"SELECT {key}, count(*) FILTER (label), count(*) FILTER (NOT label) FROM judgements GROUP BY 1 ORDER BY 1"
    ).fetchall()


def _log(connection: duckdb.DuckDBPyConnection) -> Log:
    votes, kept, files = one(
        connection, "SELECT count(*), count(*) FILTER (removed IS NULL), count(DISTINCT source) FROM votes"
    )
    judgements, users, prompts, responses = one(
        connection,
        'SELECT count(*), count(DISTINCT "user"), count(DISTINCT prompt_key), count(DISTINCT response_key) '
        "FROM judgements",
    )
    known = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    bad = "SELECT reason, sum(rows)::BIGINT FROM bad_rows GROUP BY reason ORDER BY 2 DESC, reason"
    unreadable = dict(connection.execute(bad).fetchall()) if "bad_rows" in known else {}
    more = "SELECT name, sum(rows)::BIGINT FROM noticed GROUP BY name ORDER BY 2 DESC, name"
    unused = dict(connection.execute(more).fetchall()) if "noticed" in known else {}
    return Log(
        votes=votes,
        unreadable=sum(unreadable.values()),
        unreadable_by_reason=unreadable,
        unused=unused,
        judgements=judgements,
        kept=kept,
        users=users,
        prompts=prompts,
        responses=responses,
        files=files,
    )


def _balance(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> Balance:
    def classes(table: str, where: str = "true") -> Classes:
        query = f"SELECT count(*) FILTER (label), count(*) FILTER (NOT label) FROM {table} WHERE {where}"
        return Classes.of(*one(connection, query))

    weights = one(
        connection,
        "SELECT coalesce(sum(weight * probability), 0)::DOUBLE, coalesce(sum(weight * (1 - probability)), 0)::DOUBLE "
        "FROM examples WHERE split = 'train'",
    )
    return balance_of(
        labelled=classes("votes"),
        judgements=classes("judgements"),
        dataset=classes("examples"),
        train=classes("examples", "split = 'train'"),
        weights=tuple(round(weight, 6) for weight in weights),
        deployment_up_share=config.balance.deployment_up_share,
    )


def _agreement(connection: duckdb.DuckDBPyConnection, config: MiningConfig, *, has_users: bool) -> Agreement:
    def units(where: str) -> np.ndarray:
        """(M, 3): votes, votes up, responses that have these."""
        found = connection.execute(
            "SELECT n, k, count(*) AS responses FROM (SELECT count(*) AS n, count(*) FILTER (label) AS k FROM voices "
            f"WHERE {where} GROUP BY response_key HAVING n > 1) GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    everyone = units("true")
    alpha, differ, noise = agreement_of(everyone)
    alpha_range, noise_range = intervals(everyone, config.audit.resamples)
    without = agreement_of(units('"user" IS NULL OR "user" NOT IN (SELECT "user" FROM audit_critics)'))
    has_critics = one(connection, "SELECT count(*) FROM audit_critics")[0] > 0
    rows = connection.execute(
        "SELECT votes_up, votes_down, probability, sum(weight) FROM examples GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    users = one(connection, 'SELECT count(DISTINCT "user") FROM voices')[0]
    wrong = None
    if noise is not None and rows:
        good = share_of_good(_tallies(connection), noise)
        wrong = wrong_labels(np.array(rows, dtype=float), noise, good)
    return Agreement(
        responses=int(everyone[:, 2].sum()),
        votes=int((everyone[:, 0] * everyone[:, 2]).sum()),
        users=users if has_users else None,
        split=int(everyone[(everyone[:, 1] > 0) & (everyone[:, 1] < everyone[:, 0]), 2].sum()),
        alpha=_estimate(alpha, alpha_range),
        disagreement=differ,
        noise=_estimate(noise, noise_range),
        best_accuracy=None if noise is None else 1 - noise,
        wrong_labels=wrong,
        alpha_without_critics=without[0] if has_critics else None,
        noise_without_critics=without[2] if has_critics else None,
        by_votes=unanimity(everyone),
    )


def _tallies(connection: duckdb.DuckDBPyConnection) -> np.ndarray:
    """(M, 3): votes up, votes down, and how many responses have these, before rows were chosen by votes or label."""
    found = connection.execute(
        "SELECT up, down, count(*) FROM (SELECT count(*) FILTER (label) AS up, count(*) FILTER (NOT label) AS down "
        f"FROM votes WHERE removed IS NULL OR removed IN {_CHOICES} GROUP BY response_key) "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _estimate(value: float | None, bounds: tuple[float, float] | None) -> Estimate | None:
    if value is None or bounds is None:
        return None
    return Estimate(value=value, low=min(value, bounds[0]), high=max(value, bounds[1]))

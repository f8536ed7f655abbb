"""Whose taste the dataset is: votes and downvotes by user, heavy downvoters, shares of the loss before and after.

In:  the audit's `judgements` and `voices`, and the pipeline's `votes` and `examples`.
Out: `Users`; and `audit_critics`, the users named as heavy downvoters, for whoever looks at the votes without them.
"""

import duckdb
import numpy as np
import pyarrow as pa

from kto_dist.base.class_weights import class_weights
from kto_dist.feedback.concentration import Named, User, Users, gini, heavy_downvoters, lorenz, rate, top_shares
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.drift import Balance
from kto_dist.feedback.sql import one

TABLES = ("audit_users", "audit_after", "audit_loss", "audit_listed", "audit_critics")
_NAMED_LISTED, _OTHERS_LISTED = 200, 20


def users_of(connection: duckdb.DuckDBPyConnection, config: MiningConfig, balance: Balance) -> Users | None:
    connection.execute(
        'CREATE OR REPLACE TEMP TABLE audit_users AS SELECT "user", count(*) AS votes, '
        'count(*) FILTER (NOT label) AS down FROM judgements WHERE "user" IS NOT NULL GROUP BY 1'
    )
    found = connection.execute(
        "SELECT votes, down, count(*) AS users FROM audit_users GROUP BY ALL ORDER BY ALL"
    ).fetchnumpy()
    votes, down, users = (np.asarray(found[name]).astype(np.int64) for name in ("votes", "down", "users"))
    connection.execute('CREATE OR REPLACE TEMP TABLE audit_critics ("user" UUID)')
    if not len(votes):
        return None

    named = _name(connection, config, votes, down, users)
    has_after, nameless_before, nameless_after = _losses(connection, balance)

    total, downs = int((votes * users).sum()), int((down * users).sum())
    facts = one(
        connection,
        "SELECT 1 / (sum(before * before) + $before), 1 / nullif(sum(after * after) + $after, 0), max(after), "
        "count(*) FILTER (named), "
        "coalesce(sum(votes) FILTER (named), 0)::BIGINT, coalesce(sum(down) FILTER (named), 0)::BIGINT, "
        "coalesce(sum(before) FILTER (named), 0), coalesce(sum(after) FILTER (named), 0) FROM audit_loss",
        {"before": nameless_before, "after": nameless_after},
    )
    effective, effective_after, largest, count, named_votes, named_down, named_before, named_after = facts
    return Users(
        users=int(users.sum()),
        votes=total,
        votes_without_user=balance.judgements.up + balance.judgements.down - total,
        gini_votes=gini(votes, users),
        gini_downvotes=gini(down, users),
        effective_before=round(effective, 6),
        effective_after=round(effective_after, 6) if has_after else None,
        top_votes=top_shares(votes, users),
        top_downvotes=top_shares(down, users),
        lorenz_votes=lorenz(votes, users),
        lorenz_downvotes=lorenz(down, users),
        usual_down_rate=named.rate,
        spread_of_rates=named.spread,
        largest_loss_after=round(largest, 9) if has_after else None,
        named=count,
        named_votes=named_votes / total,
        named_downvotes=named_down / downs if downs else 0.0,
        named_loss_before=round(named_before, 9),
        named_loss_after=round(named_after, 9) if has_after else None,
        top=_top_users(connection, total, downs),
    )


def _name(
    connection: duckdb.DuckDBPyConnection, config: MiningConfig, votes: np.ndarray, down: np.ndarray, users: np.ndarray
) -> Named:
    """Adds `p` and `named` to `audit_users`, and the named to `audit_critics`."""
    limits = config.audit
    named = heavy_downvoters(votes, down, users, min_votes=limits.min_votes, level=limits.false_names)
    pairs = pa.table({"votes": votes, "down": down, "p": np.nan_to_num(named.p_values, nan=-1.0), "named": named.flags})
    connection.register("audit_pairs", pairs)
    try:
        connection.execute(
            "CREATE OR REPLACE TEMP TABLE audit_users AS SELECT u.*, p.p, p.named FROM audit_users AS u "
            "JOIN audit_pairs AS p USING (votes, down)"
        )
    finally:
        connection.unregister("audit_pairs")
    connection.execute('INSERT INTO audit_critics SELECT "user" FROM audit_users WHERE named')
    return named


def _losses(connection: duckdb.DuckDBPyConnection, balance: Balance) -> tuple[bool, float, float]:
    """`audit_loss`: users with their share of the loss before and after; whether any user is left after.

    The shares are of all loss, that of votes without a user included; returned with it are the sums of the squared
    shares of such votes before and after, each vote counting as another user's.

    At the start of training a row's loss is half of its weight times its class weight (every reward is 0), so shares of
    weight are shares of loss. After, it is the rows of the training split; a row's weight belongs to the votes it rests
    on, by the votes' weights.
    """
    judged = balance.judgements
    down_before, up_before = class_weights(judged.up, judged.down) if judged.up and judged.down else (1.0, 1.0)
    connection.execute(
        """CREATE OR REPLACE TEMP TABLE audit_after AS
        WITH kept AS (SELECT response_key, label, "user", weight FROM votes WHERE removed IS NULL),
        -- kept votes have the label of their row, and a response has one row
        mass AS (
            SELECT response_key, any_value(e.weight) / nullif(sum(kept.weight), 0) AS each
            FROM kept JOIN examples AS e USING (response_key) WHERE e.split = 'train' GROUP BY 1
        ),
        single AS (
            SELECT "user", mass.each * kept.weight * if(kept.label, $up, $down) AS mass
            FROM kept JOIN mass USING (response_key)
        )
        -- one row for all votes without a user
        SELECT "user", coalesce(sum(mass), 0) AS mass, coalesce(sum(mass * mass), 0) AS squares
        FROM single GROUP BY 1""",
        {"up": balance.desirable_weight or 1.0, "down": balance.undesirable_weight or 1.0},
    )
    total = judged.up * up_before + judged.down * down_before
    connection.execute(
        """CREATE OR REPLACE TEMP TABLE audit_loss AS
        SELECT u.*, ((u.votes - u.down) * $up + u.down * $down) / $total AS before,
            coalesce(a.mass / nullif((SELECT sum(mass) FROM audit_after), 0), 0) AS after
        FROM audit_users AS u LEFT JOIN audit_after AS a USING ("user")""",
        {"up": up_before, "down": down_before, "total": total},
    )
    squares, total_after = one(
        connection,
        'SELECT coalesce(sum(squares) FILTER ("user" IS NULL), 0), coalesce(sum(mass), 0) FROM audit_after',
    )
    named, ups = one(
        connection,
        "SELECT coalesce(sum(votes), 0)::BIGINT, coalesce(sum(votes - down), 0)::BIGINT FROM audit_users",
    )
    nameless_up, nameless_down = judged.up - ups, judged.down - (named - ups)
    return (
        one(connection, "SELECT sum(after) > 0 FROM audit_loss")[0],
        (nameless_up * up_before**2 + nameless_down * down_before**2) / total**2,
        squares / total_after**2 if total_after else 0.0,
    )


def _top_users(connection: duckdb.DuckDBPyConnection, total: int, downs: int) -> tuple[User, ...]:
    connection.execute(
        """CREATE OR REPLACE TEMP TABLE audit_listed AS SELECT * FROM audit_loss
        QUALIFY row_number() OVER (PARTITION BY named ORDER BY greatest(before, after) DESC, "user")
            <= if(named, ?, ?)""",
        [_NAMED_LISTED, _OTHERS_LISTED],
    )
    rows = connection.execute(
        """WITH names AS (
            SELECT "user", any_value(user_key) AS name FROM votes SEMI JOIN audit_listed USING ("user") GROUP BY 1
        ),
        others AS (
            SELECT m."user", m.response_key, count(*) FILTER (o.label) AS up, count(*) FILTER (NOT o.label) AS down
            FROM voices AS m SEMI JOIN audit_listed USING ("user")
            JOIN voices AS o ON o.response_key = m.response_key AND o."user" IS DISTINCT FROM m."user"
            WHERE NOT m.label GROUP BY ALL
        ),
        overruled AS (SELECT "user", avg(if(up > down, 1, 0)) AS share FROM others WHERE up <> down GROUP BY 1)
        SELECT name, votes, down, p, named, before, after, share
        FROM audit_listed JOIN names USING ("user") LEFT JOIN overruled USING ("user")
        ORDER BY named DESC, greatest(before, after) DESC, name"""
    ).fetchall()
    return tuple(
        User(
            user=user,
            votes=votes,
            downvotes=down,
            share_of_votes=votes / total,
            share_of_downvotes=down / downs if downs else 0.0,
            down_rate=rate(down, votes),
            p_value=p if p >= 0 else None,
            named=named,
            overruled=overruled,
            loss_before=round(before, 9),
            loss_after=round(after, 9),
        )
        for user, votes, down, p, named, before, after, overruled in rows
    )

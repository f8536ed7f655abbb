"""Whose taste: a cap on each user's votes, and weights that keep a few users from steering the model.

A kept vote of user u for class y (up or down) weighs

    w(u, y)      = volume(u) * bias(u, y)
    volume(u)    = min(1, fair / n_u) ^ users.volume
    bias(u, y)   = min(1, p_y / p_uy) ^ users.bias
    p_uy         = (n_uy + users.prior_votes * p_y) / (n_u + users.prior_votes)

with n_u the kept votes of u, n_uy those for class y, fair = users.fair_votes or the median n_u, and p_y everyone's
share of class y, where user u counts min(1, fair / n_u) ^ users.volume a vote.

Volume: above fair, all votes of a user together weigh n_u ^ (1 - volume) * fair ^ volume: with 0.5, a user of 100 times
as many votes counts 10 times as much. Bias: who dislikes nearly everything tells little by yet another dislike; such
votes weigh as if the user disliked as often as everyone, and the user's rare likes keep their weight. Votes without a
user weigh 1.
"""

import duckdb

from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.votes import remove


def cap(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Leaves each user's `users.max_votes` votes with the smallest keys: a draw that time has no part in."""
    most = config.users.max_votes
    if most is None:
        return
    remove(
        connection,
        "user_cap",
        f"""WITH heavy AS (
            SELECT user FROM ballots WHERE removed IS NULL AND user IS NOT NULL GROUP BY user HAVING count(*) > {most}
        )
        SELECT vote FROM (
            SELECT vote, row_number() OVER (PARTITION BY user ORDER BY response_key, label, time, vote) AS place
            FROM ballots JOIN heavy USING (user) WHERE removed IS NULL
        ) WHERE place > {most}""",
    )


def weigh(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes `user_weights`: user, up_weight, down_weight."""
    users = config.users
    fair = "(SELECT median(n) FROM counted)" if users.fair_votes is None else f"{users.fair_votes}::DOUBLE"
    prior = float(users.prior_votes)
    connection.execute(
        f"""CREATE TABLE user_weights AS
        WITH counted AS (
            SELECT user, count(*) AS n, count(*) FILTER (label) AS up, count(*) FILTER (NOT label) AS down
            FROM ballots WHERE removed IS NULL AND user IS NOT NULL GROUP BY user
        ),
        sized AS (SELECT *, least(1, {fair} / n) ^ {users.volume!r}::DOUBLE AS volume FROM counted),
        everyone AS (
            -- sums of doubles depend on the order: rounded, so that a run is equal to itself on other threads
            SELECT round(sum(volume * up) / sum(volume * n), 9) AS up FROM sized
        ),
        shares AS (
            SELECT user, volume, everyone.up AS p,
                CASE WHEN n + {prior!r} > 0 THEN (sized.up + {prior!r} * everyone.up) / (n + {prior!r}) END AS own
            FROM sized, everyone
        )
        SELECT user,
            volume * least(1, CASE WHEN own > 0 THEN p / own ELSE 1 END) ^ {users.bias!r}::DOUBLE AS up_weight,
            volume * least(1, CASE WHEN own < 1 THEN (1 - p) / (1 - own) ELSE 1 END) ^ {users.bias!r}::DOUBLE
                AS down_weight
        FROM shares"""
    )

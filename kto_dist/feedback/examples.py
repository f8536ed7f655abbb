"""Kept votes -> rows to train on: one an answer, with its label, weight and split.

1. tallies      an answer's votes by class, in number and in weight
2. conflict     answers judged both ways: the clear majority's label, or none, or a weight by the margin, or both labels
3. balance      rows of the larger class leave until a stated ratio is reached, in each split for itself
4. stratify     without a stated ratio, held-out rows of the larger class leave until it has the training rows' ratio,
                or until half of the held-out rows are left
5. examples     a view of the rows; `vote` leads to their texts

A row's weight is the mean weight of the votes for its label; with `agreement.conflicts: keep` times the margin
|up - down| / (up + down) of all votes' weights. With `agreement.conflicts: soft` it is the mean weight of all votes,
`probability` is the share of thumbs up among their weights, `label`, which the steps below count by, is the likelier
one, and no vote leaves. Whether a prompt is held out is a function of its key and
`split.seed` alone: no growth of the log moves it. That holds each class out by the stated share up to chance; what is
left of chance is evened out by leaving held-out rows away, since moving prompts would bring held-out ones to training.
"""

import duckdb

from kto_dist.base.errors import UserError
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.sql import one
from kto_dist.feedback.votes import remove

_MASK_BITS = 60
# Of a split's rows, what stratify leaves at least. With 95 thumbs up and 2 down held out, chance moves the ratio by
# more than the step repairs, and evaluation gives accuracies by class anyway: rows are then worth more than the ratio.
_LEAST_LEFT = 0.5


def tally(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Makes `rows`, and takes the votes that lost."""
    models = one(connection, "SELECT count(*) FROM models")[0]
    masks = "".join(
        f", bit_or(CASE WHEN model BETWEEN {first} AND {first + _MASK_BITS - 1} THEN 1::UBIGINT << (model - {first}) "
        f"ELSE 0::UBIGINT END) AS models_{first}"
        for first in range(0, models, _MASK_BITS)
    )
    # Weights are summed as integers: sums of doubles would depend on the order in which threads come by.
    weight = "(coalesce(CASE WHEN label THEN up_weight ELSE down_weight END, 1) * 1e9)::BIGINT"
    connection.execute(
        f"""CREATE TABLE tallies AS
        SELECT response_key, any_value(prompt_key) AS prompt_key, arg_min(vote, text_key) AS representative,
            arg_min(characters, text_key) AS characters, 
            count(*) FILTER (label) AS up, count(*) FILTER (NOT label) AS down,
            coalesce(sum({weight}) FILTER (label), 0)::DOUBLE / 1e9 AS up_weight,
            coalesce(sum({weight}) FILTER (NOT label), 0)::DOUBLE / 1e9 AS down_weight,
            count(DISTINCT user) AS users, min(time) AS first_time, max(time) AS last_time{masks}
        FROM ballots LEFT JOIN user_weights USING (user) WHERE removed IS NULL GROUP BY response_key"""
    )
    both = "up > 0 AND down > 0"
    margin = "abs(up_weight - down_weight) / (up_weight + down_weight)"
    agreement = config.agreement
    clear = {
        "majority": f"up + down >= {agreement.min_votes} AND {margin} >= {agreement.min_margin!r} AND {margin} > 0",
        "drop": "false",
        "keep": f"{margin} > 0",
        "soft": "true",
    }[agreement.conflicts]
    soft = agreement.conflicts == "soft"
    weight = "CASE WHEN up_weight > down_weight THEN up_weight / up ELSE down_weight / down END"
    if agreement.conflicts == "keep":
        weight = f"{weight} * CASE WHEN {both} THEN {margin} ELSE 1 END"
    if soft:
        weight = "(up_weight + down_weight) / (up + down)"
    probability = "CASE WHEN up_weight > down_weight THEN 1.0 ELSE 0.0 END"
    if soft:
        share = "coalesce(up_weight / nullif(up_weight + down_weight, 0), 0.5)"
        probability = f"CASE WHEN up = 0 THEN 0.0 WHEN down = 0 THEN 1.0 ELSE {share} END"
    connection.execute(
        f"""CREATE TABLE rows AS
        SELECT * EXCLUDE (decided), CASE WHEN decided THEN probability >= 0.5 END AS label, {weight} AS weight,
            CASE WHEN {_heldout(config)} THEN 'heldout' ELSE 'train' END AS split
        FROM (
            SELECT *, NOT ({both}) OR ({clear}) AS decided, ({probability})::DOUBLE AS probability FROM tallies
        )"""
    )
    remove(
        connection,
        "conflict",
        "SELECT vote FROM ballots b JOIN rows r USING (response_key) "
        f"WHERE removed IS NULL AND (r.label IS NULL OR {'false' if soft else 'b.label <> r.label'})",
    )
    connection.execute("DELETE FROM rows WHERE label IS NULL")
    connection.execute("DROP TABLE tallies")


def _heldout(config: MiningConfig) -> str:
    # the top 53 bits: a double holds them exactly
    drawn = f"(md5_number_lower('{config.split.seed} ' || prompt_key::VARCHAR) >> 11)::DOUBLE / 9007199254740992.0"
    return f"{drawn} < {config.split.heldout!r}"


def balance(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Takes rows of the class of which there are too many; the smallest keys stay.

    Raises `UserError` where a split has one class alone, of which no sample has the ratio.
    """
    share = config.balance.target_up_share
    if share is not None:
        for split, label, count in connection.execute(
            "SELECT split, any_value(label), count(*) FROM rows GROUP BY split "
            "HAVING count(DISTINCT label) = 1 ORDER BY split DESC"
        ).fetchall():
            raise UserError(
                f"balance.target_up_share ({share}) needs rows of both classes in each split, and the {count:,} "
                f"{'held out' if split == 'heldout' else 'to train on'} are all thumbs {'up' if label else 'down'}: "
                "leave it out (null) to keep all rows, loosen the steps that took the other class, change "
                "split.heldout (0: hold nothing out), or give a longer log"
            )
        _thin(connection, "balance", f"SELECT *, {share / (1 - share)!r} AS up_per_down FROM counted")


def stratify(connection: duckdb.DuckDBPyConnection, config: MiningConfig) -> None:
    """Takes held-out rows of the class that has more of them than in training; the smallest keys stay.

    At least half of the held-out rows stay, whatever ratio that leaves. Where a split has one class alone there is no
    ratio to reach, and everything stays.
    """
    if config.split.stratify and config.balance.target_up_share is None:
        _thin(
            connection,
            "stratify",
            """SELECT h.*, t.up::DOUBLE / t.down AS up_per_down FROM counted h, counted t
            WHERE h.split = 'heldout' AND t.split = 'train' AND least(h.up, h.down, t.up, t.down) > 0""",
            least_left=_LEAST_LEFT,
        )


def _thin(connection: duckdb.DuckDBPyConnection, step: str, ratios: str, least_left: float = 0.0) -> None:
    """Takes rows by a query over `counted` (split, up, down) that adds the wanted `up_per_down` of some splits.

    Those splits have rows of both classes, and keep some of each. Only one class of a split has too many rows.
    """
    least = f"ceil({least_left!r} * (up + down))"
    connection.execute(
        f"""CREATE TEMP TABLE surplus AS
        WITH counted AS (
            SELECT split, count(*) FILTER (label) AS up, count(*) FILTER (NOT label) AS down FROM rows GROUP BY split
        ),
        wanted AS (
            SELECT split, least(up, greatest(1, round(down * up_per_down), {least} - down)) AS up,
                least(down, greatest(1, round(up / up_per_down), {least} - up)) AS down
            FROM ({ratios})
        )
        SELECT response_key FROM (
            SELECT response_key, label, split,
                row_number() OVER (PARTITION BY split, label ORDER BY response_key) AS place
            FROM rows
        ) JOIN wanted USING (split) WHERE place > CASE WHEN label THEN up ELSE down END"""
    )
    remove(connection, step, "SELECT vote FROM ballots JOIN surplus USING (response_key) WHERE removed IS NULL")
    connection.execute("DELETE FROM rows WHERE response_key IN (SELECT response_key FROM surplus)")
    connection.execute("DROP TABLE surplus")


def view_examples(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes `examples`."""
    names = [name for (name,) in connection.execute("SELECT name FROM models ORDER BY number").fetchall()]
    pieces = []
    for first in range(0, len(names), _MASK_BITS):
        numbers = f"range({first}, {min(first + _MASK_BITS, len(names))})"
        pieces.append(f"list_filter({numbers}, lambda m: (models_{first} >> (m - {first}) & 1) = 1)")
    numbers = "[]::BIGINT[]" if not pieces else pieces[0] if len(pieces) == 1 else f"list_concat({', '.join(pieces)})"
    connection.execute("CREATE TABLE model_names AS SELECT list(name ORDER BY number) AS names FROM models")
    connection.execute(
        f"""CREATE VIEW examples AS
        SELECT r.representative AS vote, r.label, r.probability, r.weight, r.split, r.up AS votes_up,
            r.down AS votes_down, r.users, r.first_time, r.last_time,
            list_transform({numbers}, lambda m: model_names.names[m + 1]) AS models, r.prompt_key, r.response_key,
            r.characters
        FROM rows r CROSS JOIN model_names"""
    )

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

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kto_dist.base.class_weights import class_weights
from kto_dist.base.files import sha256_of, write_whole
from kto_dist.feedback import agreement, concentration
from kto_dist.feedback.agreement import Agreement, Estimate
from kto_dist.feedback.checks import Check, checks_of
from kto_dist.feedback.concentration import User, Users
from kto_dist.feedback.content import Conflicts, Lengths, StepCounts, conflicts_of, lengths_of, steps_of
from kto_dist.feedback.drift import Balance, Classes, Drift, balance_of, drift_of
from kto_dist.feedback.votes import STEPS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from kto_dist.feedback.config import MiningConfig

# Of audit.json: raise it when a key changes its meaning or goes away.
VERSION = 1

# Votes that these steps removed are no person's judgement of a real answer, or not that person's last one. Those after
# them look at how answers and users stand to one another.
NO_JUDGEMENT = STEPS[: STEPS.index("language") + 1]
# These choose among answers by their votes.
_CHOICES = STEPS[STEPS.index("conflict") :]
_NAMED_LISTED, _OTHERS_LISTED = 200, 20
_TABLES = ("voices", "audit_users", "audit_after", "audit_loss", "audit_listed", "audit_critics", "audit_conflicts")


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that the audit describes."""

    name: str
    split: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """What was read."""

    votes: int
    # readable ones, with or without a label
    unreadable: int
    # rows that input.on_bad_row: skip left out
    unreadable_by_reason: dict[str, int]
    # of them, by what is wrong with them: most rows first
    judgements: int
    kept: int
    # votes that the dataset rests on
    users: int
    prompts: int
    responses: int
    # distinct, of judgements
    files: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    version: int
    kto_dist: str
    # the version that made it
    files: tuple[File, ...]
    # empty: the audit was made without writing a dataset
    checks: tuple[Check, ...]
    log: Log
    steps: tuple[StepCounts, ...]
    balance: Balance
    agreement: Agreement
    users: Users | None
    # None: the log has no users
    drift: Drift
    lengths: Lengths
    conflicts: Conflicts
    user_ids_hashed: bool
    settings: dict[str, Any]
    # the mining config, without the salt

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_file(path: Path, split: str, rows: int) -> File:
    return File(name=path.name, split=split, rows=rows, sha256=sha256_of(path))


def write_audit(audit: Audit, folder: str | Path) -> None:
    """`audit.json` and `report.html` in `folder`, each whole or not at all; the JSON last, since `train` reads it."""
    from kto_dist.feedback.report import page

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.html", page(audit).encode("utf-8", "replace"))
    text = json.dumps(audit.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "audit.json", text.encode("utf-8", "replace"))


def audit(
    connection: "DuckDBPyConnection",
    config: "MiningConfig",
    *,
    files: Sequence[File] = (),
    settings: dict[str, Any] | None = None,  # to be shown; must not hold the salt
) -> Audit:
    """All figures of the tables. Reads them only, apart from temporary tables of its own."""
    from kto_dist import __version__

    try:
        _define(connection)
        balance = _balance(connection, config)
        users = _users(connection, config, balance)
        agreed = _agreement(connection, config, has_users=users is not None)
        drift = drift_of(
            _counts(connection, "CAST(time AS DATE)"),
            _counts(connection, "model"),
            significance=config.audit.significance,
        )
        lengths = lengths_of(connection)
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
                config=config,
            ),
            log=_log(connection),
            steps=steps_of(connection),
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


def _define(connection: "DuckDBPyConnection") -> None:
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


def _counts(connection: "DuckDBPyConnection", key: str) -> list[tuple[Any, int, int]]:
    return connection.execute(
        f"SELECT {key}, count(*) FILTER (label), count(*) FILTER (NOT label) FROM judgements GROUP BY 1 ORDER BY 1"
    ).fetchall()


def _log(connection: "DuckDBPyConnection") -> Log:
    votes, kept, files = connection.execute(
        "SELECT count(*), count(*) FILTER (removed IS NULL), count(DISTINCT source) FROM votes"
    ).fetchone()
    judgements, users, prompts, responses = connection.execute(
        'SELECT count(*), count(DISTINCT "user"), count(DISTINCT prompt_key), count(DISTINCT response_key) '
        "FROM judgements"
    ).fetchone()
    known = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    bad = "SELECT reason, sum(rows)::BIGINT FROM bad_rows GROUP BY reason ORDER BY 2 DESC, reason"
    unreadable = dict(connection.execute(bad).fetchall()) if "bad_rows" in known else {}
    return Log(
        votes=votes,
        unreadable=sum(unreadable.values()),
        unreadable_by_reason=unreadable,
        judgements=judgements,
        kept=kept,
        users=users,
        prompts=prompts,
        responses=responses,
        files=files,
    )


def _balance(connection: "DuckDBPyConnection", config: "MiningConfig") -> Balance:
    def classes(table: str, where: str = "true") -> Classes:
        query = f"SELECT count(*) FILTER (label), count(*) FILTER (NOT label) FROM {table} WHERE {where}"
        return Classes.of(*connection.execute(query).fetchone())

    weights = connection.execute(
        "SELECT coalesce(sum(weight) FILTER (label), 0)::DOUBLE, coalesce(sum(weight) FILTER (NOT label), 0)::DOUBLE "
        "FROM examples WHERE split = 'train'"
    ).fetchone()
    return balance_of(
        labelled=classes("votes"),
        judgements=classes("judgements"),
        dataset=classes("examples"),
        train=classes("examples", "split = 'train'"),
        weights=tuple(round(weight, 6) for weight in weights),
        deployment_up_share=config.balance.deployment_up_share,
    )


def _users(connection: "DuckDBPyConnection", config: "MiningConfig", balance: Balance) -> Users | None:
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

    limits = config.audit
    named = concentration.heavy_downvoters(votes, down, users, min_votes=limits.min_votes, level=limits.false_names)
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
    has_after, nameless_before, nameless_after = _losses(connection, balance)

    total, downs = int((votes * users).sum()), int((down * users).sum())
    facts = connection.execute(
        "SELECT 1 / (sum(before * before) + $before), 1 / nullif(sum(after * after) + $after, 0), max(after), "
        "count(*) FILTER (named), "
        "coalesce(sum(votes) FILTER (named), 0)::BIGINT, coalesce(sum(down) FILTER (named), 0)::BIGINT, "
        "coalesce(sum(before) FILTER (named), 0), coalesce(sum(after) FILTER (named), 0) FROM audit_loss",
        {"before": nameless_before, "after": nameless_after},
    ).fetchone()
    effective, effective_after, largest, count, named_votes, named_down, named_before, named_after = facts
    return Users(
        users=int(users.sum()),
        votes=total,
        votes_without_user=balance.judgements.up + balance.judgements.down - total,
        gini_votes=concentration.gini(votes, users),
        gini_downvotes=concentration.gini(down, users),
        effective_before=round(effective, 6),
        effective_after=round(effective_after, 6) if has_after else None,
        top_votes=concentration.top_shares(votes, users),
        top_downvotes=concentration.top_shares(down, users),
        lorenz_votes=concentration.lorenz(votes, users),
        lorenz_downvotes=concentration.lorenz(down, users),
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


def _losses(connection: "DuckDBPyConnection", balance: Balance) -> tuple[bool, float, float]:
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
    squares, total_after = connection.execute(
        'SELECT coalesce(sum(squares) FILTER ("user" IS NULL), 0), coalesce(sum(mass), 0) FROM audit_after'
    ).fetchone()
    named, ups = connection.execute(
        "SELECT coalesce(sum(votes), 0)::BIGINT, coalesce(sum(votes - down), 0)::BIGINT FROM audit_users"
    ).fetchone()
    nameless_up, nameless_down = judged.up - ups, judged.down - (named - ups)
    return (
        connection.execute("SELECT sum(after) > 0 FROM audit_loss").fetchone()[0],
        (nameless_up * up_before**2 + nameless_down * down_before**2) / total**2,
        squares / total_after**2 if total_after else 0.0,
    )


def _top_users(connection: "DuckDBPyConnection", total: int, downs: int) -> tuple[User, ...]:
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
            down_rate=concentration.rate(down, votes),
            p_value=p if p >= 0 else None,
            named=named,
            overruled=overruled,
            loss_before=round(before, 9),
            loss_after=round(after, 9),
        )
        for user, votes, down, p, named, before, after, overruled in rows
    )


def _agreement(connection: "DuckDBPyConnection", config: "MiningConfig", *, has_users: bool) -> Agreement:
    def units(where: str) -> np.ndarray:
        """(M, 3): votes, votes up, responses that have these."""
        found = connection.execute(
            "SELECT n, k, count(*) AS responses FROM (SELECT count(*) AS n, count(*) FILTER (label) AS k FROM voices "
            f"WHERE {where} GROUP BY response_key HAVING n > 1) GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    everyone = units("true")
    alpha, differ, noise = agreement.agreement_of(everyone)
    alpha_range, noise_range = agreement.intervals(everyone, config.audit.resamples)
    without = agreement.agreement_of(units('"user" IS NULL OR "user" NOT IN (SELECT "user" FROM audit_critics)'))
    has_critics = connection.execute("SELECT count(*) FROM audit_critics").fetchone()[0] > 0
    rows = connection.execute(
        "SELECT votes_up, votes_down, if(label, 1, 0), sum(weight) FROM examples GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    users = connection.execute('SELECT count(DISTINCT "user") FROM voices').fetchone()[0]
    wrong = None
    if noise is not None and rows:
        good = agreement.share_of_good(_tallies(connection), noise)
        wrong = agreement.wrong_labels(np.array(rows, dtype=float), noise, good)
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
        by_votes=agreement.unanimity(everyone),
    )


def _tallies(connection: "DuckDBPyConnection") -> np.ndarray:
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


def audit_log(config: "MiningConfig") -> dict[str, Any]:
    """What `mine` would say of the dataset, without writing one: the audit, also in `<output.folder>/audit/`.

    The folder of its own leaves the audit of a dataset that is there already in place. Raises `UserError`.
    """
    from kto_dist.feedback.config import folder_of
    from kto_dist.feedback.mine import pipeline, settings

    with pipeline(config) as connection:
        found = audit(connection, config, settings=settings(config))
    write_audit(found, folder_of(config.output.folder) / "audit")
    return found.to_dict()

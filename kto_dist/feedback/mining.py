"""A log of thumbs -> a dataset and its audit.

1. ingest      files -> parts on disk, new ones only (ingest.py, mapping.py, readers.py; turns.py for conversations)
2. load        parts -> ballots: a narrow row a judgement, in DuckDB (votes.py, labels.py)
3. clean       duplicates, broken answers, near duplicates (clean.py, language.py, near.py)
4. users       the cap, and the weights that shrink (users.py)
5. examples    conflicts, splits, balance (examples.py)
6. output      Parquet, and the audit of it (output.py, audit.py)

Between 1 and 6 everything is SQL in one connection that spills to disk; see `pipeline` for the tables it leaves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from kto_dist.feedback.clean import clean
from kto_dist.feedback.config import MiningConfig, folder_of
from kto_dist.feedback.database import database, find_salt
from kto_dist.feedback.examples import balance, stratify, tally, view_examples
from kto_dist.feedback.ingest import ingest
from kto_dist.feedback.labels import make_words
from kto_dist.feedback.output import publish, write
from kto_dist.feedback.turns import assemble
from kto_dist.feedback.users import cap, weigh
from kto_dist.feedback.votes import load, view_votes

if TYPE_CHECKING:
    from kto_dist.feedback.findings import Audit


@contextmanager
def pipeline(config: MiningConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """Runs steps 1 to 5; yields the connection with `votes`, `steps`, `examples`, `texts`, `sources` and `bad_rows`.

    `texts` (vote, prompt, completion) is a view over what lies on disk: join it for the few rows that are shown.
    Everything is gone afterwards but `input.state` and the salt. Raises `UserError`.
    """
    with _run(config) as (connection, _):
        yield connection


@contextmanager
def _run(config: MiningConfig) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    salt = find_salt(config)
    with database(config, salt) as (connection, folder):
        ingest(connection, config, salt, folder)
        if config.columns.layout == "turns":
            assemble(connection, config, folder)
        make_words(connection, config)
        load(connection, config)
        clean(connection, config)
        cap(connection, config)
        weigh(connection, config)
        view_votes(connection, config)
        tally(connection, config)
        balance(connection, config)
        stratify(connection, config)
        view_examples(connection)
        yield connection, folder


def mine(config: MiningConfig) -> dict[str, Any]:
    """Writes `train.parquet`, `heldout.parquet`, `audit.json` and `report.html`; returns the audit.

    Files of `output.folder` are replaced once all new ones are complete. Raises `UserError`.
    """
    with _run(config) as (connection, folder):
        staged = folder / "output"
        staged.mkdir()
        rows = write(connection, config, staged)
        found = _audited(connection, config, staged, rows)
        _write(found, staged)
        publish(staged, folder_of(config.output.folder))
        return found.to_dict()


def audit_log(config: MiningConfig) -> dict[str, Any]:
    """What `mine` would say of the dataset, without writing one: the audit, also in `<output.folder>/audit/`.

    The folder of its own leaves the audit of a dataset that is there already in place. Raises `UserError`.
    """
    with pipeline(config) as connection:
        found = _audited(connection, config)
    _write(found, folder_of(config.output.folder) / "audit")
    return found.to_dict()


# What computes and draws the report (scipy, matplotlib: 90 MiB) is imported once the log has been read, beside which it
# would raise the peak.


def _audited(
    connection: duckdb.DuckDBPyConnection, config: MiningConfig, folder: Path = Path(), rows: Mapping[str, int] = {}
) -> "Audit":
    """`rows`: split -> how many its file in `folder` has."""
    from kto_dist.feedback.audit import audit
    from kto_dist.feedback.findings import File

    files = [File.of(folder / f"{split}.parquet", split, count) for split, count in rows.items() if count]
    return audit(connection, config, files=files, settings=_settings(config))


def _write(found: "Audit", folder: Path) -> None:
    from kto_dist.feedback.report import write_audit

    write_audit(found, folder)


def _settings(config: MiningConfig) -> dict[str, Any]:
    """The resolved config for the audit, without the salt."""
    tree = config.model_dump(mode="json", by_alias=True)
    del tree["users"]["salt"]
    return tree

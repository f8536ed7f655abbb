"""`kto-dist store ...`: what is in a reference store, whether it is whole, what can go, and its pairs as a file."""

import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import click
from rich.table import Table

from kto_dist.commands.tables import show
from kto_dist.reference.config import ReferenceConfig

_root = click.argument("store", default=ReferenceConfig().store)


def _fingerprint(meaning: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    text = f"First digits of a fingerprint: {meaning}."
    return click.option("--fingerprint", metavar="DIGITS", default="", help=text)


@click.group()
def store() -> None:
    """List, verify, clear out and export a reference store.

    STORE is what reference.store names: a folder, or a URL such as s3://bucket/path. Default: runs/reference.
    """


@store.command("ls", short_help="List the models: pairs, size, last use.")
@_root
@_fingerprint("only that model")
def list_models(store: str, fingerprint: str) -> None:
    """List the models of STORE: how many pairs, how large, when used last.

    Times are this machine's, to the hour: a use is noted once an hour.
    """
    from kto_dist.store.tools import summarise

    rows = summarise(store, fingerprint)
    table = Table("fingerprint", "model", "dtype", "attention", "pairs", "shards", "size", "created", "last used")
    for row in rows:
        facts = row.facts
        used = "unknown" if row.used is None else _hour(row.used)
        table.add_row(
            row.folder[:12],
            facts.get("model") or "unknown",
            facts.get("dtype", "unknown"),
            facts.get("attention", "unknown"),
            f"{row.pairs:,}",
            f"{row.shards:,}",
            _size(row.size),
            _created(facts.get("created")),
            f"now, by {', '.join(row.users)}" if row.users else used,
        )
    show(table)
    click.echo(f"{sum(row.pairs for row in rows):,} pairs, {_size(sum(row.size for row in rows))}")


@store.command("verify", short_help="Hash every byte; exit 1 if one is not as it was written.")
@_root
@_fingerprint("only that model")
def verify_shards(store: str, fingerprint: str) -> None:
    """Hash every byte of STORE and report what is not as it was written. Exits 1 if anything is.

    Nothing is changed: the next job that reads a damaged shard sets it aside and scores its pairs again.
    """
    from kto_dist.store.tools import verify

    whole = True
    for verdict in verify(store, fingerprint):
        good = verdict.shards - len(verdict.bad) - len(verdict.unjudged)
        click.echo(f"{verdict.folder[:12]}: {verdict.pairs:,} pairs, {good:,} of {verdict.shards:,} shards are good")
        for shard, why in (*verdict.bad, *verdict.unjudged):
            click.echo(f"  {shard} {why}")
        if verdict.repeated:
            click.echo(
                f"  {verdict.repeated:,} pairs stand in several shards, with values that differ by up to "
                f"{verdict.difference:.3g} nats: the smallest counts, always"
            )
        whole &= verdict.good
    sys.exit(0 if whole else 1)


@store.command(short_help="Clear out what is damaged, abandoned or scattered.")
@_root
@_fingerprint("remove that model, whole")
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    help="Remove models that nobody has used for so long; with --fingerprint only that one.",
)
@click.option("--yes", is_flag=True, help="Do it; without this only what would be done is shown.")
def gc(store: str, fingerprint: str, unused_days: float | None, yes: bool) -> None:
    """Remove from STORE what is damaged or abandoned, and merge many small shards into few.

    Whole models go only by --fingerprint or --unused-days, also those that another version wrote. What a running job
    uses is left alone. A job that may only read leaves no mark: neither that it is running nor that the model was used.
    """
    from kto_dist.store.gc import collect, plan_gc
    from kto_dist.store.tools import summarise

    for row in summarise(store, fingerprint):
        if row.users:
            click.echo(f"{row.folder[:12]}: left alone, in use by {', '.join(row.users)}")
    removals = plan_gc(store, unused_days=unused_days, prefix=fingerprint or None, warn=click.echo)
    for removal in removals:
        click.echo(f"{removal.folder[:12]}: {len(removal.files):,} files, {_size(removal.size)}: {removal.why}")
    if not removals:
        click.echo("nothing to do")
    elif not yes:
        click.echo("nothing was changed: add --yes to do it")
    else:
        skipped = [removal for removal, done in collect(store, removals) if not done]
        for removal in skipped:
            click.echo(f"{removal.folder[:12]}: left alone, a job has come to use it, or it is no longer as it was")
        click.echo(f"done: {len(removals) - len(skipped)} of {len(removals)}")


@store.command("export", short_help="Write a model's pairs to a Parquet or CSV file.")
@_root
@click.argument("target", type=click.Path(path_type=Path))
@_fingerprint("that model, where STORE has several")
def export_pairs(store: str, target: Path, fingerprint: str) -> None:
    """Write a model's pairs of STORE to TARGET (.parquet or .csv): key, log-prob, tokens of the completion."""
    from kto_dist.store.tools import export

    count = export(store, target, fingerprint)
    click.echo(f"{count:,} pairs written to {target}")


def _hour(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:00", time.localtime(seconds))


def _created(text: str | None) -> str:
    try:
        return _hour(datetime.fromisoformat(text or "").timestamp())
    except ValueError:
        return "unknown"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

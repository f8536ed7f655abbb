"""A table on the terminal; through a pipe a line a row, for grep."""

import io
import sys

import click
from rich.console import Console as Terminal
from rich.table import Table


def show(table: Table) -> None:
    """Piped lines are as long as what they say, without blanks at their end."""
    table.box, table.pad_edge = None, False
    if sys.stdout.isatty():
        Terminal(highlight=False, markup=False).print(table)
        return
    text = io.StringIO()
    Terminal(file=text, width=10_000, highlight=False, markup=False).print(table)
    for line in text.getvalue().splitlines():
        click.echo(line.rstrip())

"""The table of `long_log.py`: what each stage takes of time and of memory."""

from typing import Any

from table_parts import Content, about, table

GIB, MIB = 2**30, 2**20


def long_log(content: Content) -> str:
    """A column a log; memory is the process's own, without files that are mapped."""
    lines = content["results"]
    head = ["", *(f"{line['rows']:,} rows" + (", made as tokens" if line["made"] else "") for line in lines)]
    kinds: list[tuple[str, Any]] = [
        ("the log", lambda line: "" if line["made"] else f"{line['log_bytes'] / GIB:.2f} GiB"),
        ("tokens, and their files", lambda line: _tokens(line["tokenise"])),
        ("tokenise: rows/s", lambda line: "" if line["made"] else f"{line['rows'] / line['tokenise']['seconds']:,.0f}"),
        ("its process", lambda line: "" if line["made"] else f"{line['tokenise']['peak_bytes'] / MIB:,.0f} MiB"),
        ("open the tokens again", lambda line: f"{line['plan']['open_seconds']:.1f} s"),
        ("find the pairs of all steps", lambda line: _pairs(line["plan"])),
        ("hash their keys", lambda line: f"{line['plan']['keys_seconds']:.1f} s"),
        ("its process", lambda line: f"{line['plan']['peak_bytes'] / MIB:,.0f} MiB"),
        ("a step's data", lambda line: f"{1000 * line['data']['seconds_per_step']:.1f} ms"),
        ("train: to the first step", lambda line: f"{line['train']['first_step_seconds']:.0f} s"),
        ("its process", lambda line: f"{line['train']['peak_bytes'] / MIB:,.0f} MiB"),
    ]
    rows = [[title, *(cell(line) for line in lines)] for title, cell in kinds]
    settings = content["settings"]
    job = f"{settings['global_batch']} rows a step; processes that tokenise: {settings['workers']}"
    return f"{about(content, job)}\n\n{table(head, rows)}"


def _tokens(found: dict[str, Any]) -> str:
    return f"{found['tokens'] / 1e6:,.0f} million, {found['bytes'] / GIB:.2f} GiB"


def _pairs(found: dict[str, Any]) -> str:
    return f"{found['pairs']:,} of {found['steps']:,} steps in {found['pairs_seconds']:.1f} s"

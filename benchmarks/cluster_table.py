"""The table of `cluster_faults.py`."""

import statistics
from typing import Any

from cluster_fault_kinds import KINDS
from table_parts import about, counted, table


def _seconds(lines: list[dict[str, Any]], name: str) -> str:
    """The median, and the most of several."""
    values = [line[name] for line in lines if line[name] is not None]
    if not values:
        return ""
    most = f" (most {max(values):.0f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.0f}{most}"


def _counts(*parts: tuple[int, str]) -> str:
    """`18 by itself, 2 by the same command`."""
    return ", ".join(f"{number} {text}" for number, text in parts if number)


def _equal(lines: list[dict[str, Any]]) -> str:
    """To the bit; and those near it."""
    near = [line["apart"] for line in lines if not line["equal"] and not line["note"] and line["apart"] < 1e-4]
    exact = str(sum(line["equal"] for line in lines))
    return f"{exact}, and {len(near)} within {max(near):.0e}" if near else exact


def cluster_faults(content: dict[str, Any]) -> str:
    """A line a kind; and what has gone wrong."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in content["results"]:
        found.setdefault(line["fault"], []).append(line)
    rows = []
    for name in (name for name in KINDS if name in found):
        kind, lines = KINDS[name], found[name]
        itself = sum(line["itself"] for line in lines)
        again = ((itself, "by itself"), (len(lines) - itself, "by the same command"))
        rows.append(
            [
                kind.title,
                str(len(lines)),
                str(sum(line["starting"] for line in lines)),
                _equal(lines),
                str(sum(line["named"] for line in lines)) if kind.names or kind.early else "",
                str(sum(bool(line["left"]) for line in lines)),
                f"{max(line['steps_lost'] for line in lines)}",
                _seconds(lines, "notice_seconds"),
                _seconds(lines, "end_seconds"),
                _seconds(lines, "back_seconds"),
                _counts((itself, "go on"), again[1]) if kind.goes_on else _counts(*again),
            ]
        )
    settings = content["settings"]
    head = ["fault", "times", "of these at a start", "equal to the bit", "named", "left something behind"]
    head += ["most steps made again", "s to notice", "s to the command's end", "s to be back", "starts again"]
    job = (
        f"two hosts of a rank each on one machine; {settings['steps']} steps, a checkpoint every "
        f"{counted(settings['checkpoint_every'], 'step')}, cluster.timeout {settings['timeout']} s"
    )
    beside = f"\n\nSeconds are those of a busy machine: {content['beside']}." if content["beside"] else ""
    wrong = [f"- {KINDS[line['fault']].title}: {line['note']}" for line in content["results"] if line["note"]]
    return "\n\n".join([about(content, job) + beside, table(head, rows), *(["\n".join(wrong)] if wrong else [])])

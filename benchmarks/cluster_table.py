"""The table of `cluster_faults.py`."""

import statistics
from typing import Any

from cluster_fault_kinds import KINDS
from table_parts import about, counted, table


def _seconds(values: list[float]) -> str:
    """The median, and the most of several."""
    if not values:
        return ""
    most = f" (most {max(values):.0f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.0f}{most}"


def cluster_faults(content: dict[str, Any]) -> str:
    """A line a kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in content["results"]:
        found.setdefault(line["fault"], []).append(line)
    rows = []
    for name in (name for name in KINDS if name in found):
        kind, lines = KINDS[name], found[name]
        again = "goes on" if kind.goes_on else "by itself" if kind.itself else "by the same command"
        named = f"{sum(line['named'] for line in lines)}" if kind.names else ""
        notices = [line["notice_seconds"] for line in lines if line["notice_seconds"] is not None]
        rows.append(
            [
                kind.title,
                str(len(lines)),
                str(sum(line["equal"] for line in lines)),
                named,
                str(sum(bool(line["left"]) for line in lines)),
                f"{max(line['steps_lost'] for line in lines)}",
                _seconds(notices),
                _seconds([line["back_seconds"] for line in lines]),
                again,
            ]
        )
    settings = content["settings"]
    head = ["fault", "times", "equal to the bit", "named", "left something behind", "most steps made again"]
    head += ["s to notice", "s to be back", "starts again"]
    job = (
        f"two hosts of a rank each on one machine; {settings['steps']} steps, a checkpoint every "
        f"{counted(settings['checkpoint_every'], 'step')}, cluster.timeout {settings['timeout']} s"
    )
    return f"{about(content, job)}\n\n{table(head, rows)}"

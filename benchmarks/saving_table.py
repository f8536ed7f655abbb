"""The table of `saving.py`."""

import statistics
from typing import Any

from table_parts import about, table


def saving(content: dict[str, Any]) -> str:
    """A line a way to save."""
    rows = []
    for line in content["results"]:
        saved = line["way"] != "none"
        rows.append(
            [
                f"{line['dtype']}, ZeRO {line['zero_stage']}",
                {"none": "no checkpoints", "background": "in the background"}.get(line["way"], line["way"]),
                f"{line['checkpoint_bytes'] / 2**30:.2f}" if saved else "",
                f"{statistics.mean(line['seconds']):.2f}",
                f"{line['pause']:.2f}" if saved else "",
                f"{line['cost']:.2f}" if saved else "",
                f"{line['peak_bytes'] / 2**30:.1f}",
            ]
        )
    settings = content["settings"]
    head = ["run", "checkpoints", "GiB of one", "s a step, all told", "s that one stops training"]
    head += ["s that one costs", "GiB of memory at most"]
    job = f"one rank, the demo's model, {settings['steps']} steps, a checkpoint every {settings['every_steps']}"
    beside = f"\n\nNot measured alone: {content['beside']}." if content["beside"] else ""
    return f"{about(content, job)}{beside}\n\n{table(head, rows)}"

"""What `make demo` came to, as a result file: held-out figures and answers before and after training, its seconds, and
where the time of its steps goes.

    make demo
    kto-dist train launch/demo/demo.yaml train.profile=true train.max_steps=6 train.output=runs/demo/profiled
    python benchmarks/demo.py --json benchmarks/results/cpu-demo.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=records.ROOT / "runs/demo/run", help="the demo's run")
    parser.add_argument(
        "--profiled", type=Path, default=records.ROOT / "runs/demo/profiled", help="a run of it with train.profile"
    )
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    arguments = parser.parse_args()
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    if "demo_seconds" not in summary:
        parser.error(f"{arguments.run} is not the run of a whole `make demo`: its answers to the questions are missing")
    profile = arguments.profiled / "profile/table.md"
    settings = {"steps": summary["steps"], "questions": len(summary["samples"])}
    content = records.frame("demo", settings) | {
        "results": {"answers": summary["answers"], "heldout": summary["heldout"]},
        "seconds": {**summary["seconds"], "all": summary["demo_seconds"]},
        "profile": parts(profile.read_text(encoding="utf-8")) if profile.exists() else [],
    }
    records.write_json(arguments.json, content)


def parts(table: str) -> list[dict[str, Any]]:
    """The lines of the table that `train.profile` writes."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [
        {"part": part, "milliseconds": float(time.replace(",", "")), "share": float(share.removesuffix("%")) / 100}
        for part, time, share in cells
    ]


if __name__ == "__main__":
    main()

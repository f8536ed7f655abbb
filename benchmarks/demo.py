"""What `make demo` came to, as a result file: held-out figures and answers before and after training, and its seconds.

make demo && python benchmarks/demo.py --json benchmarks/results/cpu-demo.json
"""

import argparse
import json
from pathlib import Path

import records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=records.ROOT / "runs/demo/run", help="the demo's run")
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    arguments = parser.parse_args()
    summary = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))
    if "demo_seconds" not in summary:
        parser.error(f"{arguments.run} is not the run of a whole `make demo`: its answers to the questions are missing")
    settings = {"steps": summary["steps"], "questions": len(summary["samples"])}
    content = records.frame("demo", settings) | {
        "results": {"answers": summary["answers"], "heldout": summary["heldout"]},
        "seconds": {**summary["seconds"], "all": summary["demo_seconds"]},
    }
    records.write_json(arguments.json, content)


if __name__ == "__main__":
    main()

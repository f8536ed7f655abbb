"""What `make compare` came to, as a result file: each method's chosen run on held-out rows, and what all runs took.

make compare && python benchmarks/compare.py --json benchmarks/results/cpu-compare.json --seconds 1234
"""

import argparse
import json
from pathlib import Path
from typing import Any

import records
import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=records.ROOT / "runs/compare", help="the comparison's folder")
    parser.add_argument("--seconds", type=float, required=True, help="of the whole command, as `time` says")
    parser.add_argument("--beside", default="", help="what else the machine did meanwhile, in words")
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    arguments = parser.parse_args()
    file = arguments.folder / "comparison.json"
    if not file.exists():
        parser.error(f"{arguments.folder} holds no whole comparison: run `make compare`")
    records.write_json(arguments.json, content_of(arguments.folder, arguments.seconds, arguments.beside))


def content_of(folder: Path, seconds: float, beside: str) -> dict[str, Any]:
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    names = [run["name"] for run in found["tried"]]
    summaries = [json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in names]
    config = yaml.safe_load((folder / names[0] / "config.yaml").read_text(encoding="utf-8"))
    settings = {
        "steps": config["train"]["max_steps"],
        "global_batch": config["train"]["global_batch"],
        "lr": sorted({run["lr"] for run in found["tried"]}),
        "beta": sorted({run["beta"] for run in found["tried"] if run["beta"] is not None}),
        "ranks": summaries[0]["world_size"],
        "dtype": summaries[0]["precision"],
        "heldout": config["data"]["heldout"],
        "choose_by": found["choose_by"],
        "against": found["against"],
        "prompts": found["prompts"],
        "rows": found["heldout"],
        "pairs": found["pairs"],
        "beside": beside,
    }
    rows = [{name: value for name, value in row.items() if name not in ("bands", "curve")} for row in found["rows"]]
    seconds_by_run = {name: sum(summary["seconds"].values()) for name, summary in zip(names, summaries, strict=True)}
    return records.frame("compare", settings) | {
        "results": rows,
        "tried": found["tried"],
        "scored": found["scored"],
        "answers": answers_of(found["answers"]),
        "seconds": {"all": seconds, "by_run": seconds_by_run},
    }


def answers_of(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of each method: what its answers are like, and how often a judge preferred them to another's. None: no judge."""
    if found is None:
        return None
    figures = {
        method: {name: own[name] for name in ("words", "finished") if name in own}
        for method, own in found["figures"].items()
    }
    names = ("win_rate", "win_rate/equal_length")
    judged = {
        method: {
            other: {name: contest["figures"][name] for name in names if name in contest["figures"]}
            for other, contest in rivals.items()
        }
        for method, rivals in found["judged"].items()
    }
    return {"judge": found["judge"], "prompts": found["prompts"], "figures": figures, "judged": judged}


if __name__ == "__main__":
    main()

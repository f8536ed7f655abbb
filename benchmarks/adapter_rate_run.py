"""One run of `adapter_rate.py`, in a process of its own, so that its peak of memory is its own.

    python benchmarks/adapter_rate_run.py JOB.json RESULT.json

With `score` the reference store is filled for the run and nothing is trained: no run then pays for the others.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import records

DEMO = records.ROOT / "launch" / "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the process does."""

    config: str
    """YAML file of the run."""
    overrides: list[str]
    score: bool
    answers: bool
    """Have held-out questions answered, and judged by the demo's wish."""


def scored(job: Job) -> dict[str, Any]:
    from kto_dist.training.config import Config
    from kto_dist.training.precompute import precompute

    return {"scored": precompute(Config.load(job.config, job.overrides)).scored_once}


def trained(job: Job, started: float) -> dict[str, Any]:
    from kto_dist import Config, train

    config = Config.load(job.config, job.overrides)
    summary = train(config)
    # before answers are made: they need a model once more
    seconds, peak = time.monotonic() - started, machine.peak()
    folder = Path(config.train.output)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    export = Path(summary["export"])
    found = {
        "dtype": summary["precision"],
        "scored": summary["reference"]["scored"],
        "heldout": figures(summary["heldout"]["after"]),
        "loss": " ".join(f"{line['loss']:.4g}" for line in lines),
        # after the first, which pays for what is done once
        "step_seconds": median([line["seconds"] for line in lines[1:]] or [0.0]),
        "seconds": {"training": summary["seconds"]["training"], "all": seconds},
        "peak_bytes": peak,
        "export_bytes": sum(file.stat().st_size for file in export.rglob("*") if file.is_file()),
    }
    return found | ({"answers": judged(config, export)} if job.answers else {})


def figures(after: dict[str, Any]) -> dict[str, Any]:
    """Of an evaluation: what a table needs. `accuracy` counts classes alike."""
    classes = [after[f"accuracy/{name}"] for name in ("desirable", "undesirable")]
    names = ("auc", "rewards/desirable", "rewards/undesirable", "kl_raw", "loss")
    return {
        **{name: round(after[name], 4) for name in names if name in after},
        "accuracy": round(sum(classes) / 2, 4),
        "intervals": {
            name: {side: round(found[side], 4) for side in ("low", "high")}
            for name, found in after["intervals"].items()
            if name == "auc"
        },
    }


def judged(config: Any, export: Path) -> dict[str, float]:
    """Answers to all held-out questions, as `make demo` asks them. An adapter's folder loads with its base."""
    sys.path.append(str(DEMO))
    from answers import generate
    from run import heldout_questions
    from wish import measure

    questions = heldout_questions(config)
    return {name: round(value, 4) for name, value in measure(questions, generate(export, questions)).items()}


def main() -> None:
    started = time.monotonic()
    given, taken = map(Path, sys.argv[1:])
    job = Job(**json.loads(given.read_text(encoding="utf-8")))
    records.write_json(taken, scored(job) if job.score else trained(job, started))


if __name__ == "__main__":
    main()

"""Whole runs that are sound, of the tiny model, and their metrics as they were recorded: no rule of health may speak.

`python tests/sound_runs.py` trains them and writes `cases/sound-runs/NAME.csv`, a line a step with what rules look at.
"""

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "cases" / "sound-runs"
WATCHED = (
    "step", "loss", "loss/desirable", "loss/undesirable", "rewards/all", "rewards/desirable", "rewards/undesirable",
    "saturated/all", "grad_norm", "kl_raw", "kl_clamped", "rows/all", "rows/desirable", "rows/contradicted",
    "loss/contradicted",
)  # fmt: skip
STEPS = 360
RUNS: dict[str, dict[str, Any]] = {
    "kto": {"train__lr": 3e-4},
    "kto-small-batches": {"train__lr": 2e-4, "train__global_batch": 8},
    "kto-constant-rate": {"train__lr": 2e-4, "train__schedule": "constant", "objective__beta": 0.3},
    "apo": {"train__lr": 3e-4, "objective__loss": "apo_zero_unpaired"},
    "dpo": {"train__lr": 3e-4, "objective__loss": "dpo"},
    "sft": {"train__lr": 3e-4, "objective__loss": "sft"},
}
"""Name -> settings; 60 % of the rows are liked, and a few contradict each other."""


def recorded(name: str) -> list[dict[str, float]]:
    """The steps' metrics; one that a step lacks is absent."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)]


def train_one(folder: Path, model: Path, log: Path, name: str, steps: int = STEPS) -> Any:
    """The run's config; it has trained."""
    from tiny_runs import tiny_config, train_all

    config = tiny_config(folder / name, model, log, **{"train__max_steps": steps, "train__eps": 1e-8, **RUNS[name]})
    train_all([config])
    return config


def rows() -> list[dict[str, object]]:
    from tiny import thumbs

    # more liked answers than disliked ones, so that z0 does not sink below 0: that would be a warning, and a right one
    found = [{**row, "label": not row["label"]} for row in thumbs(1200, 300, seed=1)]
    return [*found, *({**row, "label": not row["label"]} for row in found[:20])]


def _record() -> None:
    from tiny import save_tiny, write_jsonl
    from tiny_runs import metrics_of

    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, log = save_tiny(folder / "model"), write_jsonl(folder / "log.jsonl", rows())
        for name in sys.argv[1:] or RUNS:
            lines = metrics_of(train_one(folder, model, log, name))
            with (FOLDER / f"{name}.csv").open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(WATCHED)
                writer.writerows([f"{line[key]:.4g}" if key in line else "" for key in WATCHED] for line in lines)
            health = folder / name / "run" / "health.jsonl"
            print(name, health.read_text() if health.exists() else "sound", flush=True)


if __name__ == "__main__":
    _record()

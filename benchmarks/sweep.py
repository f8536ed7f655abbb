"""What one reference store saves a sweep: the same training at several betas, one after the other, over one store.

In:  a model folder and a log of thumbs. Out: a table, and with `--json` a file for the README's figures.

Each run is `kto-dist train` on one rank in a process of its own, imports and export included; the first finds an empty
store. What the sweep saves is what the first spends on scoring, once for every other run.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import records
from rich.console import Console
from rich.table import Table

BETAS = (0.03, 0.05, 0.1, 0.2, 0.5)


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True, help="Hugging Face folder (see `make demo`)")
@click.option("--log", default="launch/demo/thumbs.jsonl", show_default=True, help="rows to train on")
@click.option("--steps", default=4, show_default=True, help="updates of a run")
@click.option("--global-batch", default=16, show_default=True, help="rows of an update")
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="write the figures to this file")
def main(model: str, log: str, steps: int, global_batch: int, file: Path | None) -> None:
    """Trains at five betas over one store, and tells what each run scored."""
    if not Path(model, "config.json").exists():
        raise click.UsageError(f"--model ({model}) holds no model: run `make demo` once, or name a folder")
    results = []
    with tempfile.TemporaryDirectory(prefix="kto-sweep-") as folder:
        config = Path(folder) / "config.yaml"
        tree = {
            "model": {"path": str(Path(model).resolve())},
            "data": {"train": str(Path(log).resolve()), "max_length": 256, "cache": f"{folder}/tokenised"},
            "reference": {"store": f"{folder}/store"},
            "train": {"global_batch": global_batch, "max_steps": steps},
            "tracking": {"enabled": False},
        }
        # JSON is YAML
        config.write_text(json.dumps(tree), encoding="utf-8")
        for beta in BETAS:
            output = Path(folder) / f"beta-{beta}"
            command = [sys.executable, "-m", "kto_dist.commands.cli", "train", str(config), f"objective.beta={beta}"]
            started = time.monotonic()
            done = subprocess.run([*command, f"train.output={output}", "--ranks", "1"], capture_output=True, text=True)
            seconds = time.monotonic() - started
            if done.returncode:
                raise click.ClickException(f"beta {beta} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
            summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
            results.append(
                {
                    "beta": beta,
                    "seconds": seconds,
                    "reference_seconds": summary["seconds"]["reference"],
                    "scored": summary["reference"]["scored"],
                    "from_store": summary["reference"]["from_store"],
                }
            )

    saved = sum(results[0]["reference_seconds"] - line["reference_seconds"] for line in results[1:])
    table = Table("beta", "seconds", "of these the reference", "pairs scored", "from the store", title="sweep")
    for line in results:
        seconds = (f"{line[name]:.1f}" for name in ("seconds", "reference_seconds"))
        table.add_row(str(line["beta"]), *seconds, str(line["scored"]), str(line["from_store"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{sum(line['seconds'] for line in results):.0f} s in all; the store saved {saved:.0f} s")
    if file:
        settings = {
            "model": Path(model).name,
            "log": Path(log).name,
            "steps": steps,
            "global_batch": global_batch,
            "max_length": 256,
        }
        records.write_json(file, records.frame("sweep", settings) | {"results": results, "saved_seconds": saved})


if __name__ == "__main__":
    main()

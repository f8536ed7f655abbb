"""The learning rate of an adapter: LoRA at several, beside full training, each on the demo's rows in the demo's steps.

    make demo && python benchmarks/adapter_rate.py --json benchmarks/results/cpu-adapter-rate.json

In:  a config, by default the demo's, with its rows, model, reference store and steps. Out: a table, and with `--json` a
file for docs/adapters.md. Each run is one rank in a process of its own (`adapter_rate_run.py`), and is written as it
ends: the same command goes on with what is missing, and other rates or seeds are added to what is there.

The reference is scored before the first run, once for all: an adapter's reference is the model without it, and so is
that of full training. `scored` of every run says that none has scored anything.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import records
from adapter_rate_run import Job
from rich.console import Console
from rich.table import Table

GIB = 2**30
LORA = (1e-4, 2e-4, 5e-4, 1e-3)
FULL = (2e-5,)
"""The demo's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One line of the results."""

    method: str
    """full, lora or dora."""
    lr: float
    seed: int

    @property
    def title(self) -> str:
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}"


class Rates(click.ParamType):
    """Learning rates with commas or blanks between them."""

    name = "rates"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} is no list of learning rates, as 1e-4,2e-4", param, ctx)


def runs_of(method: str, rates: tuple[float, ...], full: tuple[float, ...], seed: int) -> list[Run]:
    """Full training first: it is what the others are compared with."""
    return [Run(method="full", lr=lr, seed=seed) for lr in full] + [
        Run(method=method, lr=lr, seed=seed) for lr in rates
    ]


def overrides_of(run: Run, settings: dict[str, Any], output: Path) -> list[str]:
    adapter = [] if run.method == "full" else [f"adapter.type={run.method}", f"adapter.rank={settings['rank']}"]
    return [
        f"train.max_steps={settings['steps']}",
        f"train.lr={run.lr:g}",
        f"train.seed={run.seed}",
        f"train.output={output}",
        "checkpoint.every_steps=null",
        "evaluate.every_steps=null",
        "answers.while_training=0",
        # a rate that is too high is a result as well
        "health.on_trouble=warn",
        "tracking.enabled=false",
        "tracking.report=false",
        *adapter,
    ]


def settings_of(config: str, steps: int | None, rank: int) -> dict[str, Any]:
    """Of all runs; results with other ones are not gone on with."""
    from kto_dist.training.config import Config

    found = Config.load(config)
    if not Path(found.model.path, "config.json").exists():
        raise click.UsageError(f"{config}: {found.model.path} holds no model: run `make demo` once")
    if found.data.heldout is None:
        raise click.UsageError(f"{config}: runs are compared on held-out rows; set data.heldout")
    steps = steps or found.train.max_steps
    if steps is None:
        raise click.UsageError(f"{config} sets no train.max_steps: give --steps")
    return {
        "config": Path(config).name,
        "model": Path(found.model.path).name,
        "steps": steps,
        "global_batch": found.train.global_batch,
        "beta": found.objective.beta,
        "schedule": found.train.schedule,
        "warmup": found.train.warmup,
        "rank": rank,
        "alpha": 2 * rank,
    }


def in_process(job: Job, folder: Path) -> dict[str, Any]:
    """Raises `ClickException` where it fails."""
    given, taken = folder / "job.json", folder / "result.json"
    records.write_json(given, asdict(job))
    script = str(Path(__file__).with_name("adapter_rate_run.py"))
    done = subprocess.run([sys.executable, script, str(given), str(taken)], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{script} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(taken.read_text(encoding="utf-8"))
    return found


def score(run: Run, settings: dict[str, Any], config: str) -> int:
    """Fills the store for a run, whose seed decides its KL pairs. Returns how many log-probs it lacked."""
    with tempfile.TemporaryDirectory(prefix="kto-rate-") as folder:
        overrides = overrides_of(run, settings, Path(folder) / "run")
        job = Job(config=config, overrides=overrides, score=True, answers=False)
        return int(in_process(job, Path(folder))["scored"])


def measure(run: Run, settings: dict[str, Any], config: str, answers: bool) -> dict[str, Any]:
    """Trains, and deletes what it has trained."""
    with tempfile.TemporaryDirectory(prefix="kto-rate-") as folder:
        overrides = overrides_of(run, settings, Path(folder) / "run")
        job = Job(config=config, overrides=overrides, score=False, answers=answers)
        return asdict(run) | in_process(job, Path(folder))


@click.command()
@click.option("--config", default="launch/demo/demo.yaml", show_default=True, help="what every run is but for its rate")
@click.option("--rates", default=LORA, type=Rates(), help="of the adapter [default: 1e-4,2e-4,5e-4,1e-3]")
@click.option("--full-rates", default=FULL, type=Rates(), help="of full training; '' for none [default: 2e-5]")
@click.option("--type", "method", default="lora", show_default=True, type=click.Choice(["lora", "dora"]))
@click.option("--rank", default=16, show_default=True, help="of the adapter; alpha is twice as much")
@click.option("--steps", default=None, type=int, help="updates of a run [default: the config's]")
@click.option("--seed", default=0, show_default=True)
@click.option("--answers/--no-answers", default=True, help="have the held-out questions answered, and judge that")
@click.option("--beside", default="", help="what else the machine did meanwhile, in words: then no table shows seconds")
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="results, and what is done already")
def main(
    config: str,
    rates: tuple[float, ...],
    full_rates: tuple[float, ...],
    method: str,
    rank: int,
    steps: int | None,
    seed: int,
    answers: bool,
    beside: str,
    file: Path | None,
) -> None:
    """Runs what --json has not yet, and says what came out."""
    settings = settings_of(config, steps, rank)
    content = records.started(file, records.frame("adapter-rate", settings) | {"runs": []})
    content["beside"] = beside or content.get("beside", "")
    done = {Run(method=run["method"], lr=run["lr"], seed=run["seed"]) for run in content["runs"]}
    todo = [run for run in runs_of(method, rates, full_rates, seed) if run not in done]
    console = Console(highlight=False)
    if todo:
        begun = time.monotonic()
        lacked = score(todo[0], settings, config)
        console.print(f"reference: {lacked} log-probs scored, {time.monotonic() - begun:.0f} s")
    for run in todo:
        begun = time.monotonic()
        content["runs"].append(measure(run, settings, config, answers))
        records.write_json(file, content)
        console.print(f"{run.title}: {time.monotonic() - begun:.0f} s")
    show(content, console)


def show(content: dict[str, Any], console: Console) -> None:
    table = Table("", "learning rate", "seed", "AUC", "accuracy", "approved", "s of training", "peak GiB", "scored")
    for run in content["runs"]:
        held = run["heldout"]
        table.add_row(
            run["method"],
            f"{run['lr']:g}",
            str(run["seed"]),
            f"{held['auc']:.3f}",
            f"{held['accuracy']:.3f}",
            f"{run['answers']['approved']:.0%}" if "answers" in run else "",
            f"{run['seconds']['training']:.0f}",
            f"{run['peak_bytes'] / GIB:.2f}",
            str(run["scored"]),
        )
    console.print(table)


if __name__ == "__main__":
    main()

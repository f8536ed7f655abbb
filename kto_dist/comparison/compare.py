"""Losses side by side: runs one after the other, their held-out rows measured alike, one page and one MLflow run.

In:  `ComparisonConfig`, and a way to run a training config. Out: below `train.output` a folder a run, comparison.json
and comparison.html; in MLflow a parent with the runs as its children.

A run that is done is not run again, and one that was stopped goes on: the same command does both. Runs may also be made
elsewhere, by `commands_of`, on whatever sees `train.output` and the store.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.base.secrets import masked
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.comparison.measure import Outcome, outcome
from kto_dist.comparison.plan import Planned, planned, write
from kto_dist.comparison.report import lines_of, page_of
from kto_dist.data import tokenise
from kto_dist.data.examples import load
from kto_dist.data.preference import preferences
from kto_dist.model.loading import load_tokenizer
from kto_dist.record import tracking
from kto_dist.record.environment import environment_tags

RunOne = Callable[[Planned], int]
"""Runs `kto-dist train` on a run's config; returns the exit status."""


def commands_of(config: ComparisonConfig) -> list[str]:
    """Writes the runs' configs, and returns the commands that make them, in the order in which they fill the store."""
    runs = planned(config)
    write(runs)
    return [f"kto-dist train {run.file}" for run in runs]


def compare(config: ComparisonConfig, run_one: RunOne, console: Console) -> Outcome | int:
    """The outcome, or the exit status of the first run that failed. Raises `UserError`."""
    commands = commands_of(config)
    runs = planned(config)
    for number, run in enumerate(runs, start=1):
        if run.is_done:
            console.say(f"run {number} of {len(runs)}: {run.name} is done")
            continue
        console.say(f"run {number} of {len(runs)}: {run.name}")
        status = run_one(run)
        if status:
            return status
        if not run.is_done:
            raise UserError(f"{run.folder.path} has no held-out rows: give data.heldout rows of both classes")
    found = outcome(runs, _pairs(config), config.compare.choose_by)
    _tell(config, found, runs, commands, console)
    return found


def _pairs(config: ComparisonConfig) -> np.ndarray:
    """Good and bad answers to one prompt among the held-out rows: every one, whatever pairs were trained on."""
    tokenizer = load_tokenizer(config.model.path, config.model.gguf_file)
    apart = tokenise.prepare(config.data, tokenizer)[1]
    assert apart is not None
    return preferences(load(apart), "all").pairs


def _tell(config: ComparisonConfig, found: Outcome, runs: list[Planned], commands: list[str], console: Console) -> None:
    folder = Path(config.train.output)
    page, facts = folder / "comparison.html", folder / "comparison.json"
    write_whole(page, page_of(found, folder.resolve().name, commands, masked(to_yaml(config))))
    write_whole(facts, json.dumps(found.to_dict(), indent=1).encode())
    _track(config, found, runs, [page, facts], console)
    for line in lines_of(found):
        console.say(line)
    console.say(f"report: {page}")


def _track(config: ComparisonConfig, found: Outcome, runs: list[Planned], files: list[Path], console: Console) -> None:
    """A parent run, and each run below it."""
    folder = Path(config.train.output).resolve()
    tracker = tracking.start(
        config.tracking,
        settings=config,
        name=folder.name,
        folder=folder,
        run_id=None,
        tags=environment_tags(),
        # where the runs themselves are tracked
        default_uri=f"sqlite:///{folder / 'mlflow.db'}",
        warn=console.warn,
    )
    for row in found.rows:
        tracker.log(0, {f"{name}/{row.method}": value for name, value in row.figures.items()})
    for path in files:
        tracker.log_artifact(path)
    ids = [json.loads(run.folder.summary.read_text(encoding="utf-8"))["mlflow"]["run_id"] for run in runs]
    tracker.adopt([child for child in ids if child])
    tracker.finish("FINISHED")

"""Losses side by side: runs one after the other, their held-out rows measured alike, one page and one MLflow run.

In:  `ComparisonConfig`, and a way to run a training config. Out: below `train.output` a folder a run, comparison.json
and comparison.html; in MLflow a parent with the runs as its children.

A run that is done is not run again, and one that was stopped goes on: the same command does both. Runs may also be made
elsewhere, by `commands_of`, on whatever sees `train.output` and the store.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.base.secrets import masked
from kto_dist.comparison.answers import Answered, CannotAnswer, answered
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.comparison.measure import START, Outcome, halves, outcome
from kto_dist.comparison.plan import Planned, planned, write
from kto_dist.comparison.report import answer_lines, lines_of, page_of
from kto_dist.data import tokenise
from kto_dist.data.examples import load
from kto_dist.data.preference import preferences
from kto_dist.evaluation.generate import Source
from kto_dist.evaluation.judges import judge_of
from kto_dist.model.loading import load_tokenizer
from kto_dist.record import tracking
from kto_dist.record.environment import environment_tags
from kto_dist.training.judged import model_of

RunOne = Callable[[Planned], int]
"""Runs `kto-dist train` on a run's config; returns the exit status."""


def commands_of(config: ComparisonConfig) -> list[str]:
    """Writes the runs' configs, and returns the commands that make them, in the order in which they fill the store."""
    runs = planned(config)
    write(runs)
    return [f"kto-dist train {run.file}" for run in runs]


def compare(config: ComparisonConfig, run_one: RunOne, console: Console) -> Outcome | int:
    """The outcome, or the exit status of the first run that failed. Raises `UserError`."""
    judge = judge_of(config.judge)  # one that cannot be had is told before long work
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
    own = config.model
    tokenizer = load_tokenizer(own.path, own.gguf_file, trust_remote_code=own.trust_remote_code)
    apart = tokenise.prepare(config.data, tokenizer)[1]
    assert apart is not None
    heldout = load(apart)
    # every good and bad answer to one prompt, whatever pairs were trained on
    found = outcome(runs, preferences(heldout, "all").pairs, config.compare.choose_by)
    answers = None
    if judge is not None and config.answers.in_evaluate:
        reported, against = ~halves(heldout.prompt_group), found.against
        sources = sources_of(config, runs, found)
        try:
            answers = answered(config, sources, heldout, reported, tokenizer, judge, START, against, console)
        except CannotAnswer as why:
            console.warn(
                f"{why}, and the comparison goes on without answers: {why.remedy}; answers.in_evaluate=0 leaves them "
                "out"
            )
    _tell(config, found, answers, runs, commands, console)
    return found


def sources_of(config: ComparisonConfig, runs: list[Planned], found: Outcome) -> dict[str, Source]:
    """The start, and each method's chosen run, in memory as they were trained."""
    own = config.model
    folders = {run.name: str(run.folder.path) for run in runs}
    shared = Source(path=own.path, trust_remote_code=own.trust_remote_code, quantization=own.quantization)
    start = {START: replace(shared, gguf_file=own.gguf_file, adapter=config.adapter.start, name="the start")}
    models = {row.method: model_of(folders[row.name]) for row in found.rows if row.name in folders}
    return start | {
        method: replace(shared, path=model.path, gguf_file=model.gguf_file, adapter=model.adapter, name=method)
        for method, model in models.items()
    }


def _tell(
    config: ComparisonConfig,
    found: Outcome,
    answers: Answered | None,
    runs: list[Planned],
    commands: list[str],
    console: Console,
) -> None:
    folder = Path(config.train.output)
    page, facts = folder / "comparison.html", folder / "comparison.json"
    write_whole(page, page_of(found, answers, folder.resolve().name, commands, masked(to_yaml(config))))
    told = found.to_dict() | {"answers": None if answers is None else answers.to_dict()}
    write_whole(facts, json.dumps(told, indent=1).encode())
    _track(config, found, answers, runs, [page, facts], console)
    for line in [*lines_of(found), *([] if answers is None else answer_lines(answers))]:
        console.say(line)
    console.say(f"report: {page}")


def _track(
    config: ComparisonConfig,
    found: Outcome,
    answers: Answered | None,
    runs: list[Planned],
    files: list[Path],
    console: Console,
) -> None:
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
    for method, rivals in ({} if answers is None else answers.contests).items():
        for other, contest in rivals.items():
            if (won := contest.figures().get("win_rate")) is not None:
                tracker.log(0, {f"win_rate/{method}/{other}": won.value})
    for path in files:
        tracker.log_artifact(path)
    ids = [json.loads(run.folder.summary.read_text(encoding="utf-8"))["mlflow"]["run_id"] for run in runs]
    tracker.adopt([child for child in ids if child])
    tracker.finish("FINISHED")

"""What KTO learns: claims of its paper in kind, noise in the thumbs, z0, and a peer's trainer, each on the demo's rows.

    make demo && python benchmarks/evidence.py --json benchmarks/results/cpu-evidence.json

In:  the demo's model and log. Out: a table, and with `--json` a file for docs/evidence.md. RUNS are short ones of a few
steps, made by a process a trainer (`evidence_runs.py`); each is written as it ends, so that a killed benchmark goes on.

1. rows        for each run, from the log's answers (`evidence_rows.py`)
2. runs        trained, and measured alike on held-out rows that the wish itself has labelled
3. results     means over seeds, intervals over prompts, and differences of arms in the same resamples
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import evidence_rows as rows
import numpy as np
import records
from evidence_runs import DONE, Job
from rich.console import Console
from rich.table import Table

from kto_dist.evaluation.intervals import Area, Difference, Figure, Mean, intervals

Rows = Callable[[list[rows.Row], Path, int], Path]
"""Training rows as the log has them, a folder, a seed -> the file to train on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Runs that differ in their seed alone."""

    rows: Rows
    seeds: tuple[int, ...]
    loss: str = "kto"
    weigh: bool = True
    trainer: str = "kto_dist"


def as_logged(train: list[rows.Row], folder: Path, seed: int) -> Path:
    return rows.write(folder / "train.jsonl", train)


def few_good(train: list[rows.Row], folder: Path, seed: int) -> Path:
    return rows.write(folder / "train.jsonl", rows.fewer_good(train, 0.9, seed))


def flipped(share: float, *, cleaned: bool) -> Rows:
    def made(train: list[rows.Row], folder: Path, seed: int) -> Path:
        log = rows.write(folder / "train.jsonl", rows.flipped(train, share, seed))
        return rows.mined(log, folder / "mined") if cleaned else log

    return made


def downvoted(**users: float) -> Rows:
    def made(train: list[rows.Row], folder: Path, seed: int) -> Path:
        log = rows.write(folder / "train.jsonl", rows.downvoted(train, seed))
        return rows.mined(log, folder / "mined", **users)

    return made


RUNS = {
    "kto": Arm(rows=as_logged, seeds=(0, 1, 2)),
    "apo": Arm(rows=as_logged, seeds=(0, 1, 2), loss="apo_zero_unpaired"),
    "trl": Arm(rows=as_logged, seeds=(0, 1, 2), trainer="trl"),
    "few good, weighed": Arm(rows=few_good, seeds=(0, 1)),
    "few good, not weighed": Arm(rows=few_good, seeds=(0, 1), weigh=False),
    "flipped 0": Arm(rows=flipped(0.0, cleaned=False), seeds=(0,)),
    "flipped 0.2": Arm(rows=flipped(0.2, cleaned=False), seeds=(0,)),
    "flipped 0.2, cleaned": Arm(rows=flipped(0.2, cleaned=True), seeds=(0,)),
    "flipped 0.4": Arm(rows=flipped(0.4, cleaned=False), seeds=(0, 1)),
    "flipped 0.4, cleaned": Arm(rows=flipped(0.4, cleaned=True), seeds=(0, 1)),
    "downvoters": Arm(rows=downvoted(volume=0.0, bias=0.0), seeds=(0, 1)),
    "downvoters, shrunk": Arm(rows=downvoted(), seeds=(0, 1)),
}
"""By name; 24 runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Arms side by side."""

    name: str
    arms: dict[str, str]
    """Title in the table -> name in RUNS."""
    pairs: tuple[tuple[str, str], ...]
    """Names in RUNS: the first minus the second, over the seeds that both have."""


QUESTIONS = (
    Question(
        name="imbalance",
        arms={
            "all rows": "kto",
            "a tenth of the good rows, weights by the rule": "few good, weighed",
            "a tenth of the good rows, every row weighs 1": "few good, not weighed",
        },
        pairs=(("few good, weighed", "kto"), ("few good, weighed", "few good, not weighed")),
    ),
    Question(
        name="flips",
        arms={
            "no vote flipped": "flipped 0",
            "20 % flipped": "flipped 0.2",
            "20 % flipped, cleaned": "flipped 0.2, cleaned",
            "40 % flipped": "flipped 0.4",
            "40 % flipped, cleaned": "flipped 0.4, cleaned",
        },
        pairs=(("flipped 0.2, cleaned", "flipped 0.2"), ("flipped 0.4, cleaned", "flipped 0.4")),
    ),
    Question(
        name="downvoters",
        arms={"votes weigh alike": "downvoters", "users shrunk": "downvoters, shrunk"},
        pairs=(("downvoters, shrunk", "downvoters"),),
    ),
    Question(name="z0", arms={"`kto`": "kto", "`apo_zero_unpaired`": "apo"}, pairs=(("apo", "kto"),)),
    Question(name="peer", arms={"kto_dist": "kto", "TRL's `KTOTrainer`": "trl"}, pairs=(("kto", "trl"),)),
)


def names() -> list[tuple[str, int]]:
    """Arm and seed of every run, seed 0 of all first: a benchmark that ends early has said something of each."""
    found = [(name, seed) for name, arm in RUNS.items() for seed in arm.seeds]
    return sorted(found, key=lambda run: run[1])


# ---- 3. results ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """The mean of several figures over the same rows: of one arm's seeds."""

    figures: tuple[Figure, ...]

    def of(self, times: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.mean([figure.of(times) for figure in self.figures], axis=0)
        return found

    @property
    def rests_on(self) -> np.ndarray:
        return np.asarray(np.any([figure.rests_on for figure in self.figures], axis=0))

    def prompts(self, member: np.ndarray) -> int:
        return min(figure.prompts(member) for figure in self.figures)

    def alike(self, value: float, member: np.ndarray) -> float | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Heldout:
    """S rows."""

    desirable: np.ndarray
    """(S,) bool"""
    prompts: np.ndarray
    """(S,) int64"""
    pairs: np.ndarray = field(init=False)
    """(P, 2) int64, every good answer with every bad one of its prompt"""

    def __post_init__(self) -> None:
        good, bad = np.flatnonzero(self.desirable), np.flatnonzero(~self.desirable)
        same = self.prompts[good][:, None] == self.prompts[bad][None, :]
        first, second = np.nonzero(same)
        object.__setattr__(self, "pairs", np.stack([good[first], bad[second]], axis=1))

    @property
    def members(self) -> np.ndarray:  # (S + P,)
        return np.concatenate([self.prompts, self.prompts[self.pairs[:, 0]]])


def numbers(line: str) -> np.ndarray:
    return np.array(line.split(), np.float64)


def figures_of(ratios: np.ndarray, heldout: Heldout) -> dict[str, Figure]:  # (S,) nats
    """Of one run. A row is right where its log-ratio lies on its label's side of 0; classes count alike."""
    empty, good = np.zeros(len(heldout.pairs)), heldout.desirable

    def over(values: np.ndarray, counted: np.ndarray) -> Mean:
        return Mean(values=np.append(values, empty), counted=np.append(counted, empty > 0))

    above = (np.sign(ratios) + 1) / 2
    margins = ratios[heldout.pairs[:, 0]] - ratios[heldout.pairs[:, 1]]
    of_good, of_bad = over(ratios, good), over(ratios, ~good)
    return {
        "auc": Area(
            score=np.append(ratios, empty),
            desirable=np.append(good, empty > 0),
            counted=np.append(np.ones(len(ratios), bool), empty > 0),
        ),
        "pairs": Mean(
            values=np.append(np.zeros(len(ratios)), (np.sign(margins) + 1) / 2),
            counted=np.append(np.zeros(len(ratios), bool), empty == 0),
        ),
        "accuracy": Average(figures=(over(above, good), over(1 - above, ~good))),
        "good": of_good,
        "bad": of_bad,
        "margin": Difference(first=of_good, second=of_bad),
    }


def results_of(runs: list[dict[str, Any]], heldout: Heldout) -> list[dict[str, Any]]:
    """A line an arm, and a line a difference of two, of the runs that there are."""
    of_run = {(run["arm"], run["seed"]): figures_of(numbers(run["ratios"]), heldout) for run in runs}

    def seeds(arm: str) -> set[int]:
        return {seed for name, seed in of_run if name == arm}

    def averages(arm: str, over: set[int]) -> dict[str, Figure]:
        chosen = [of_run[arm, seed] for seed in sorted(over)]
        return {name: Average(figures=tuple(own[name] for own in chosen)) for name in chosen[0]}

    lines: list[dict[str, Any]] = []
    wanted: dict[str, Figure] = {}
    once = np.ones((1, len(heldout.members)))
    for arm in RUNS:
        if own := seeds(arm):
            found = averages(arm, own)
            by_seed = [round(float(of_run[arm, seed]["auc"].of(once)[0]), 4) for seed in sorted(own)]
            line = {"arm": arm, "seeds": sorted(own), "auc_by_seed": by_seed}
            wanted |= {f"{len(lines)} {name}": figure for name, figure in found.items()}
            lines.append(line | {name: {"value": float(figure.of(once)[0])} for name, figure in found.items()})
    for question in QUESTIONS:
        for first, second in question.pairs:
            if own := seeds(first) & seeds(second):
                ours, theirs = averages(first, own), averages(second, own)
                found = {name: Difference(first=ours[name], second=theirs[name]) for name in ours}
                line = {"arm": first, "minus": second, "seeds": sorted(own)}
                wanted |= {f"{len(lines)} {name}": figure for name, figure in found.items()}
                lines.append(line | {name: {"value": float(figure.of(once)[0])} for name, figure in found.items()})
    for key, interval in intervals(wanted, heldout.members).items():
        number, _, name = key.partition(" ")
        lines[int(number)][name] = {
            "value": round(interval.value, 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
        }
    return lines


# ---- 1 and 2 ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of all runs; a file of results with other ones is not gone on with."""

    model: str
    log: str
    steps: int
    global_batch: int
    lr: float
    beta: float
    max_length: int
    heldout_prompts: int
    dtype: str


class Worker:
    """A process that makes one run after the other: what it imports, it imports once."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        script = str(Path(__file__).with_name("evidence_runs.py"))
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def run(self, job: Path, result: Path) -> dict[str, Any]:
        """Raises `ClickException` where it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(job), str(result)]) + "\n")
        self._process.stdin.flush()
        if not any(line.strip() == DONE for line in self._process.stdout):
            said = self._log.read_text(encoding="utf-8", errors="replace")
            raise click.ClickException(f"{job} ended with status {self._process.wait()}:\n{said[-3000:]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(
    name: str, seed: int, settings: Settings, model: str, log: str, work: Path, workers: dict[str, Worker]
) -> dict[str, Any]:
    """`workers`: trainer -> its process, which is started when it is first needed. Raises `ClickException`."""
    arm = RUNS[name]
    folder = work / f"{name}-{seed}".replace(" ", "-").replace(",", "")
    train, heldout = rows.split(rows.read(Path(log)), settings.heldout_prompts)
    file = arm.rows(train, folder, seed)
    job = Job(
        model=model,
        train=str(file),
        heldout=str(rows.write(work / "heldout.jsonl", heldout)),
        folder=str(folder / "trained"),
        store=str(work / "store"),
        cache=str(work / "tokenised"),
        loss=arm.loss,
        weigh=arm.weigh,
        trainer=arm.trainer,
        dtype=settings.dtype,
        seed=seed,
        steps=settings.steps,
        global_batch=settings.global_batch,
        lr=settings.lr,
        beta=settings.beta,
        max_length=settings.max_length,
    )
    given, taken = folder / "job.json", folder / "result.json"
    records.write_json(given, asdict(job))
    if arm.trainer not in workers:
        workers[arm.trainer] = Worker(work / f"{arm.trainer}.log")
    found = workers[arm.trainer].run(given, taken)
    labels = rows.mined_rows(file) if file.suffix == ".parquet" else rows.read(file)
    good = sum(bool(row["label"]) for row in labels) / len(labels)
    return {
        "arm": name,
        "seed": seed,
        "desirable": round(good, 4),
        "wrong_labels": round(rows.wrong(labels), 4),
        **found,
        # in one line each
        **{key: " ".join(f"{value:.4g}" for value in found[key]) for key in ("loss", "kl_raw", "kl") if key in found},
    }


def heldout_of(held: Mapping[str, str]) -> Heldout:
    return Heldout(desirable=numbers(held["desirable"]) > 0, prompts=numbers(held["prompts"]).astype(np.int64))


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True, help="Hugging Face folder (see `make demo`)")
@click.option("--log", default="launch/demo/thumbs.jsonl", show_default=True, help="answers and thumbs")
@click.option("--steps", default=12, show_default=True, help="updates of a run")
@click.option("--global-batch", default=8, show_default=True, help="rows of an update")
@click.option("--lr", default=3e-5, show_default=True, help="constant learning rate")
@click.option("--beta", default=0.2, show_default=True)
@click.option("--heldout-prompts", default=40, show_default=True, help="prompts that no run trains on")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp32"]))
@click.option("--most", default=None, type=int, help="end after so many runs; the same command goes on")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(RUNS)), help="these alone")
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="results, and what is done already")
@click.option("--work", default=None, type=click.Path(path_type=Path), help="folder of store and tokens; is kept")
def main(
    model: str, log: str, most: int | None, arms: tuple[str, ...], file: Path | None, work: Path | None, **given: Any
) -> None:
    """Runs what --json has not yet, and says what came out."""
    if not Path(model, "config.json").exists():
        raise click.UsageError(f"--model ({model}) holds no model: run `make demo` once, or name a folder")
    settings = Settings(model=Path(model).name, log=Path(log).name, max_length=256, **given)
    fresh = records.frame("evidence", asdict(settings)) | {"heldout": None, "runs": [], "results": []}
    content = records.started(file, fresh)
    done = {(run["arm"], run["seed"]) for run in content["runs"]}
    todo = [run for run in names() if run not in done and (not arms or run[0] in arms)]
    console, workers, where = Console(highlight=False), dict[str, Worker](), str(Path(model).resolve())
    with tempfile.TemporaryDirectory(prefix="kto-evidence-") as folder:
        for name, seed in todo[:most]:
            begun = time.monotonic()
            one = run(name, seed, settings, where, log, (work or Path(folder)).resolve(), workers)
            held = one.pop("heldout")
            assert content["heldout"] in (None, held), "other held-out rows"
            content["heldout"] = held
            content["runs"].append(one)
            content["results"] = results_of(content["runs"], heldout_of(held))
            records.write_json(file, content)
            console.print(f"{name}, seed {seed}: {time.monotonic() - begun:.0f} s")
        for worker in workers.values():
            worker.end()
    show(content, console)


def show(content: dict[str, Any], console: Console) -> None:
    table = Table("arm", "seeds", "AUC", "pairs", "accuracy", "margin")
    for line in content["results"]:
        cells = []
        for name in ("auc", "pairs", "accuracy", "margin"):
            own = line[name]
            span = f" ({own['low']:.2f} to {own['high']:.2f})" if "low" in own else ""
            cells.append(f"{own['value']:.3f}{span}")
        title = line["arm"] + (f" - {line['minus']}" if "minus" in line else "")
        table.add_row(title, " ".join(map(str, line["seeds"])), *cells)
    console.print(table)
    left = len(names()) - len(content["runs"])
    console.print(f"{len(content['runs'])} runs are done, {left} are left")


if __name__ == "__main__":
    main()

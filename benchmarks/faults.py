"""Faults injected into runs, and what became of them: survived, told and refused, or lost.

    python benchmarks/faults.py --json benchmarks/results/cpu-faults.json [--minutes 18]

A tiny run of ten steps, with a checkpoint every other one, is disturbed once (`fault_kinds.py` has the ways), and
started again as its user would start it. Its weights are compared with those of a run that nobody disturbed. Half of
the trials run on two ranks. Kinds come in random order until the time is over, so that each gets its share. Full and
read-only disks are small file systems of their own, which only root can mount; without it those trials are left out.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from kto_dist.base.ports import free_port

STEPS, EVERY = 10, 2
LIMIT = 120.0
"""Seconds after which a start hangs."""
NEAR = 1e-4
"""Relative distance of weights: a kill within the reference's pass changes last digits."""

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
_server = multiprocessing.get_context("forkserver")


def _rank(folder: Path, environment: dict[str, str], said: Path) -> None:
    """What every rank of a job runs; it never returns."""
    os.environ.update(environment)
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    import torch

    from kto_dist.commands.entry import run_and_leave

    torch.set_num_threads(1)
    run_and_leave(["train", str(folder / "config.yaml")])


class Job:
    """One start of a run, with what a launcher does: when a rank fails, the others are ended."""

    def __init__(self, folder: Path, ranks: int):
        self.said = folder / f"said-{len(list(folder.glob('said-*')))}"
        port, self.processes = str(free_port()), []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment = own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            process = _server.Process(target=_rank, args=(folder, environment, self.said))
            process.start()
            self.processes.append(process)

    def runs(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def kill(self, number: int, rank: int | None = None) -> None:
        for place, process in enumerate(self.processes):
            if process.exitcode is None and rank in (None, place):
                os.kill(process.pid, number)

    def wait(self) -> int | None:
        """The status of the first rank that failed, or 0; None where the job hangs."""
        deadline = time.monotonic() + LIMIT
        while any(process.exitcode is None for process in self.processes):
            failed = [process.exitcode for process in self.processes if process.exitcode]
            if failed:  # a launcher looks once a second
                time.sleep(1.0)
                self.kill(signal.SIGTERM)
                self._join(20.0)
                self.kill(signal.SIGKILL)
                self._join(20.0)
                return failed[0]
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                self._join(20.0)
                return None
            time.sleep(0.02)
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def words(self) -> str:
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Where the seconds of a run go."""

    begin: float
    """From its start to the line of its first step."""
    step: float
    """From one line to the next."""
    end: float
    """From the last line until all ranks have left."""


NO_PACE = Pace(begin=0.0, step=0.0, end=0.0)


@dataclass
class Trial:
    """A run that is going to be disturbed."""

    folder: Path
    ranks: int
    draw: random.Random
    pace: Pace
    """Of an undisturbed run."""
    lost: int = 0
    """Steps that were done twice."""
    wrong: list[str] = field(default_factory=list)
    """What should not have happened on the way."""

    @property
    def output(self) -> Path:
        return self.folder / "disk" / "run"

    def start(self) -> Job:
        return Job(self.folder, self.ranks)

    def steps_done(self) -> int:
        file = self.output / "metrics.jsonl"
        numbers = re.findall(rb'^\{"step": (\d+),', file.read_bytes(), re.MULTILINE) if file.exists() else []
        return max(map(int, numbers), default=0)

    def log(self) -> int | None:
        """Which file the steps' lines stand in: a run that begins, or goes on, writes another."""
        file = self.output / "metrics.jsonl"
        return file.stat().st_ino if file.exists() else None

    def wait_for_a_moment(self, job: Job) -> bool:
        """Until a moment of a run that was just started, which chance draws: before its first step, among its steps, or
        in the first half of what follows. False where it has ended by then.

        Steps are counted, not seconds: one run is faster than another, and a kill after its end is none.
        """
        pace, log, started = self.pace, self.log(), time.monotonic()
        first = self.steps_done() // EVERY * EVERY + 1
        among = pace.step * max(0, STEPS - first)
        at = self.draw.uniform(0.0, pace.begin + among + pace.end / 2) - pace.begin
        steps = min(first + int(at / pace.step), STEPS) if at >= 0 else first

        def there() -> bool:
            done = self.log() != log and self.steps_done() >= steps
            return done or (at < 0 and time.monotonic() - started >= pace.begin + at)

        while job.runs() and not there():
            time.sleep(0.001)
        if at >= 0:
            time.sleep(at - among if at >= among else at % pace.step)
        return job.runs()

    def again(self) -> tuple[int | None, str]:
        """Starts the run again; its status and words."""
        done = self.steps_done()
        job = self.start()
        status, words = job.wait(), job.words()
        found = re.search(r"going on from step-(\d+)", words)
        if status == 0:
            self.lost += max(0, done - (int(found[1]) if found else 0))
        return status, words

    def refused(self, status: int | None, words: str) -> str | None:
        """Whether a start ended with a sentence for its user; else what it was."""
        if status == 2 and "error: " in words and "Traceback" not in words:
            return None
        return "hangs" if status is None else f"status {status}: {' '.join(words.split())[-300:]}"


def write_config(folder: Path, model: Path, log: Path) -> None:
    import yaml

    train = {"output": str(folder / "disk" / "run"), "global_batch": 8, "max_steps": STEPS, "lr": 1e-3, "eps": 1e-4}
    precision = {"dtype": "fp32", "tokens_per_microbatch": 256}
    tree = {
        "model": {"path": str(model)},
        "reference": {"store": str(folder / "store"), "dtype": "fp32", "tokens_per_batch": 256},
        "data": {
            "train": str(log),
            "heldout": 0.2,
            "max_length": 64,
            "cache": str(folder / "tokenised"),
            "workers": 1,
        },
        "train": train | precision,
        "checkpoint": {"every_steps": EVERY},
        "tracking": {"enabled": False, "report": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "disk").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


@dataclass(frozen=True)
class Ready:
    """What trials of a number of ranks begin from."""

    whole: Path
    """A run that nobody disturbed."""
    half: Path
    """One that was killed on its way, with checkpoints."""
    pace: Pace
    bytes_written: int


def distance(first: Path, second: Path) -> float:
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (first, second))
    return max(float((theirs[name] - tensor).norm() / tensor.norm()) for name, tensor in ours.items())


def prepared(root: Path, ranks: int, model: Path, log: Path) -> Ready:
    whole, half = root / f"whole-{ranks}", root / f"half-{ranks}"
    for folder in (whole, half):
        write_config(folder, model, log)
    Job(whole, ranks).wait()  # the first one loads libraries that later ones share
    shutil.rmtree(whole)
    write_config(whole, model, log)
    pace, status, words = paced(Trial(folder=whole, ranks=ranks, draw=random.Random(0), pace=NO_PACE))
    if status != 0:
        sys.exit(f"the undisturbed run ends with {status}:\n{words}")
    run = whole / "disk" / "run"
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    trial = Trial(folder=half, ranks=ranks, draw=random.Random(0), pace=pace)
    job = trial.start()
    while trial.steps_done() < 7 and job.runs():
        time.sleep(0.005)
    job.kill(signal.SIGKILL)
    job.wait()
    for file in half.glob("said-*"):
        file.unlink()
    return Ready(whole=whole, half=half, pace=pace, bytes_written=size)


def paced(trial: Trial) -> tuple[Pace, int | None, str]:
    """Runs it undisturbed; its status and words as well."""
    job, started, seen = trial.start(), time.monotonic(), dict.fromkeys((1, STEPS), 0.0)
    while job.runs() and not seen[STEPS]:
        done, now = trial.steps_done(), time.monotonic() - started
        seen = {step: at or (now if done >= step else 0.0) for step, at in seen.items()}
        time.sleep(0.001)
    status = job.wait()
    step = (seen[STEPS] - seen[1]) / (STEPS - 1)
    return Pace(begin=seen[1], step=step, end=time.monotonic() - started - seen[STEPS]), status, job.words()


Verdict = tuple[str, str]
"""survived (to the bit), near (to rounding), told or lost; and a note."""


def judged(trial: Trial, ready: Ready) -> Verdict:
    """Starts the run again, and looks at what it came to."""
    status, words = trial.again()
    if trial.wrong:
        return "lost", "; ".join(trial.wrong)
    if status != 0:
        reason = trial.refused(status, words)
        return ("told", words[words.index("error: ") :][:200]) if reason is None else ("lost", reason)
    apart = distance(ready.whole / "disk" / "run", trial.output)
    if apart > NEAR:
        return "lost", f"weights differ by {apart:.2g}"
    return "survived" if apart == 0 else "near", ""


def count(results: list[tuple[str, Verdict, int]]) -> list[dict[str, object]]:
    """A line a kind."""
    lines: dict[str, dict[str, object]] = {}
    for name, (verdict, note), lost in results:
        empty = dict.fromkeys(("injected", "survived", "exact", "told", "lost", "steps_lost", "most_steps_lost"), 0)
        line = lines.setdefault(name, {"fault": name, **empty, "notes": []})
        line["injected"] += 1
        line["survived"] += verdict in ("survived", "near")
        line["exact"] += verdict == "survived"
        line["told"] += verdict == "told"
        line["lost"] += verdict == "lost"
        line["steps_lost"] += lost
        line["most_steps_lost"] = max(line["most_steps_lost"], lost)
        if verdict == "lost":
            line["notes"].append(note)
    return list(lines.values())


def sweep(root: Path, minutes: float, seed: int, only: str) -> tuple[list[dict[str, object]], int]:
    import fault_kinds
    import random_model

    model, log = root / "model", root / "log.jsonl"
    random_model.make_model("tiny", model)
    random_model.write_log("tiny", "mixed", 160, 400, log)
    ready = {ranks: prepared(root, ranks, model, log) for ranks in (1, 2)}
    deadline = time.monotonic() + 60 * minutes
    draw, results, trials = random.Random(seed), [], 0
    kinds = [kind for kind in fault_kinds.KINDS if only in kind.name]
    while time.monotonic() < deadline:
        for kind in draw.sample(kinds, len(kinds)):
            if time.monotonic() >= deadline:
                break
            ranks, trials = draw.choice((1, 2)), trials + 1
            folder = root / f"trial-{trials}"
            if kind.begun:
                shutil.copytree(ready[ranks].half, folder)
            write_config(folder, model, log)
            trial = Trial(folder=folder, ranks=ranks, draw=draw, pace=ready[ranks].pace)
            with kind.disk(folder / "disk", ready[ranks].bytes_written, draw) as usable:
                injected = usable and kind.inject(trial)
                verdict = judged(trial, ready[ranks]) if injected else ("", "")
            if injected:
                results.append((kind.name, verdict, trial.lost))
                said = f"{verdict[0]}, {trial.lost} steps {verdict[1]}"
                print(f"{trials}: {kind.name}, {ranks} ranks: {said}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    order = [kind.name for kind in kinds]
    return sorted(count(results), key=lambda line: order.index(str(line["fault"]))), len(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--minutes", type=float, default=18.0, help="how long (18)")
    parser.add_argument("--only", default="", help="kinds whose name has these words")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places (0)")
    arguments = parser.parse_args()
    import records

    _server.set_forkserver_preload(["kto_dist.training.loop", "transformers.models.llama.modeling_llama"])
    with tempfile.TemporaryDirectory() as root:
        lines, trials = sweep(Path(root), arguments.minutes, arguments.seed, arguments.only)
    print(json.dumps(lines, indent=1))
    if arguments.json:
        settings = {"steps": STEPS, "checkpoint_every": EVERY, "trials": trials, "seed": arguments.seed}
        records.write_json(arguments.json, records.frame("faults", settings) | {"results": lines})


if __name__ == "__main__":
    main()

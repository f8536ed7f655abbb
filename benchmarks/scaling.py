"""Scaling, and the planner beside it: what a step takes at one and two ranks and nodes, and curves to 4,096 GPUs.

    python benchmarks/scaling.py [--random NAME] [--json FILE]        # measures, on whatever machine this is
    python benchmarks/scaling.py --again --json FILE                  # computes anew beside what FILE has measured
    python benchmarks/scaling.py --curves [--json FILE] [--plot FILE] # computes; nothing runs

1. memory    full training and LoRA, ZeRO 0 to 3, with and without checkpointing: measured and predicted peaks
2. time      ZeRO 1 to 3 with and without checkpointing at one rank; strong (one global batch) and weak (one a rank)
             at one rank, two ranks of a node, and two nodes of a rank; the share that is no compute of a rank alone;
             what a checkpoint costs. Beside them the planner's seconds, calibrated by the one run at one rank, and by
             what as many ranks at once show of this machine (`kto_dist.cluster.rates`)
3. curves    tokens a second and GPU for an 8 billion parameter model, 1 to 4,096 GPUs, as computed

The planner is given the very rows of the steps that are measured: what is tested is its arithmetic. A file that is
there already is gone on with: its cases are not run again, so that parts (`--case`, `--most`, `--turns`) add up. Of
several turns the median of their medians counts.

Two nodes are two processes that think they are on machines of their own (LOCAL_RANK 0 of both), on this one: what they
show is the code's way, not a network's.
"""

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import click
import machine
import random_model
import records
import scaling_curves
import scaling_runs
import scaling_table
from scaling_cases import STEPS, Case, config_of, memory_cases, time_cases, warm

Line = dict[str, Any]
Planned = Callable[[Line, float], tuple[float, float]]
"""Of a line and the factor of compute times: seconds of a step as computed, and those of collectives in them."""


def measure(content: dict[str, Any], case: Case, model: Path, log: Path, limit: float) -> None:
    """Adds a line to the results, or a turn to one that is there; of a run that fails it is said why."""
    settings, steps = content["settings"], content["settings"]["steps"]
    with tempfile.TemporaryDirectory(prefix="kto-scaling-") as name:
        folder = Path(name)
        config = config_of(case, model, log, folder, settings["max_length"], settings["tokens_per_microbatch"], steps)
        try:
            found = scaling_runs.run(config, case, folder, steps, limit)
        except click.ClickException as error:
            click.echo(f"left out: {error.message}")
            return
    own = statistics.median(found["seconds"])
    for line in content["results"]:
        if _key(line) == (case.name, case.memory):
            line["turns"].append(own)
            line["seconds_per_step"] = statistics.median(line["turns"])
            return
    content["results"].append(
        {
            "case": case.name,
            **asdict(case),
            "seconds_per_step": own,
            "turns": [own],
            "bytes": found["peak_bytes"],
            "held_bytes": found["held_bytes"],
        }
    )


def measure_machine(content: dict[str, Any], case: Case) -> None:
    """What as many ranks at once as the run had show of this machine: the most that it has shown, since whatever else
    runs there takes from it."""
    from kto_dist.cluster.measure import rates_here

    if not content["gpu"] and case.memory:
        return
    found = asdict(rates_here(case.ranks, None if machine.has_gpu() else 1))
    before = content["rates"].setdefault(str(case.ranks), found)
    if found["flops"] / found["crowding"] > before["flops"] / before["crowding"]:
        content["rates"][str(case.ranks)] = found


def _key(line: Line) -> tuple[str, bool]:
    return line["case"], line["memory"]


def _timed(line: Line, content: dict[str, Any]) -> bool:
    """Whether a run's seconds count: counting memory takes none on a GPU."""
    return content["gpu"] or not line["memory"]


def compute(content: dict[str, Any], model: Path, log: Path, jobs: dict[tuple[str, bool], Any]) -> None:
    """The planner's figures, beside what was measured. `jobs`: of the lines that this process has seen."""
    from kto_dist.cluster.hardware import calibrated as with_factor
    from kto_dist.cluster.measure import this_machine
    from kto_dist.cluster.predict import predict
    from kto_dist.cluster.rates import Rates, read
    from kto_dist.model.loading import load_config, without_contents

    lm = without_contents(load_config(str(model)))
    machines = {ranks: this_machine(read(found), int(ranks)) for ranks, found in content["rates"].items()}
    # of memory nothing is asked but how much there is
    idle = this_machine(Rates(flops=1.0, bandwidth=1.0))
    for line in content["results"]:
        here = machines[str(line["ranks"])] if _timed(line, content) else idle
        if _key(line) not in jobs:
            jobs[_key(line)] = _job(line, content, lm, here, model, log)
        shape, way, steps = jobs[_key(line)]
        if line["memory"]:
            line["computed_bytes"] = max(predict(shape, rows, here, way).memory.peak for rows in steps)

    def planned(line: Line, factor: float) -> tuple[float, float]:
        shape, way, steps = jobs[_key(line)]
        here = with_factor(machines[str(line["ranks"])], factor)
        found = [predict(shape, rows, here, way).seconds for rows in steps]
        return statistics.median(each.total for each in found), statistics.median(each.collectives for each in found)

    calibrate([line for line in content["results"] if _timed(line, content)], planned)


def _job(line: Line, content: dict[str, Any], lm: Any, here: Any, model: Path, log: Path) -> tuple[Any, Any, list[Any]]:
    """The planner's outline of the model, the way to run it, and the rows of each step that counts."""
    from kto_dist.base.console import Console
    from kto_dist.cluster.measure import way_here
    from kto_dist.cluster.plan import shape_for
    from kto_dist.cluster.workload import of_rows
    from kto_dist.data.batch import step_rows
    from kto_dist.model.adapters import RANK
    from kto_dist.training.prepare import prepare

    settings, steps = content["settings"], content["settings"]["steps"]
    given = {field.name: line[field.name] for field in fields(Case)}
    case = Case(**{**given, "settings": tuple(line["settings"])})
    config = config_of(
        case, model, log, log.parent / "run", settings["max_length"], settings["tokens_per_microbatch"], steps
    )
    shape = shape_for(lm, "lora" if case.adapter else "full", RANK)
    with contextlib.redirect_stdout(io.StringIO()):  # what the run has said already
        prepared = prepare(config, Console())
    whole, found = of_rows(prepared), []
    for step in range(warm(steps), steps):
        rows = step_rows(prepared.plan, step)
        found.append(replace(whole, prompts=whole.prompts[rows], answers=whole.answers[rows]))
    return shape, way_here(config, shape, here), found


def calibrate(lines: list[Line], planned: Planned) -> None:
    """Writes the planner's seconds into the lines: as computed, and with compute times as the run at one rank shows
    them, as `kto-dist plan --measure` has it."""
    for line in lines:
        line["computed_seconds"], line["computed_collectives"] = planned(line, 1.0)
    alone = next((line for line in lines if line["case"] == "one rank"), None)
    if alone is None:
        return
    factor = alone["seconds_per_step"] / alone["computed_seconds"]
    half = next((line for line in lines if line["case"] == "one rank, half the batch"), alone)
    plain = {False: alone, True: next((line for line in lines if line["case"] == "ZeRO 3"), alone)}
    for line in lines:
        line["calibrated_seconds"], line["calibrated_collectives"] = planned(line, factor)
        if line["ranks"] > 1:
            own = half if "strong" in line["case"] else plain["ZeRO 3" in line["case"]]
            line["no_compute"] = 1 - own["seconds_per_step"] / line["seconds_per_step"]
        if line["checkpoints"]:
            line["checkpoint_seconds"] = line["seconds_per_step"] - alone["seconds_per_step"]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _chosen(
    content: dict[str, Any],
    only: str | None,
    stages: str,
    adapter_stages: str,
    named: tuple[str, ...],
    most: int | None,
    turns: int,
) -> list[Case]:
    """Those that the file does not have yet, or not so often; each case once before one comes again."""
    batch, there = content["settings"]["global_batch"], {_key(line): len(line["turns"]) for line in content["results"]}
    found = [] if only == "time" else memory_cases(_numbers(stages), _numbers(adapter_stages), batch)
    if only != "memory":
        times = time_cases(batch, alone=content["gpu"])
        # on a GPU a run for its memory shows its seconds as well; that by which others are calibrated comes first
        found = [times[0], *found] if content["gpu"] and only is None else found + times
    found = [case for case in found if not named or case.name in named]
    wanted = []
    for turn in range(turns):
        # memory is the same each time
        timed = [case for case in found if turn == 0 or not case.memory]
        wanted += [case for case in timed if there.get((case.name, case.memory), 0) <= turn]
    return wanted[:most]


@click.command()
@click.option("--random", "shape", type=click.Choice(list(random_model.SHAPES)), default="tiny", show_default=True)
@click.option("--random-folder", type=click.Path(path_type=Path), help="keep the random model here, or find it here")
@click.option("--only", type=click.Choice(["memory", "time"]), help="one half of it")
@click.option("--stages", default="0,1,2,3", show_default=True, help="ZeRO stages whose memory is measured")
@click.option("--adapter-stages", default="0,1,2,3", show_default=True, help="and those with LoRA; empty: none")
@click.option("--case", "named", multiple=True, help="these runs alone, by their names")
@click.option("--most", type=click.IntRange(min=1), help="so many more runs at the most")
@click.option("--turns", type=click.IntRange(min=1), default=1, show_default=True, help="how often times are measured")
@click.option("--global-batch", default=16, show_default=True, help="rows of a step at one rank")
@click.option("--max-length", default=256, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-microbatch", default=2048, show_default=True)
@click.option(
    "--steps", type=click.IntRange(min=2), default=STEPS, show_default=True, help="of a run, the first ones included"
)
@click.option("--limit", default=300.0, show_default=True, help="most seconds of a run")
@click.option("--again", is_flag=True, help="run nothing: compute anew beside what the file has measured")
@click.option("--curves", "only_curves", is_flag=True, help="compute the curves to 4,096 GPUs, and measure nothing")
@click.option(
    "--json", "file", type=click.Path(path_type=Path), help="write the figures to this file, or go on with it"
)
@click.option("--plot", type=click.Path(path_type=Path), help="with --curves: the picture")
def main(
    shape: str,
    random_folder: Path | None,
    only: str | None,
    stages: str,
    adapter_stages: str,
    named: tuple[str, ...],
    most: int | None,
    turns: int,
    global_batch: int,
    max_length: int,
    tokens_per_microbatch: int,
    steps: int,
    limit: float,
    again: bool,
    only_curves: bool,
    file: Path | None,
    plot: Path | None,
) -> None:
    """Measures how steps scale, with the planner's figures beside it; or computes its curves."""
    if only_curves:
        _curves(file, plot)
        return
    settings = {
        "model": shape,
        "global_batch": global_batch,
        "max_length": max_length,
        "tokens_per_microbatch": tokens_per_microbatch,
        "steps": steps,
    }
    fresh = {**records.frame("scaling", settings), "gpu": machine.has_gpu(), "rates": {}, "results": []}
    content = _measured_before(file) if again else records.started(file, fresh)
    with tempfile.TemporaryDirectory(prefix="kto-scaling-") as temporary:
        settings = content["settings"]
        model = random_folder or Path(temporary) / "model"
        model.mkdir(parents=True, exist_ok=True)
        random_model.make_model(settings["model"], model)
        log = (random_folder.parent if random_folder else Path(temporary)) / f"rows-{settings['model']}" / "rows.jsonl"
        log.parent.mkdir(exist_ok=True)
        rows = 2 * settings["global_batch"] * (settings["steps"] + 1)
        random_model.write_log(settings["model"], "mixed", rows, settings["max_length"], log)
        jobs: dict[tuple[str, bool], Any] = {}
        if not again:
            scaling_runs.prepare()
            for case in _chosen(content, only, stages, adapter_stages, named, most, turns):
                measure(content, case, model, log, limit)
                measure_machine(content, case)
                # each at once: what runs out of time keeps what it has
                compute(content, model, log, jobs)
                records.write_json(file, content)
        compute(content, model, log, jobs)
    for shown in scaling_table.gist(content):
        click.echo(shown)
    records.write_json(file, content)


def _measured_before(file: Path | None) -> dict[str, Any]:
    if file is None or not file.exists():
        raise click.ClickException(f"--again ({file}) needs a file of measurements: give it with --json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if content["gpu"] != machine.has_gpu():
        raise click.ClickException(f"{file} was measured on {content['device']}: compute it anew on such a machine")
    return content


def _curves(file: Path | None, plot: Path | None) -> None:
    content = {**records.frame("scaling-curves", {}), **scaling_curves.curves()}
    content["device"] = "computed on no device"
    records.write_json(file, content)
    if plot is not None:
        scaling_curves.draw(content, plot)
    for line in content["results"]:
        click.echo(
            f"{line['gpu']:8} {line['gpus']:5,} {line['tokens_per_second_and_gpu']:10,.0f} mfu {line['mfu']:.0%}"
        )


if __name__ == "__main__":
    main()

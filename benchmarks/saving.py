"""What a checkpoint costs in seconds of training: written at once, and in the background (`checkpoint.background`).

    python benchmarks/saving.py [--config launch/demo/demo.yaml] [--json FILE]

One rank trains the demo's model for some steps in a process of its own: without checkpoints, with one every few steps,
and with the same in the background. From one end of a step to the next:

1. pause   what the step after a checkpoint takes longer than others of its run
2. cost    what all steps take longer than those without checkpoints, a checkpoint: the pause, and what its thread takes
           from the steps
"""

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import machine
import records

EVERY, FIRST, LAST = 4, 3, 11
"""Steps: between checkpoints, and the ends that time is taken between. The first ones pay for what is done once."""
WAYS = {"none": None, "at once": False, "background": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is trained."""

    zero_stage: int
    dtype: str


CASES = (Case(zero_stage=2, dtype="bf16"), Case(zero_stage=0, dtype="fp32"))


def overrides_of(case: Case, way: str, folder: Path) -> list[str]:
    background = WAYS[way]
    return [
        f"deepspeed.zero_stage={case.zero_stage}",
        f"train.dtype={case.dtype}",
        "train.global_batch=8",
        f"train.max_steps={LAST + 1}",
        f"train.output={folder / 'run'}",
        f"checkpoint.every_steps={'null' if background is None else EVERY}",
        f"checkpoint.background={json.dumps(bool(background))}",
        "checkpoint.keep=1",
        "evaluate.every_steps=null",
        "answers.while_training=0",
        "tracking.enabled=false",
        "tracking.report=false",
    ]


def measure(config: str, case: Case, way: str, more: tuple[str, ...]) -> dict[str, Any]:
    """Raises `ClickException` where the run fails."""
    with tempfile.TemporaryDirectory(prefix="kto-saving-") as name:
        folder = Path(name)
        result = folder / "result.json"
        words = [config, *overrides_of(case, way, folder), *more]
        command = [sys.executable, str(Path(__file__).resolve()), "--run", str(result), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise click.ClickException(
                f"{case}, {way}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return asdict(case) | {"way": way} | json.loads(result.read_text(encoding="utf-8"))


def costs(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With pause and cost, beside the run of the same case that had no checkpoints."""
    found = []
    for line in lines:
        alone = next(
            other["seconds"]
            for other in lines
            if other["way"] == "none" and all(other[key] == line[key] for key in ("zero_stage", "dtype"))
        )
        after = [second for step, second in enumerate(line["seconds"], FIRST) if step % EVERY == 0]
        others = [second for step, second in enumerate(line["seconds"], FIRST) if step % EVERY]
        if line["way"] != "none":
            pause = statistics.mean(after) - statistics.median(others)
            line = line | {"pause": pause, "cost": (sum(line["seconds"]) - sum(alone)) / len(after)}
        found.append(line)
    return found


def train_some(result_file: Path, config: str, overrides: list[str]) -> None:
    """In a process of its own: leaves what each step took, from the end of the one before."""
    from trainers import Enough

    from kto_dist import Config, train

    ends: list[float] = []
    settings = Config.load(config, overrides)

    def after_step(result: Any) -> None:
        ends.append(machine.now())
        if len(ends) == LAST:
            raise Enough

    with suppress(Enough):
        train(settings, watch=after_step)
    checkpoints = sorted((Path(settings.train.output) / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in checkpoints[-1].rglob("*") if path.is_file()) if checkpoints else 0
    seconds = [after - before for before, after in pairwise(ends[FIRST - 1 :])]
    records.write_json(result_file, {"seconds": seconds, "checkpoint_bytes": size, "peak_bytes": machine.peak()})


@click.command(help=__doc__.split("\n\n")[0], context_settings={"ignore_unknown_options": True})
@click.option("--config", default="launch/demo/demo.yaml", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--beside", default="", help="What else the machine did meanwhile, in words.")
@click.option("--run", "result", type=click.Path(path_type=Path), hidden=True)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def main(config: str, file: Path | None, beside: str, result: Path | None, overrides: tuple[str, ...]) -> None:
    if result is not None:
        from kto_dist.base.exits import leave

        train_some(result, overrides[0], list(overrides[1:]))
        leave(0)
    lines: list[dict[str, Any]] = []
    for case in CASES:
        for way in WAYS:
            lines.append(measure(config, case, way, overrides))
            click.echo(f"{case.dtype}, ZeRO {case.zero_stage}, {way}: {sum(lines[-1]['seconds']):.1f} s")
    settings = {"config": Path(config).name, "every_steps": EVERY, "steps": LAST - FIRST}
    content = records.frame("saving", settings) | {"beside": beside, "results": costs(lines)}
    for line in content["results"]:
        if "cost" in line:
            click.echo(
                f"{line['dtype']}, {line['way']}: {line['pause']:.2f} s pause, {line['cost']:.2f} s a checkpoint"
            )
    records.write_json(file, content)


if __name__ == "__main__":
    main()

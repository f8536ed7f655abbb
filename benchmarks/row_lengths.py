"""How rows a second and memory depend on the length of rows: short chats, long prompts, long answers, for each trainer.

    python benchmarks/row_lengths.py [--random 135m] [--lengths short-chats ...] [--json FILE]

`throughput.py` once a kind of rows, on a model of random weights. `make figures` draws the results.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import machine
import random_model
import records
from throughput import job_dtype, measure
from trainers import NAMES, Job
from workload import write_rows


@click.command()
@click.option("--random", "shape", type=click.Choice(list(random_model.SHAPES)), default="135m", show_default=True)
@click.option("--random-folder", type=click.Path(path_type=Path), help="keep the model here, or find it here")
@click.option(
    "--lengths",
    "kinds",
    multiple=True,
    type=click.Choice(list(random_model.LENGTHS)),
    default=tuple(random_model.LENGTHS),
    show_default=True,
    help="kinds of rows; give it once for each",
)
@click.option("--steps", default=1, show_default=True, help="timed optimizer steps of a run")
@click.option("--warmup", default=1, show_default=True, help="steps before these")
@click.option("--global-batch", default=8, show_default=True, help="rows of a step")
@click.option("--max-length", default=1024, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-microbatch", default=4096, show_default=True, help="kto_dist's and the bare loop's")
@click.option("--trl-batch", default=4, show_default=True, help="TRL's rows a device")
@click.option("--threads", default=machine.cores(), show_default="all cores", help="threads of a process")
@click.option("--limit", type=float, help="most seconds of a run; it is left out then")
@click.option(
    "--implementation",
    "names",
    multiple=True,
    type=click.Choice(list(NAMES)),
    default=("kto_dist", "trl"),
    show_default=True,
    help="give it once for each",
)
@click.option("--json", "file", default=None, type=click.Path(path_type=Path), help="write the figures to this file")
def main(
    shape: str,
    random_folder: Path | None,
    kinds: tuple[str, ...],
    steps: int,
    warmup: int,
    global_batch: int,
    max_length: int,
    tokens_per_microbatch: int,
    trl_batch: int,
    threads: int,
    limit: float | None,
    names: tuple[str, ...],
    file: Path | None,
) -> None:
    """Measures trainers on rows of several lengths."""
    results: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        fast = random_model.fast_folder(2 * random_model.weight_bytes(shape))
        made = random_folder or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=fast)))
        random_model.make_model(shape, made)
        for kind in kinds:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kto-lengths-")))
            job = Job(
                name="kto_dist",
                model=str(made.resolve()),
                folder=str(folder),
                warmup=warmup,
                steps=steps,
                global_batch=global_batch,
                max_length=max_length,
                tokens_per_microbatch=tokens_per_microbatch,
                dtype=job_dtype(),
                threads=threads,
                trl_batch=trl_batch,
                trl_reference_batch=trl_batch,
            )
            log = folder / "log.jsonl"
            random_model.write_log(shape, kind, job.all_steps * global_batch, max_length, log)
            work = write_rows(str(log), job, folder)
            settings = {key: value for key, value in asdict(job).items() if key not in ("folder", "model", "name")}
            frame = records.frame("lengths", settings | {"model": shape})
            about = {"rows": kind, "tokens_per_row": work.training_tokens / work.training_rows}
            click.echo(f"{kind}: {about['tokens_per_row']:.0f} tokens a row")
            before = list(results)

            def write(
                lines: list[dict[str, Any]],
                losses: Any,
                missing: dict[str, str],
                *,
                kind: str = kind,
                about: dict[str, Any] = about,
                frame: dict[str, Any] = frame,
                before: list[dict[str, Any]] = before,
            ) -> None:
                results[:] = before + [about | line for line in lines]
                left_out.update({f"{kind}, {name}": why for name, why in missing.items()})
                records.write_json(file, frame | {"results": results, "left_out": left_out})

            measure(job, work, names=names, repeats=1, probed={}, write=write, limit=limit)


if __name__ == "__main__":
    main()

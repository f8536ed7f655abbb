"""Scaling, and the planner beside it: what a step takes at one and two ranks and nodes, and curves to 4,096 GPUs.

    python benchmarks/scaling.py [--shape NAME] [--json FILE]         # measures, on whatever machine this is
    python benchmarks/scaling.py --curves [--json FILE] [--plot FILE] # computes; nothing runs

1. memory    full training and LoRA, ZeRO 0 to 3, with and without checkpointing: measured and predicted peaks, a
             process each
2. time      strong (one global batch) and weak (one a rank) at one rank, two ranks of a node, and two nodes of a rank;
             the share that is no compute of a rank alone; what a checkpoint costs. Beside them the planner's seconds,
             calibrated by the one run at one rank
3. curves    tokens a second and GPU for an 8 billion parameter model, 1 to 4,096 GPUs, as computed

The planner is given the very rows of the steps that are measured: what is tested is its arithmetic.

Two nodes are two processes that think they are on machines of their own (LOCAL_RANK 0 of both), on this one: what they
show is the code's way, not a network's.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import machine
import random_model
import records

HERE = Path(__file__).resolve().parent
WARM, STEPS = 2, 5
"""Steps that do not count, and all of them."""
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("A100", "H100", "H200", "B200", "MI300X")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run."""

    name: str
    ranks: int = 1
    nodes: int = 1
    global_batch: int = 16
    settings: tuple[str, ...] = ()
    """Overrides."""
    checkpoints: bool = False
    memory: bool = False
    """Whether it is run for its memory; its seconds say nothing then."""
    adapter: bool = False


def memory_cases(stages: tuple[int, ...], adapter_stages: tuple[int, ...], batch: int) -> list[Case]:
    """At one rank."""
    found = []
    for adapter, listed in ((False, stages), (True, adapter_stages)):
        for stage in listed:
            for checkpointing in (False, True):
                words = [f"deepspeed.zero_stage={stage}", f"model.gradient_checkpointing={json.dumps(checkpointing)}"]
                words += ['adapter.type="lora"'] * adapter
                # in bf16 stage 0 becomes 1
                words += ['train.dtype="fp32"'] * (stage == 0)
                name = (
                    "LoRA, " * adapter + f"ZeRO {stage}" + ", fp32" * (stage == 0) + ", checkpointing" * checkpointing
                )
                found.append(Case(name=name, global_batch=batch, settings=tuple(words), memory=True, adapter=adapter))
    return found


def time_cases(batch: int) -> list[Case]:
    return [
        Case(name="one rank", global_batch=batch),
        Case(name="one rank, half the batch", global_batch=batch // 2),
        Case(name="two ranks, strong", ranks=2, global_batch=batch),
        Case(name="two ranks, weak", ranks=2, global_batch=2 * batch),
        Case(name="two nodes, strong", ranks=2, nodes=2, global_batch=batch),
        Case(name="two nodes, weak", ranks=2, nodes=2, global_batch=2 * batch),
        Case(name="one rank, a checkpoint a step", global_batch=batch, checkpoints=True),
    ]


def config_of(case: Case, model: Path, log: Path, folder: Path, length: int, tokens: int) -> Any:
    from kto_dist.training.config import Config

    given = {
        "model": {"path": str(model)},
        "reference": {"store": str(folder / "store")},
        "data": {"train": str(log), "max_length": length, "cache": str(folder / "tokenised"), "workers": 1},
        "train": {
            "output": str(folder / "run"),
            "global_batch": case.global_batch,
            "max_steps": STEPS + 1,
            "tokens_per_microbatch": tokens,
        },
        "tracking": {"enabled": False, "report": False},
    }
    if case.checkpoints:
        given["checkpoint"] = {"every_steps": 1, "keep": 1}
    for word in case.settings:
        name, value = word.split("=")
        section, key = name.split(".")
        given.setdefault(section, {})[key] = json.loads(value)
    return Config.build(given)


def run(config: Any, case: Case, folder: Path, limit: float) -> dict[str, Any]:
    """What rank 0 leaves. Raises `ClickException` where a rank fails."""
    from kto_dist.base.config import to_yaml

    file, result = folder / "config.yaml", folder / "result.json"
    file.write_text(to_yaml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(case.ranks):
        local = rank if case.nodes == 1 else 0
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(HERE / "scaling_rank.py"), str(file), str(result), str(WARM), str(STEPS)]
        command += ["memory"] * case.memory
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = ""
    try:
        for process in processes:
            said += process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        raise click.ClickException(f"{case.name} took more than {limit:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
    if not result.exists():
        raise click.ClickException(f"{case.name} left no result:\n" + "\n".join(said.splitlines()[-15:]))
    return json.loads(result.read_text())


def measure(
    cases: list[Case], shape: str, model: Path, log: Path, length: int, tokens: int, limit: float
) -> list[dict[str, Any]]:
    """A line a case: measured, and as the planner has it."""
    from kto_dist.cluster.measure import this_machine
    from kto_dist.model.loading import load_config, without_contents

    lm, lines = without_contents(load_config(str(model))), []
    threads = None if machine.has_gpu() else 1
    machines = {ranks: this_machine(ranks, threads) for ranks in {case.ranks for case in cases}}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="kto-scaling-") as name:
            folder = Path(name)
            config = config_of(case, model, log, folder, length, tokens)
            try:
                found = run(config, case, folder, limit)
            except click.ClickException as error:
                click.echo(f"left out: {error.message}")
                continue
            planned = predictions(config, case, lm, machines[case.ranks])
        line = {
            "case": case.name,
            "shape": shape,
            **asdict(case),
            "seconds_per_step": statistics.median(found["seconds"]),
            "computed_seconds": statistics.median(step.seconds.total for step in planned),
            "computed_collectives": statistics.median(step.seconds.collectives for step in planned),
            "bytes": found["peak_bytes"],
            "held_bytes": found["held_bytes"],
            "computed_bytes": max(step.memory.peak for step in planned),
        }
        shown = f"{line['seconds_per_step']:8.3f} s ({line['computed_seconds']:.3f} computed)"
        if case.memory:
            ratio = line["computed_bytes"] / line["bytes"]
            shown = f"{line['bytes'] / 2**20:8,.1f} MiB ({line['computed_bytes'] / 2**20:,.1f} computed, {ratio:.2f})"
        click.echo(f"{case.name:36} {shown}")
        lines.append(line)
    return calibrated(lines)


def predictions(config: Any, case: Case, lm: Any, here: Any) -> list[Any]:
    """Of each step that counts, by its own rows."""
    from kto_dist.base.console import Console
    from kto_dist.cluster.measure import way_here
    from kto_dist.cluster.plan import shape_for
    from kto_dist.cluster.predict import predict
    from kto_dist.cluster.workload import of_rows
    from kto_dist.data.batch import step_rows
    from kto_dist.model.adapters import RANK
    from kto_dist.training.prepare import prepare

    shape = shape_for(lm, "lora" if case.adapter else "full", RANK)
    way, prepared = way_here(config, shape, here), prepare(config, Console())
    whole, found = of_rows(prepared), []
    for step in range(WARM, STEPS):
        rows = step_rows(prepared.plan, step)
        own = replace(whole, prompts=whole.prompts[rows], answers=whole.answers[rows])
        found.append(predict(shape, own, here, way))
    return found


def calibrated(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the planner's compute times as the run at one rank shows them, as `kto-dist plan --measure` has it."""
    times = [line for line in lines if not line["memory"]]
    alone = next((line for line in times if line["case"] == "one rank"), None)
    if alone is None:
        return lines
    factor = alone["seconds_per_step"] / alone["computed_seconds"]
    half = next((line for line in times if line["case"] == "one rank, half the batch"), alone)
    for line in times:
        compute = line["computed_seconds"] - line["computed_collectives"]
        line["calibrated_seconds"] = factor * compute + line["computed_collectives"]
        if line["ranks"] > 1:
            own = half if "strong" in line["case"] else alone
            line["no_compute"] = 1 - own["seconds_per_step"] / line["seconds_per_step"]
        if line["checkpoints"]:
            line["checkpoint_seconds"] = line["seconds_per_step"] - alone["seconds_per_step"]
    return lines


def curves() -> dict[str, Any]:
    """Weak scaling of an 8 billion parameter model: 16 rows a GPU and step, of 500 tokens on average. Computed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kto_dist.cluster.hardware import cluster_of
    from kto_dist.cluster.plan import plan
    from kto_dist.cluster.workload import of_means
    from kto_dist.model.footprint import shape_of
    from kto_dist.training.config import Config

    with torch.device("meta"):
        lm = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=32,
                hidden_size=4096,
                intermediate_size=14336,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
                tie_word_embeddings=False,
            )
        )
    shape, lines, assumed = shape_of(lm), [], {}
    for kind in KINDS:
        for gpus in GPUS:
            config = Config.build(
                {
                    "model": {"path": "model"},
                    "data": {"train": "rows", "max_length": 2048},
                    "train": {"global_batch": 16 * gpus},
                }
            )
            made = plan(config, shape, of_means(config, 10**7, 200, 300), cluster_of(kind, gpus))
            assumed = asdict(made.cluster.shares)
            best = made.best
            if best is None:
                continue
            lines.append(
                {
                    "gpu": kind,
                    "gpus": gpus,
                    "tokens_per_second_and_gpu": best.tokens_per_second / gpus,
                    "seconds_per_step": best.seconds.total,
                    "collectives": best.seconds.collectives / best.seconds.total,
                    "mfu": best.mfu,
                    "zero_stage": best.way.zero_stage,
                    "checkpointing": best.way.checkpointing,
                    "offload_optimizer": best.way.offload_optimizer,
                    "bytes": best.memory.device,
                }
            )
    return {"computed": True, "assumptions": assumed, "results": lines}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def draw(content: dict[str, Any], file: Path) -> None:
    """The curves, with what they assume beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for kind in KINDS:
        lines = [line for line in content["results"] if line["gpu"] == kind]
        axes.plot(
            [line["gpus"] for line in lines],
            [line["tokens_per_second_and_gpu"] for line in lines],
            marker="o",
            markersize=3,
            label=kind,
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs, 8 a node")
    axes.set_ylabel("tokens a second and GPU")
    axes.set_title("Computed, not measured: 8 billion parameters, 16 rows of 500 tokens a GPU and step", fontsize=10)
    text = "assumed\n" + "\n".join(
        f"{name.replace('_', ' ')}: {value:g}" for name, value in content["assumptions"].items()
    )
    axes.legend(frameon=False, loc="center right", fontsize=8)
    figure.subplots_adjust(right=0.72)
    figure.text(0.74, 0.5, text, fontsize=8, va="center")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


@click.command()
@click.option("--random", "shape", type=click.Choice(list(random_model.SHAPES)), default="tiny", show_default=True)
@click.option("--random-folder", type=click.Path(path_type=Path), help="keep the random model here, or find it here")
@click.option("--only", type=click.Choice(["memory", "time"]), help="one half of it")
@click.option("--stages", default="0,1,2,3", show_default=True, help="ZeRO stages whose memory is measured")
@click.option("--adapter-stages", default="0,1,2,3", show_default=True, help="and those with LoRA; empty: none")
@click.option("--global-batch", default=16, show_default=True, help="rows of a step at one rank")
@click.option("--max-length", default=256, show_default=True, help="most tokens of a row")
@click.option("--tokens-per-microbatch", default=2048, show_default=True)
@click.option("--limit", default=300.0, show_default=True, help="most seconds of a run")
@click.option("--curves", "only_curves", is_flag=True, help="compute the curves to 4,096 GPUs, and measure nothing")
@click.option("--json", "file", type=click.Path(path_type=Path), help="write the figures to this file")
@click.option("--plot", type=click.Path(path_type=Path), help="with --curves: the picture")
def main(
    shape: str,
    random_folder: Path | None,
    only: str | None,
    stages: str,
    adapter_stages: str,
    global_batch: int,
    max_length: int,
    tokens_per_microbatch: int,
    limit: float,
    only_curves: bool,
    file: Path | None,
    plot: Path | None,
) -> None:
    """Measures how steps scale, with the planner's figures beside it; or computes its curves."""
    if only_curves:
        content = {**records.frame("scaling-curves", {}), **curves()}
        content["device"] = "computed on no device"
        records.write_json(file, content)
        if plot is not None:
            draw(content, plot)
        for line in content["results"]:
            click.echo(
                f"{line['gpu']:8} {line['gpus']:5,} {line['tokens_per_second_and_gpu']:10,.0f} mfu {line['mfu']:.0%}"
            )
        return
    with tempfile.TemporaryDirectory(prefix="kto-scaling-") as temporary:
        model = random_folder or Path(temporary) / "model"
        model.mkdir(parents=True, exist_ok=True)
        random_model.make_model(shape, model)
        log = Path(temporary) / "rows.jsonl"
        random_model.write_log(shape, "mixed", 2 * global_batch * (STEPS + 1), max_length, log)
        cases = [] if only == "time" else memory_cases(_numbers(stages), _numbers(adapter_stages), global_batch)
        # a GPU alone has nobody to scale to
        times = time_cases(global_batch) if not machine.has_gpu() else time_cases(global_batch)[:1]
        cases += [] if only == "memory" else times
        lines = measure(cases, shape, model, log, max_length, tokens_per_microbatch, limit)
    settings = {"model": shape, "global_batch": global_batch, "max_length": max_length}
    records.write_json(file, {**records.frame("scaling", settings), "results": lines})


if __name__ == "__main__":
    main()

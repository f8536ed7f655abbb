"""`kto-dist plan`: what a run would take of a cluster, computed before it is rented."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.commands.tables import show
from kto_dist.model.config import check_model_path
from kto_dist.training.config import Config

if TYPE_CHECKING:
    from kto_dist.cluster.hardware import Gpu
    from kto_dist.cluster.measure import Measured
    from kto_dist.cluster.workload import Workload
    from kto_dist.model.footprint import Shape


@click.command(short_help="Compute memory, time and cost on a cluster, and the best settings.")
@click.option(
    "--gpu",
    default="H100",
    show_default=True,
    help="A100, A100-40GB, H100, H200, B200, MI300X, H20, GH200, A100-PCIe, H100-PCIe, H100-NVL, L40S, A10G, RTX-4090, "
    "or a YAML file that describes another (docs/planning.md).",
)
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="How many, up to 4,096.")
@click.option("--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a node.")
@click.option("--host-memory", type=click.FloatRange(min=1), default=1860, show_default=True, help="GiB of a node.")
@click.option("--price", type=click.FloatRange(min=0), help="Of one GPU for an hour, in any currency.")
@click.option(
    "--method",
    type=click.Choice(["full", "lora", "qlora"]),
    help="What is trained: all weights, or an adapter beside them; with qlora they lie in 4 bits. Default: as CONFIG.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of an adapter. Default: as CONFIG, or 16.")
@click.option("--rows", type=click.IntRange(min=1), help="Plan without the data: so many rows of these mean lengths.")
@click.option("--prompt-tokens", type=click.FloatRange(min=1), help="With --rows: the mean length of a prompt.")
@click.option("--completion-tokens", type=click.FloatRange(min=1), help="With --rows: of a completion.")
@click.option(
    "--measure",
    is_flag=True,
    help="Run a few steps here first, on all GPUs, and compute with what they take and with the links between them.",
)
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write everything that was computed to FILE.")
@click.option("--write", type=click.Path(path_type=Path), help="Write CONFIG with the best settings to FILE.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def plan(config: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Compute what CONFIG takes of a cluster: memory of a GPU by part, what fits, seconds a step, hours and cost.

    CONFIG and the overrides are those of `train`. Of model.path only the config.json is needed. Lengths are those of
    data.train, which is tokenised for it, or are told by --rows, --prompt-tokens and --completion-tokens. Every ZeRO
    stage, offload and checkpointing is looked at, each with the largest micro-batch that fits; the best comes first.

    Nothing is measured but with --measure: the assumptions are said below the table.
    """
    settings = Config.load(config, overrides)
    check_model_path("model.path", settings.model.path)
    if settings.train.dtype == "fp32":
        raise UserError("train.dtype (fp32) is not planned for: GPUs are planned in bf16; leave it on auto")
    _plan(config, overrides, settings, **options)


def _plan(
    config: Path,
    overrides: tuple[str, ...],
    settings: Config,
    *,
    gpu: str,
    gpus: int,
    per_node: int,
    host_memory: float,
    price: float | None,
    method: Any,
    rank: int | None,
    measure: bool,
    as_json: Path | None,
    write: Path | None,
    **lengths: Any,
) -> None:
    from kto_dist.cluster import hardware, page
    from kto_dist.cluster.gpu_file import is_gpu_file, read_gpu
    from kto_dist.cluster.plan import adapter_for, layers_on_gpu, method_of, ready_config, shape_for
    from kto_dist.cluster.plan import plan as planned
    from kto_dist.commands.entry import quiet
    from kto_dist.model.loading import check_context, load_config, without_contents

    quiet()
    _check_numbers(price=price, host_memory=host_memory)
    own = settings.adapter.rank
    if rank is not None and settings.adapter.type != "none" and rank != own:
        raise UserError(
            f"--rank ({rank}) is not adapter.rank of CONFIG ({own}): leave it out, or set adapter.rank={rank}"
        )
    method, rank = method or method_of(settings), rank or own or 16
    described = read_gpu(Path(gpu)) if is_gpu_file(gpu) else None
    cluster = hardware.cluster_of(described or gpu, gpus, per_node, host_memory * 2**30)
    model = settings.model
    found = load_config(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code)
    check_context(found, settings.data.max_length)
    lm = without_contents(found, trust_remote_code=model.trust_remote_code)
    layers, adapter = layers_on_gpu(settings, found), adapter_for(settings, method, rank, found)
    workload = _workload(settings, **lengths)
    here = None
    if measure:
        # as CONFIG trains, whatever is planned
        run_as = method_of(settings)
        own_shape = shape_for(lm, run_as, rank, adapter_for(settings, run_as, rank, found))
        here = _measured(config, overrides, settings, own_shape, workload, described)
    made = planned(
        settings,
        shape_for(lm, method, rank, adapter),
        workload,
        cluster,
        method=method,
        price=price,
        layers=layers,
        reference=_other_reference(settings),
        measured=here,
    )
    if (packed := getattr(found, "quantization_config", None)) is not None:
        click.echo(_of_packed(packed))
    for line in page.above(made, adapter):
        click.echo(line)
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < page.WIDTH
    for columns in (page.SPEED, page.MEMORY) if narrow else (page.COLUMNS,):
        table = Table(*columns, padding=(0, 1, 0, 0))
        for cells in page.lines(made):
            table.add_row(*(cells[page.COLUMNS.index(name)] for name in columns))
        show(table)
    for line in page.below(made):
        click.echo(line)
    if as_json is not None:
        _write(as_json, json.dumps({"model": model.path, **page.to_dict(made)}, indent=1) + "\n")
    if write is not None:
        _write(write, to_yaml(ready_config(settings, made, rank=rank)))
        click.echo(f"config: {write}")
    elif made.best is None:
        ready_config(settings, made, rank=rank)


def _check_numbers(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} ({value}) must be a number")


def _of_packed(settings: Any) -> str:
    """`settings`: of the quantisation, as config.json has them."""
    kind = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return (
        f"the files of model.path are quantised ({kind}), by its config.json, and are planned in 16 bits: weights "
        "that stay packed in memory cannot be trained, so have a checkpoint in bf16"
    )


def _other_reference(settings: Config) -> "Shape | None":
    """Of the model that is the reference, where it is not the policy's."""
    from kto_dist.model.footprint import shape_of
    from kto_dist.model.loading import load_config, without_contents

    section = settings.reference
    if section.path is None:
        return None
    trust = section.trust_remote_code
    found = load_config(section.path, section.gguf_file, "reference.path", trust_remote_code=trust)
    return shape_of(without_contents(found, trust_remote_code=trust))


def _workload(
    settings: Config, rows: int | None, prompt_tokens: float | None, completion_tokens: float | None
) -> "Workload":
    from kto_dist.base.console import Console
    from kto_dist.cluster import workload
    from kto_dist.training.prepare import prepare

    told = (rows, prompt_tokens, completion_tokens)
    if rows is None or prompt_tokens is None or completion_tokens is None:
        if any(value is not None for value in told):
            raise UserError("--rows, --prompt-tokens and --completion-tokens go together: give all three, or none")
        try:
            return workload.of_rows(prepare(settings, Console()))
        except UserError as error:
            raise UserError(
                f"{error}. A plan without the data needs config.json alone: give --rows, --prompt-tokens and "
                "--completion-tokens"
            ) from None
    return workload.of_means(settings, rows, prompt_tokens, completion_tokens)


def _measured(
    config: Path,
    overrides: tuple[str, ...],
    settings: Config,
    shape: Any,
    workload: "Workload",
    planned: "Gpu | None",
) -> "Measured":
    import torch

    from kto_dist.cluster.measure import measure
    from kto_dist.cluster.page import of_measured
    from kto_dist.commands import launcher

    if not torch.cuda.is_available():
        raise UserError(
            "--measure runs steps of the config on the GPUs of this machine, and torch finds none here: a processor's "
            "time says nothing of a GPU's; leave it out"
        )

    def run(more: list[str], folder: Path) -> int:
        # as `kto-dist train` would: a model that several GPUs share may not fit on one
        return launcher.run("train", [str(config), *overrides, *more], folder=folder)

    found = measure(settings, shape, workload, run, torch.cuda.device_count(), planned)
    for line in of_measured(found):
        click.echo(line)
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; give another file") from None

"""`kto-dist ...`: the commands, each a few lines around a function of the package.

Exit status: 0 on success, 2 on a user's mistake (a message, no traceback), 1 on a failure, 128 + the signal's number
where a signal stopped the run.
"""

import importlib.resources
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from kto_dist.base.config import flatten, keys, resolve, sections
from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked
from kto_dist.commands.chat import chat
from kto_dist.commands.launch import launch
from kto_dist.commands.plan import plan
from kto_dist.commands.settings import settings_page
from kto_dist.commands.store import store
from kto_dist.commands.tables import show
from kto_dist.commands.track import track
from kto_dist.commands.words import options
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.model.config import check_model_path
from kto_dist.training.config import Config

EXAMPLES = {
    "demo": "demo.yaml",
    "one-gpu": "one-gpu.yaml",
    "cluster": "cluster.yaml",
    "8b-4-nodes": "8b-4-nodes.yaml",
    "70b": "70b.yaml",
    "offload": "offload.yaml",
    "hpz": "hpz.json",
    "slurm": "slurm.sh",
    "kubernetes": "kubernetes.yaml",
    "compare": "compare.yaml",
    "mine": "mine.yaml",
}
"""What `init` prints, and the file that it comes from."""
STATUS = "Exit status: 0 on success, 2 on a mistake that you can fix, 143 after a SIGTERM, 1 on a failure."


class _Commands(click.Group):
    """Mistakes become messages, whichever command they are made in."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as mistake:
            click.echo(f"error: {masked(str(mistake))}", err=True)
            raise SystemExit(2) from None


def _command(job: Callable[..., Any]) -> Callable[..., Any]:
    """CONFIG and overrides as arguments."""
    job = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")(job)
    return click.argument("config", type=click.Path(path_type=Path))(job)


def _kind(config: Path) -> type[Config]:
    """A comparison's config where the file has that section. What else is wrong with the file is said by the reader."""
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return ComparisonConfig if re.search(r"^compare:", text, re.MULTILINE) else Config


_ranks = click.option(
    "--ranks", type=click.IntRange(min=1), help="Processes; default: one a GPU, or without GPUs one a core up to 2."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=STATUS)
@click.version_option(package_name="kto_dist")
def main() -> None:
    """Align a language model from thumbs-up/thumbs-down feedback (KTO), on one machine or a cluster.

    CONFIG is a YAML file; `kto-dist init` prints one to start from. SECTION.KEY=VALUE overrides come last and win, as
    in `train.lr=1e-6`. `kto-dist config CONFIG` shows every setting. On several hosts: `kto-dist launch CONFIG
    --hostfile H`, or the deepspeed launcher itself, `deepspeed --hostfile H --module kto_dist.commands.train CONFIG`.
    """


@main.command(short_help="Print a config to start from.")
@click.argument("example", type=click.Choice(list(EXAMPLES)), default="demo")
def init(example: str) -> None:
    """Print a config to start from: `kto-dist init one-gpu > config.yaml`.

    demo (the default): a small model, some minutes on a laptop. one-gpu: one to three billion parameters on one large
    GPU. cluster: eight billion on nodes of eight GPUs; 8b-4-nodes, 70b and offload: other shapes, and hpz: DeepSpeed's
    options for several nodes. slurm, kubernetes: what those start a run with. compare: several losses on the same rows.
    mine: a log of feedback, for `audit` and `mine`.
    """
    file = importlib.resources.files("kto_dist.commands") / "examples" / EXAMPLES[example]
    click.echo(file.read_text(encoding="utf-8"), nl=False)


@main.command("config", short_help="Print every setting, its origin and meaning.")
@click.option("--markdown", is_flag=True, help="Print the documentation of all settings as Markdown; takes no CONFIG.")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def show_config(config: Path | None, overrides: tuple[str, ...], markdown: bool) -> None:
    """Print every setting of CONFIG: its value, where the value comes from, and what it means.

    CONFIG is a training run's YAML file, or a comparison's. SECTION.KEY=VALUE overrides come last and win, as in
    `train.lr=1e-6`.
    """
    if markdown:
        click.echo(settings_page(), nl=False)
        return
    if config is None:
        raise click.UsageError("Missing argument 'CONFIG': give a YAML file, such as `kto-dist init` prints.")
    kind = _kind(config)
    resolved, origin = resolve(config, overrides, kind=kind)
    table = Table("setting", "value", "from", "meaning")
    for section, key, value in flatten(resolved):
        meaning = keys(sections(kind)[section])[key]
        table.add_row(f"{section}.{key}", masked(str(value)), origin[f"{section}.{key}"], meaning)
    show(table)


@main.command(short_help="Train on this machine's devices.")
@click.option(
    "--check", is_flag=True, help="Look at config, model and rows in this process, show three rows, and exit."
)
@_ranks
@_command
def train(config: Path, overrides: tuple[str, ...], ranks: int | None, check: bool) -> None:
    """Train on this machine's devices, under the deepspeed launcher.

    CONFIG is a YAML file; `kto-dist init` prints one. SECTION.KEY=VALUE overrides come last and win, as in
    `train.lr=1e-6`. After a stop, the same command goes on from the newest checkpoint.

    --check loads no weights and needs no GPU. It makes the tokenised rows, which the run then finds in `data.cache`.
    """
    if check:
        settings = _checked(config, overrides)
        from kto_dist.commands.entry import quiet
        from kto_dist.training import preview

        quiet()
        preview.check(settings)
        return
    _launch("train", config, overrides, ranks)


@main.command(short_help="Score with the reference alone, into its store.")
@_ranks
@click.option("--worker", is_flag=True, help="Score pieces beside other workers, in this process and on one device.")
@click.option(
    "--any-device", is_flag=True, help="With --worker: also on another device, or torch, than the store's workers."
)
@_command
def precompute(config: Path, overrides: tuple[str, ...], ranks: int | None, worker: bool, any_device: bool) -> None:
    """Score with the reference whatever its store lacks for CONFIG, and train nothing.

    CONFIG and the overrides are those of `train`. A pass that was stopped goes on where it was.

    --worker takes a piece after the other of what is missing. Start as many as you like, on any machines that reach
    reference.store, whenever they are idle, and stop them at any time: the others do the rest. No launcher is needed.
    On a machine of several GPUs start one for each, with CUDA_VISIBLE_DEVICES.
    """
    if not worker:
        if any_device:
            raise UserError("--any-device is for --worker: a pass without workers computes on its own devices alone")
        _launch("precompute", config, overrides, ranks)
    if ranks:
        raise UserError(f"--ranks ({ranks}) is for a pass without --worker: a worker is one process, start several")
    _checked(config, overrides)
    from kto_dist.commands.entry import ANY_DEVICE, WORKER, run_and_leave

    run_and_leave([WORKER, str(config), *overrides, *([ANY_DEVICE] if any_device else [])])


@main.command(short_help="Figures with intervals of a model on held-out rows.")
@_ranks
@options
def evaluate(ranks: int | None, **words: Any) -> None:
    """Compare the model of a run, or any model, with its reference on held-out rows: figures with intervals.

    The target, RUN_OR_MODEL, is a run's folder (train.output), or a Hugging Face folder or hub name, which needs
    --reference and --data. A run's own held-out rows, reference and settings are used where nothing else is given;
    SECTION.KEY=VALUE overrides change them, as in `reference.tokens_per_batch=4096`. Log-probs are kept in
    reference.store: what was scored once is not scored again.
    """
    from kto_dist.commands import launcher
    from kto_dist.commands.words import words_of
    from kto_dist.training.judged import Request, resolve

    asked = Request(**words)
    judged = resolve(asked)  # a mistake shows at once, not once the ranks have started
    raise SystemExit(launcher.run("evaluate", words_of(asked), ranks, folder=judged.output.absolute().parent))


@main.command(short_help="Train by several losses, and compare them on held-out rows.")
@click.option("--print", "only_print", is_flag=True, help="Write the runs' configs, print their commands, and exit.")
@_ranks
@_command
def compare(config: Path, overrides: tuple[str, ...], ranks: int | None, only_print: bool) -> None:
    """Train by SFT, KTO, its variant without z0 and DPO on the same rows, tokens and reference store; compare them.

    CONFIG is that of `train`, with a section `compare` (methods, lr, beta, budget, choose_by) that says what is tried;
    SECTION.KEY=VALUE overrides come last and win, as in `compare.lr=[1e-6,5e-6]`. train.output is the folder of all
    runs. Half of the held-out prompts choose lr and beta, the other half is reported, with paired intervals, in
    comparison.html and comparison.json. Runs go one after the other; what is done stays done.

    On a cluster, --print gives the commands of the runs; when these are done, this command without it compares them.
    """
    settings = resolve(config, overrides, kind=ComparisonConfig)[0]
    check_model_path("model.path", settings.model.path)
    from kto_dist.base.console import Console
    from kto_dist.commands import launcher
    from kto_dist.commands.entry import quiet
    from kto_dist.comparison.compare import commands_of
    from kto_dist.comparison.compare import compare as compared
    from kto_dist.comparison.plan import Planned

    if only_print:
        for line in commands_of(settings):
            click.echo(line)
        return
    quiet()
    uri = settings.tracking.uri
    # files of settings hold no passwords
    beside = [f"tracking.uri={uri}"] if uri and masked(uri) != uri else []

    def run_one(run: Planned) -> int:
        return launcher.run("train", [str(run.file), *beside], ranks, folder=run.folder.path)

    done = compared(settings, run_one, Console())
    if isinstance(done, int):
        raise SystemExit(done)


@main.command(short_help="Count the pairs that DPO could use.")
@_command
def pairs(config: Path, overrides: tuple[str, ...]) -> None:
    """Count the pairs that DPO (objective.loss: dpo) could use of CONFIG's rows, by every rule of objective.pairs.

    CONFIG and the overrides are those of `train` or `compare`. A pair is a good and a bad answer to one prompt. Shows
    what each rule leaves out, too; KTO uses all rows. Loads no weights and needs no GPU. It makes the tokenised rows,
    which a run then finds in `data.cache`.
    """
    settings = resolve(config, overrides, kind=_kind(config))[0]
    check_model_path("model.path", settings.model.path)
    from kto_dist.commands.entry import quiet
    from kto_dist.training.usable import usable_pairs

    quiet()
    table = Table("rows of", "objective.pairs", "pairs", "prompts", "rows used", "rows")
    for column in ("good alone", "bad alone", "left by the rule", "rated both ways"):
        table.add_column(column)
    for usable in usable_pairs(settings):
        found = usable.found
        used = f"{found.used:,} ({found.used / max(1, found.rows):.0%})"
        counts = (found.no_bad, found.no_good, found.by_rule, found.twins)
        table.add_row(
            usable.data,
            usable.rule,
            f"{len(found.pairs):,}",
            f"{found.prompts:,}",
            used,
            f"{found.rows:,}",
            *(f"{count:,}" for count in counts),
        )
    show(table)


@main.command(short_help="Make a training set from a raw log of feedback.")
@_command
def mine(config: Path, overrides: tuple[str, ...]) -> None:
    """Make a training set from a raw log of feedback: clean, weighted, split; with a report to look at first.

    CONFIG is a mining config of its own, such as `kto-dist init mine` prints: input.files, and the log's columns, are
    what it needs. SECTION.KEY=VALUE overrides come last and win, as in `output.folder=runs/april`.
    """
    from kto_dist import feedback
    from kto_dist.feedback.config import folder_of

    settings = feedback.MiningConfig.load(config, overrides)
    audit = feedback.mine(settings)
    table, idle = Table("step", "thumbs up", "thumbs down", "neither"), []
    for step in audit["steps"]:
        removed = [step[f"{name}_removed"] for name in ("up", "down", "unlabelled")]
        if any(removed):
            table.add_row(step["step"], *(f"-{votes:,}" if votes else "" for votes in removed))
        else:
            idle.append(step["step"])
    if table.row_count:
        show(table)
    if idle:
        click.echo(f"steps that took nothing: {', '.join(idle)}")
    _say_checks(audit, folder_of(settings.output.folder))


def _checked(config: Path, overrides: tuple[str, ...]) -> Config:
    """A mistake shows at once: before seconds of imports, and before the ranks have started. Raises `UserError`."""
    settings = Config.load(config, overrides)
    check_model_path("model.path", settings.model.path)
    return settings


def _launch(job: str, config: Path, overrides: tuple[str, ...], ranks: int | None) -> None:
    settings = _checked(config, overrides)
    from kto_dist.commands import launcher

    output = Path(settings.train.output)
    # a reference pass has no folder of its own, and leaves none
    folder = output if job == "train" else output.absolute().parent
    grace = settings.cluster.grace
    raise SystemExit(launcher.run(job, [str(config), *overrides], ranks, folder=folder, grace=grace))


@main.command(short_help="Look at a raw log of feedback, and make nothing.")
@_command
def audit(config: Path, overrides: tuple[str, ...]) -> None:
    """Look at a log of thumbs before anything is made of it: how far it can be trusted, and whose taste it is.

    CONFIG and the overrides are those of `mine`. Writes report.html and audit.json into
    `<output.folder>/audit`, and no dataset.
    """
    from kto_dist import feedback
    from kto_dist.feedback.config import folder_of

    settings = feedback.MiningConfig.load(config, overrides)
    _say_checks(feedback.audit_log(settings), folder_of(settings.output.folder) / "audit")


def _say_checks(audit: dict[str, Any], folder: Path) -> None:
    """What a person should know before training on this."""
    from kto_dist.data.audited import line_of

    if unreadable := audit["log"]["unreadable_by_reason"]:
        listed = ", ".join(f"{reason} ({rows:,})" for reason, rows in unreadable.items())
        click.echo(f"left out: {audit['log']['unreadable']:,} rows that could not be read: {listed}")
    if unused := audit["log"]["unused"]:
        click.echo(f"seen and not used: {', '.join(f'{name} ({rows:,})' for name, rows in unused.items())}")
    for check in audit["checks"]:
        mark = {"pass": "ok", "warn": "warning", "unknown": "unknown"}[check["status"]]
        click.echo(f"{mark}: {line_of(check)}")
    for file in audit["files"]:
        click.echo(f"{file['split']}: {folder / file['name']} ({file['rows']:,} rows)")
    click.echo(f"report: {folder / 'report.html'}")


@main.command(short_help="The page of a run, or several runs side by side.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Of several runs; default: side-by-side.html, here.")
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write report.html of RUN anew, whether it goes on, has ended or was killed; of several, one page side by side.

    RUN is the folder of a run (train.output), or several of them are the folders of runs. Nothing is computed.
    """
    from kto_dist.record.report import write_report
    from kto_dist.record.side_by_side import write_side_by_side

    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is no folder: give a run's folder (train.output)")
    if len(runs) == 1 and output is not None:
        raise UserError("--output is for several runs: the page of one lies in its folder")
    page = write_report(runs[0]) if len(runs) == 1 else write_side_by_side(runs, output or Path("side-by-side.html"))
    click.echo(f"report: {page}")


@main.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step; default: the newest whole one.")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write it; default: RUN/export.")
def export_model(run: Path, step: int | None, output: Path | None) -> None:
    """Write the model of a checkpoint of RUN.

    RUN is the folder of a run (train.output) that a signal or a rule of health has ended. Where an adapter was trained,
    it is written alone. One process does it, whatever
    the number of ranks that trained.
    """
    from kto_dist.base.console import Console
    from kto_dist.training.export import export_checkpoint

    click.echo(f"model: {export_checkpoint(run, step, output, Console())}")


@main.command("merge", short_help="Merge an adapter into its base model.")
@click.argument("adapter", metavar="RUN_OR_ADAPTER", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Where to write it; default: beside it, -merged.")
@click.option("--base", metavar="MODEL", help="Folder or hub name of the model; default: what run or adapter name.")
@click.option("--gguf-file", metavar="FILE", help="GGUF file inside the model's folder.")
@click.option("--dtype", type=click.Choice(("auto", "fp32", "bf16")), default="auto", help="auto: its files'.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model brings along.")
def merge_adapter(adapter: Path, output: Path | None, **settings: Any) -> None:
    """Write the whole model that an adapter makes of its base: a Hugging Face folder that needs no peft.

    RUN_OR_ADAPTER is the folder of a run that trained an adapter, or an adapter's own folder, as peft writes it. Each
    layer is added up in fp32. The result is loaded back and compared before it appears.
    """
    from kto_dist.base.console import Console
    from kto_dist.commands.entry import quiet

    quiet()
    from kto_dist.training.adapter_export import merge

    click.echo(f"model: {merge(adapter, output, Console(), **settings)}")


main.add_command(chat)
main.add_command(launch)
main.add_command(store)
main.add_command(plan)
main.add_command(track)


if __name__ == "__main__":
    main()

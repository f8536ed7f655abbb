"""What a finished run says of itself: the model card, and the last lines on the console."""

from pathlib import Path
from typing import Any

from kto_dist.base.console import Console
from kto_dist.record import tracking_uri
from kto_dist.training.config import Config


def model_card(config: Config, summary: dict[str, Any]) -> str:
    rows = summary["data"]["train"]
    figures = summary["heldout"]["after"] or summary["training"]
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if isinstance(value, float))
    return (
        f"---\nbase_model: {config.model.path}\nlibrary_name: transformers\ntags: [kto, kto_dist]\n---\n\n"
        f"# {Path(config.train.output).name}\n\n"
        f"{config.model.path} aligned by Kahneman-Tversky Optimization (arXiv 2402.01306, loss `{config.kto.loss}`, "
        f"beta {config.kto.beta}) from {rows['desirable']:,} desirable and {rows['undesirable']:,} undesirable "
        f"answers, {summary['steps']} steps of {config.train.global_batch} rows, peak learning rate "
        f"{config.train.lr}.\n\n"
        f"| {'held-out' if summary['heldout']['after'] else 'last step'} | value |\n|---|---|\n{table}\n"
    )


def checkpoint_card(config: Config, step: int, figures: dict[str, Any]) -> str:
    """Of a model from a checkpoint; `figures`: the line of metrics of its step."""
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if isinstance(value, float))
    return (
        f"---\nbase_model: {config.model.path}\nlibrary_name: transformers\ntags: [kto, kto_dist]\n---\n\n"
        f"# {Path(config.train.output).name}, step {step}\n\n"
        f"{config.model.path} after {step} steps of Kahneman-Tversky Optimization (arXiv 2402.01306, loss "
        f"`{config.kto.loss}`, beta {config.kto.beta}, {config.train.global_batch} rows a step, peak learning rate "
        f"{config.train.lr}): a checkpoint of a run, not its end.\n\n| step {step} | value |\n|---|---|\n{table}\n"
    )


def say_outcome(summary: dict[str, Any], output: Path, console: Console) -> None:
    """The held-out figures that matter most, and where everything lies."""
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    if before and after:
        for name in ("accuracy/all", "auc", "rewards/desirable", "rewards/undesirable", "kl_raw"):
            if name in before and name in after:
                console.say(f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after")
    console.say(f"model:  {summary['export']}")
    if (output / "report.html").exists():
        console.say(f"report: {output / 'report.html'}")
    if summary["mlflow"]["uri"]:
        console.say(f"MLflow: {tracking_uri.ui_command(summary['mlflow']['uri'])}")

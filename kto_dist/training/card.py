"""What a finished run says of itself: the model card, and the last lines on the console."""

from pathlib import Path
from typing import Any

from kto_dist.base.console import Console
from kto_dist.objective.losses import LOSSES
from kto_dist.record import tracking_uri
from kto_dist.training.config import Config


def model_card(config: Config, summary: dict[str, Any]) -> str:
    rows = summary["data"]["train"]
    figures = summary["heldout"]["after"] or summary["training"]
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if isinstance(value, float))
    return (
        f"---\nbase_model: {config.model.path}\nlibrary_name: {_library(config)}\ntags: "
        f"[{config.objective.loss}, kto_dist]\n---\n\n"
        f"# {Path(config.train.output).name}\n\n"
        f"{config.model.path} aligned by {_method(config)} from {rows['desirable']:,} desirable and "
        f"{rows['undesirable']:,} undesirable answers, {summary['steps']} steps of {config.train.global_batch} rows, "
        f"peak learning rate {config.train.lr}.\n\n"
        f"| {'held-out' if summary['heldout']['after'] else 'last step'} | value |\n|---|---|\n{table}\n"
    )


def checkpoint_card(config: Config, step: int, figures: dict[str, Any]) -> str:
    """Of a model from a checkpoint; `figures`: the line of metrics of its step."""
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items() if isinstance(value, float))
    return (
        f"---\nbase_model: {config.model.path}\nlibrary_name: {_library(config)}\ntags: "
        f"[{config.objective.loss}, kto_dist]\n---\n\n"
        f"# {Path(config.train.output).name}, step {step}\n\n"
        f"{config.model.path} after {step} steps of {_method(config)}, {config.train.global_batch} rows a step, peak "
        f"learning rate {config.train.lr}: a checkpoint of a run, not its end.\n\n"
        f"| step {step} | value |\n|---|---|\n{table}\n"
    )


def _method(config: Config) -> str:
    section, loss = config.objective, LOSSES[config.objective.loss]
    used = [f"{name} {getattr(section, name)}" for name in ("beta", "label_smoothing", "sft_weight")]
    used = [text for text in used if text.split()[0] in loss.settings and not text.endswith(" 0.0")]
    adapter = "" if config.adapter.type == "none" else f", of a {config.adapter.type} adapter"
    return f"{loss.title}, loss `{loss.name}`" + "".join(f", {text}" for text in used) + adapter


def _library(config: Config) -> str:
    return "transformers" if config.adapter.type == "none" else "peft"


def say_outcome(summary: dict[str, Any], output: Path, console: Console) -> None:
    """The held-out figures that matter most, and where everything lies."""
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    if before and after:
        for name in ("accuracy/all", "auc", "rewards/desirable", "rewards/undesirable", "accuracy/pairs", "kl_raw"):
            if name in before and name in after:
                console.say(f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after")
    what = "model:  " if summary["adapter"] is None else "adapter:"
    console.say(f"{what} {summary['export']}")
    if (output / "report.html").exists():
        console.say(f"report: {output / 'report.html'}")
    if summary["mlflow"]["uri"]:
        console.say(f"MLflow: {tracking_uri.ui_command(summary['mlflow']['uri'])}")

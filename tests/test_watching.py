"""What a loop asks of health beside the steps' metrics: answers' lengths, and what the audit of the data said."""

from pathlib import Path
from typing import Any

from ranks import run_ranks
from tiny import write_jsonl
from tiny_runs import tiny_config

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.data.audited import Audited
from kto_dist.record.run_folder import RunFolder, append_line, read_lines
from kto_dist.training.config import Config
from kto_dist.training.prepare import prepare_training
from kto_dist.training.run import Run
from kto_dist.training.watching import Watching

AUDIT = Audited(path=Path("audit.json"), report=None, sha256="", files={}, failed=(), classes={"train": (30, 70)})


def watching(config: Config) -> Watching:
    """Of a run that has written nothing yet."""
    prepared = prepare_training(config, Console())
    folder = RunFolder(Path(config.train.output))
    folder.path.mkdir(exist_ok=True)
    nothing: Any = None
    run = Run(folder=folder, state=nothing, now=nothing, found=None, reference=nothing, audits=[AUDIT])
    return Watching(prepared, run, Console())


def _drifting(config: Config) -> list[dict[str, Any]]:
    own = watching(config)
    lines = [{"step": step, "answers": [{"tokens": count}] * 3} for step, count in ((0, 40), (2, 90), (4, 80), (6, 80))]
    for step in (2, 4, 6):
        own.answered(step, [line for line in lines if line["step"] <= step] if comm.is_main() else [])
    comm.barrier()
    return read_lines(RunFolder(Path(config.train.output)).health)


def test_answers_that_become_longer_are_told_once_on_all_ranks(tmp_path, tiny_model, tiny_log):
    for told in run_ranks(_drifting, 2, tiny_config(tmp_path, tiny_model, tiny_log)):
        (line,) = told
        assert (line["step"], line["rule"], line["stop"]) == (4, "length", False) and "100% longer" in line["message"]


def _audited_of_probabilities(config: Config) -> float | None:
    Path(config.train.output).mkdir()
    return watching(config).monitor.audited


def test_an_audit_that_counts_rows_says_nothing_of_labels_that_are_probabilities(tmp_path, tiny_model):
    rows = [{"prompt": f"q{n}", "completion": "a", "label": label} for n, label in enumerate((0.6, 0.6, 0.6, 0.0))]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    config = tiny_config(tmp_path, tiny_model, log, data__soft_labels=True)
    assert run_ranks(_audited_of_probabilities, 1, config) == [None]


def _audited_and_said(config: Config) -> tuple[float | None, float | None, set[str]]:
    append_line(RunFolder(Path(config.train.output)).health, {"step": 3, "rule": "flat"})
    first = watching(config)
    other = config.model_copy(update={"objective": config.objective.model_copy(update={"loss": "sft"})})
    return first.monitor.audited, watching(other).monitor.audited, first.monitor.said


def test_the_audits_mix_counts_for_a_loss_that_takes_all_rows_and_what_was_said_stays_said(
    tmp_path, tiny_model, tiny_log
):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    Path(config.train.output).mkdir()
    assert run_ranks(_audited_and_said, 1, config) == [(0.3, None, {"flat"})]

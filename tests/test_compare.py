"""Losses side by side: what is run, which half chooses, that nothing is scored twice, and what is told."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import compare as result_file
import compare_table
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from ranks import run_ranks
from tiny import tiny_tokenizer
from tiny_runs import metrics_of, tiny_config, train_all

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.commands import launcher
from kto_dist.commands.cli import main
from kto_dist.comparison.answers import Answered, CannotAnswer, answered
from kto_dist.comparison.compare import compare, sources_of
from kto_dist.comparison.config import ComparisonConfig
from kto_dist.comparison.measure import START, choose, halves
from kto_dist.comparison.plan import planned
from kto_dist.comparison.report import answer_lines
from kto_dist.data import tokenise
from kto_dist.data.examples import load
from kto_dist.evaluation import generate, kept
from kto_dist.evaluation.answers import Answer, figures_of
from kto_dist.evaluation.config import JudgeConfig


def comparison(folder, model, log, **changes):
    """Three short runs, unless told otherwise; `compare__key=value` changes what is tried."""
    shared = {"data__heldout": 0.4, "train__max_steps": 4, "train__lr": 3e-3}
    own = {name: value for name, value in changes.items() if name.startswith("compare__")}
    rest = {name: value for name, value in changes.items() if name not in own}
    tree = tiny_config(folder, model, log, **shared | rest).model_dump(mode="json", by_alias=True)
    tree["compare"] = {"methods": ["sft", "kto", "dpo"]} | {name[9:]: value for name, value in own.items()}
    return ComparisonConfig(**tree)


def in_this_process(run):
    run_ranks(train_all, 1, [run.config])
    return 0


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_model, tiny_log):
    folder = tmp_path_factory.mktemp("compare")
    config = comparison(
        folder,
        tiny_model,
        tiny_log,
        compare__lr=[1e-4, 3e-3],
        tracking__enabled=True,
        tracking__uri=f"sqlite:///{folder / 'mlflow.db'}",
        answers__in_evaluate=3,
        answers__max_tokens=12,
        answers__cache=str(folder / "answers"),
    )
    return config, compare(config, in_this_process, Console())


def test_each_method_has_its_best_run_and_its_differences_to_kto(compared):
    config, found = compared
    assert [row.method for row in found.rows] == ["start", "sft", "kto", "dpo"]
    assert len(found.tried) == 6
    for method in ("sft", "kto", "dpo"):
        tried = {run.name: run.figure for run in found.tried if run.method == method}
        (chosen,) = (run.name for run in found.tried if run.method == method and run.chosen)
        assert tried[chosen] == max(tried.values())
    start, sft, kto, dpo = found.rows
    assert start.figures["auc"] == start.figures["accuracy/pairs"] == 0.5
    assert start.figures["rewards/margin"] == 0
    assert [len(row.curve) for row in found.rows] == [0, 0, 4, 4]  # sft takes good answers alone
    line = metrics_of(chosen_run(config, found, "dpo"))[2]
    assert dpo.curve[2] == (3, pytest.approx(line["rewards/margin"] / 0.1))
    assert not kto.against
    for row in (sft, dpo):
        for name, interval in row.against.items():
            assert interval.value == pytest.approx(row.figures[name] - kto.figures[name])
    assert "accuracy/pairs" in dpo.against


def chosen_run(config, found, method):
    (name,) = (row.name for row in found.rows if row.method == method)
    (run,) = (run for run in planned(config) if run.name == name)
    return run.config


def test_over_all_runs_each_pair_is_scored_once(compared):
    config, found = compared
    costs = [row.cost for row in found.rows if row.cost is not None]
    assert all(cost.pairs == cost.from_store + cost.scored for cost in costs)
    summaries = [json.loads(run.folder.summary.read_text())["reference"] for run in planned(config)]
    assert found.scored == sum(summary["scored"] for summary in summaries)
    # the second run of each method asks for what the first one asked for
    assert [summary["scored"] for summary in summaries[1::2]] == [0, 0, 0]
    # kto, the third run, has scored all rows: a loss on pairs of them finds every log-prob
    assert summaries[4]["scored"] == 0
    assert summaries[4]["pairs"] == summaries[4]["from_store"] > 0


def test_what_is_told_has_every_method_and_no_text_that_could_be_a_script(compared):
    config, _ = compared
    page = (Path(config.train.output) / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    for name in ("sft", "kto", "dpo", "start", "Differences to kto", "kto-dist train "):
        assert name in page
    assert "<script" not in page
    facts = json.loads((Path(config.train.output) / "comparison.json").read_text())
    assert facts["against"] == "kto"


def test_the_documents_table_has_every_method_and_its_difference_to_kto(compared):
    config, found = compared
    content = result_file.content_of(Path(config.train.output), 90.0, "beside a test")
    text = compare_table.compare(content)
    for row in found.rows:
        auc = row.intervals.get("auc")
        # all that the start has is the same at every prompt
        span = "no spread" if auc.method == "constant" else f"{auc.low:.3f} to {auc.high:.3f}"
        wanted = f"{row.figures['auc']:.3f} ({span})"
        assert f"| {row.method} | {'' if row.lr is None else f'{row.lr:g}'} | {wanted} |" in text
    assert text.count(" − kto* |") == 3 and "0.500 (no spread)" in text
    assert "6 runs of 4 steps of 16 rows: learning rates 0.0001 and 0.003, beta 0.1" in text
    assert f"2 minutes (one rank, beside a test); {found.scored:,} log-probs" in text


def test_mlflow_has_one_parent_and_the_runs_below_it(compared):
    config, _ = compared
    client = MlflowClient(config.tracking.uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == config.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 6
    assert parent.data.metrics["auc/start"] == 0.5
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"comparison.html", "comparison.json"}


def test_what_is_done_is_not_run_again_and_another_comparison_in_its_place_is_refused(compared):
    config, found = compared
    again = compare(config, lambda run: pytest.fail("runs again"), Console())
    assert again.rows == found.rows
    other = config.model_copy(update={"objective": config.objective.model_copy(update={"sft_weight": 0.5})})
    with pytest.raises(UserError, match=r"kto-lr0.0001-beta0.1 holds a finished run with other settings"):
        compare(other, lambda run: pytest.fail("runs again"), Console())


def test_a_judge_says_how_each_methods_new_answers_to_reported_prompts_fare_and_nothing_runs_again(compared, tmp_path):
    config, found = compared
    (tmp_path / "wish.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    judge = JudgeConfig(by="function", function=f"{tmp_path / 'wish.py'}:short")
    said = []
    console = Console()
    console.say = said.append
    again = compare(config.model_copy(update={"judge": judge}), lambda run: pytest.fail("runs again"), console)
    assert again.rows == found.rows
    facts = json.loads((Path(config.train.output) / "comparison.json").read_text())["answers"]
    assert facts["prompts"] == 3 <= found.prompts[1]
    judged = {method: set(own) for method, own in facts["judged"].items()}
    assert judged == {"sft": {"start", "kto"}, "kto": {"start"}, "dpo": {"start", "kto"}}
    for method, rivals in facts["judged"].items():
        for other, contest in rivals.items():
            wins = [
                1.0 if len(own[method]) < len(own[other]) else 0.5 * (len(own[method]) == len(own[other]))
                for own in facts["samples"]
            ]
            assert contest["figures"]["win_rate"]["value"] == pytest.approx(np.mean(wins)), (method, other)
    page = (Path(config.train.output) / "comparison.html").read_text()
    assert "New answers" in page and page.count("data:image/png;base64,") == 10
    assert any(line.startswith("new answers to 3 of the reported prompts") for line in said)


def test_methods_that_cannot_answer_are_compared_by_their_log_probs_all_the_same(compared, tmp_path, monkeypatch):
    """Hours of runs once ended with a traceback, and without a page."""
    config, found = compared
    shutil.rmtree(config.answers.cache, ignore_errors=True)
    page = Path(config.train.output) / "comparison.html"
    page.unlink()

    def broken(*arguments, **named):
        raise AttributeError("this family has no cache")

    monkeypatch.setattr(generate, "generate", broken)
    (tmp_path / "wish.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    judge, said, console = JudgeConfig(by="function", function=f"{tmp_path / 'wish.py'}:short"), [], Console()
    console.warn = said.append
    again = compare(config.model_copy(update={"judge": judge}), lambda run: pytest.fail("runs again"), console)
    assert again.rows == found.rows and page.exists()
    assert (
        len(said) == 1 and "LlamaForCausalLM answers no prompts (AttributeError: this family has no cache)" in said[0]
    )


def test_more_answers_for_the_judge_run_nothing_again_and_what_runs_say_on_their_way_does(
    tmp_path, tiny_model, tiny_log
):
    def run_of(**changes):
        (run,) = planned(comparison(tmp_path, tiny_model, tiny_log, compare__methods=["kto"], **changes))
        return run

    run = run_of(answers__in_evaluate=3)
    run.folder.path.mkdir(parents=True)
    for file in (run.folder.summary, run.folder.heldout_rows):
        file.touch()
    run.folder.config.write_text(to_yaml(run.config))
    assert run.is_done and run_of(answers__in_evaluate=0).is_done
    assert run_of(answers__in_evaluate=9, answers__max_tokens=99, answers__cache=str(tmp_path / "other")).is_done
    for changes in ({"answers__while_training": 2}, {"train__max_steps": 9}):
        with pytest.raises(UserError, match="holds a finished run with other settings"):
            assert run_of(**changes).is_done


def test_a_figure_that_every_prompt_gives_alike_has_no_range_in_the_judges_table():
    same = {"kto": [Answer(text="two words", finished=True)] * 3}
    figures = {"kto": {"words": figures_of(same)["words/kto"]}}
    found = Answered(judge="j", prompts=["a", "b", "c"], answers={}, figures=figures, contests={})
    assert any("2 (no spread)" in line for line in answer_lines(found))


def test_models_that_answer_are_packed_as_those_that_were_trained(tmp_path, tiny_model, tiny_log):
    settings = {"model__quantization": "nf4", "adapter__type": "lora"}
    config = comparison(tmp_path, tiny_model, tiny_log, **settings, compare__methods=["kto"])
    (run,) = planned(config)
    export = run.folder.export
    export.mkdir(parents=True)
    (export / "adapter_config.json").write_text("{}")
    run.folder.config.write_text(to_yaml(run.config))
    found = sources_of(config, [run], SimpleNamespace(rows=[SimpleNamespace(method="kto", name=run.name)]))
    assert {name: source.quantization for name, source in found.items()} == {"start": "nf4", "kto": "nf4"}
    assert (found["kto"].path, found["kto"].adapter) == (str(tiny_model), str(export))


def answers_of_the_start(folder, model, log, **changes):
    config = comparison(folder, model, log, answers__in_evaluate=3, answers__max_tokens=4, **changes)
    examples = load(tokenise.prepare(config.data, tiny_tokenizer())[1])
    return answered(
        config,
        {START: generate.Source(path=str(model), name="the start")},
        examples,
        np.ones(len(examples), bool),
        tiny_tokenizer(),
        SimpleNamespace(name="nobody"),
        START,
        START,
        Console(),
    )


def test_a_disk_too_full_for_answers_is_told_with_its_setting(tmp_path, tiny_model, tiny_log, small_disk):
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(UserError, match=r"^answers cannot be written: answers\.cache \(.*\) is full: make room"):
        answers_of_the_start(tmp_path, tiny_model, tiny_log, answers__cache=str(small_disk / "answers"))


def test_a_model_that_memory_has_no_room_for_is_one_that_cannot_answer(tmp_path, tiny_model, tiny_log, monkeypatch):
    def too_large(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 GiB")

    monkeypatch.setattr(generate, "load_model", too_large)
    with pytest.raises(CannotAnswer) as caught:
        answers_of_the_start(tmp_path, tiny_model, tiny_log)
    assert str(caught.value).startswith(f"out of memory while the start ({tiny_model}) was loaded in float32 onto cpu")
    assert caught.value.remedy == "take a device with more memory"


def test_a_run_that_fails_ends_the_comparison_with_its_status(tmp_path, tiny_model, tiny_log):
    assert compare(comparison(tmp_path, tiny_model, tiny_log), lambda run: 143, Console()) == 143


def test_rows_that_a_run_leaves_are_what_its_last_evaluation_saw(compared):
    config, _ = compared
    run = planned(config)[3]  # kto
    rows, after = kept.read(run.folder.heldout_rows), json.loads(run.folder.summary.read_text())["heldout"]["after"]
    for name in ("desirable", "undesirable"):
        chosen = rows.desirable == (name == "desirable")
        ratio = float(rows.column("reward").numpy()[chosen].mean())
        assert run.beta * ratio == pytest.approx(after[f"rewards/{name}"])


def test_a_prompts_rows_are_in_one_half_and_halves_are_a_function_of_prompts():
    prompts = np.random.default_rng(0).integers(0, 9, 40)
    half = halves(prompts)
    for prompt in np.unique(prompts):
        assert len(set(half[prompts == prompt].tolist())) == 1
    order = np.random.default_rng(1).permutation(40)
    assert (halves(prompts[order]) == half[order]).all()
    assert len(np.unique(prompts[half])) == len(np.unique(prompts)) // 2


def test_rows_of_one_half_keep_the_pairs_among_them():
    rows = kept.of(
        logps=np.array([-1.0, -2.0, -3.0, -4.0]),
        ref_logps=np.zeros(4),
        tokens=np.ones(4),
        sign=np.array([1.0, -1.0, 1.0, -1.0]),
        prompts=np.array([7, 7, 8, 8]),
    )
    half = kept.only(kept.paired(rows, np.array([[0, 1], [2, 3]])), np.array([False, False, True, True]))
    assert half.pairs.tolist() == [[0, 1]]
    assert half.column("logps").tolist() == [-3.0, -4.0]


def test_without_a_figure_the_first_of_the_grid_is_chosen(tmp_path, tiny_model, tiny_log):
    runs = planned(comparison(tmp_path, tiny_model, tiny_log, compare__methods=["kto"], compare__beta=[0.1, 0.2, 0.3]))
    names = [run.name for run in runs]
    assert choose(runs, dict.fromkeys(names, None))["kto"] is runs[0]
    assert choose(runs, dict(zip(names, [0.4, 0.7, 0.7], strict=True)))["kto"] is runs[1]


def test_each_run_has_the_settings_of_its_loss_alone(tmp_path, tiny_model, tiny_log):
    config = comparison(
        tmp_path,
        tiny_model,
        tiny_log,
        objective__desirable_weight=1.4,
        objective__sft_weight=0.2,
        compare__methods=["sft", "kto", "apo_zero_unpaired", "dpo"],
        compare__beta=[0.1, 0.3],
    )
    found = {run.name: run.config.objective for run in planned(config)}
    assert sorted(found) == sorted(
        ["sft-lr0.003"] + [f"{m}-lr0.003-beta{b}" for m in ("kto", "apo_zero_unpaired", "dpo") for b in (0.1, 0.3)]
    )
    assert found["dpo-lr0.003-beta0.3"].desirable_weight == "auto"
    assert (found["kto-lr0.003-beta0.3"].desirable_weight, found["kto-lr0.003-beta0.3"].beta) == (1.4, 0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__heldout": None}, "data.heldout is null.*give a path, or a fraction"),
        ({"compare__beta": [0.1] * 9}, "the grid has 19 runs, and compare.budget is 16"),
        ({"compare__methods": ["kto", "kto"]}, "names one twice"),
        ({"reference__path": "other"}, "reference.path .other. must be null"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_runs(
    tmp_path, tiny_model, tiny_log, changes, message
):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, tiny_model, tiny_log, **changes)


def test_the_command_runs_each_config_under_the_launcher_and_ends_as_a_run_ends(
    tmp_path, tiny_model, tiny_log, monkeypatch
):
    config = comparison(tmp_path, tiny_model, tiny_log)
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    started = []

    def run(job, arguments, ranks, *, folder):
        started.append((job, arguments, ranks, folder))
        return 143

    monkeypatch.setattr(launcher, "run", run)
    done = CliRunner().invoke(main, ["compare", str(path), "--ranks", "2", "tracking.uri=http://me:secret@host/"])
    assert done.exit_code == 143, done.output
    first = planned(config)[0]
    # files of settings hold no passwords, so that of the address goes beside them
    assert started == [("train", [str(first.file), "tracking.uri=http://me:secret@host/"], 2, first.folder.path)]
    assert "secret" not in first.file.read_text() + done.output


def test_the_commands_for_a_cluster_are_printed_with_their_configs(tmp_path, tiny_model, tiny_log):
    config = comparison(tmp_path, tiny_model, tiny_log)
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    done = CliRunner().invoke(main, ["compare", str(path), "compare.methods=[kto,dpo]", "--print"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 2
    for line, loss in zip(lines, ("kto", "dpo"), strict=True):
        file = line.removeprefix("kto-dist train ")
        assert yaml.safe_load(Path(file).read_text())["objective"]["loss"] == loss

"""`kto-dist evaluate`: a run or any model on held-out rows, with the store used and filled."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config, train_all

from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.commands.words import request, words_of
from kto_dist.evaluation.figures import Findings
from kto_dist.evaluation.intervals import Interval
from kto_dist.evaluation.table import lines_of
from kto_dist.training.config import Config
from kto_dist.training.evaluate import evaluate
from kto_dist.training.judged import Request, resolve


def a_run(folder: Path, model: Path, log: Path, **changes: Any) -> Config:
    """The folder of a finished run, as far as an evaluation looks at it; its model is `model` again."""
    config = tiny_config(folder, model, log, **changes)
    output = Path(config.train.output)
    output.mkdir()
    (output / "config.yaml").write_text(to_yaml(config))
    (output / "export").symlink_to(model)
    return config


def all_of(request: Request, times: int = 1) -> list[dict[str, Any]]:
    return [evaluate(request) for _ in range(times)]


def twice(request: Request) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What was found, and said meanwhile; and found again."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = evaluate(request)
    return found, said.getvalue(), evaluate(request)


def trained_and_evaluated(config: Config, fresh: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    summary = train_all([config])[0]
    run = config.train.output
    found = evaluate(Request(target=run))
    other = evaluate(
        Request(target=run, data=(f"fresh={fresh}", f"old={config.data.train[0]}"), against=config.model.path)
    )
    return summary, found, other


def test_a_run_is_evaluated_as_it_was_at_its_end_and_against_another_model(tmp_path, tiny_model, tiny_log):
    fresh = write_jsonl(tmp_path / "fresh.jsonl", thumbs(40, 12, seed=5))
    config = tiny_config(tmp_path, tiny_model, tiny_log, data__heldout=0.3, train__lr=3e-3)
    results = run_ranks(trained_and_evaluated, 2, config, str(fresh))
    summary, found, other = results[0]
    after = summary["heldout"]["after"]
    figures = {name: value for name, value in found["heldout"].items() if isinstance(value, float)}
    assert figures.keys() == {name for name, value in after.items() if isinstance(value, float)}
    assert figures == pytest.approx({name: after[name] for name in figures}, abs=1e-4)
    assert found["heldout"]["intervals"].keys() == after["intervals"].keys()
    assert json.loads((Path(config.train.output) / "evaluation.json").read_text()) == other

    # the start is its own reference: every reward of it is 0, and the difference is the run's own figure
    assert other["data"]["sets"] == ["fresh", "old"] and other["heldout"]["fresh/rows"] == 40
    assert other["heldout_against"]["rewards/all"] == 0 and other["heldout_against"]["auc"] == 0.5
    difference = other["difference"]["rewards/margin"]
    assert difference["value"] == pytest.approx(other["heldout"]["rewards/margin"])
    assert difference["low"] < difference["value"] < difference["high"]


def each_trained_and_evaluated(configs: list[Config]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(summary, evaluate(Request(target=summary["output"]))) for summary in map(_with_output, configs)]


def _with_output(config: Config) -> dict[str, Any]:
    return train_all([config])[0] | {"output": config.train.output}


def test_runs_of_losses_on_pairs_and_on_good_rows_are_evaluated_as_they_were_at_their_ends(
    tmp_path, tiny_model, tiny_log
):
    configs = [
        tiny_config(
            tmp_path,
            tiny_model,
            tiny_log,
            data__heldout=0.3,
            train__lr=3e-3,
            objective__loss=loss,
            train__output=str(tmp_path / loss),
            **settings,
        )
        for loss, settings in (("dpo", {"objective__label_smoothing": 0.1, "objective__sft_weight": 0.3}), ("sft", {}))
    ]
    ((dpo, sft),) = run_ranks(each_trained_and_evaluated, 1, configs)
    for summary, found in (dpo, sft):
        after = summary["heldout"]["after"]
        figures = {name: value for name, value in found["heldout"].items() if isinstance(value, float)}
        assert figures.keys() == {name for name, value in after.items() if isinstance(value, float)}
        assert figures == pytest.approx({name: after[name] for name in figures}, abs=1e-4)
        assert found["heldout"]["intervals"].keys() == after["intervals"].keys()
        # every row is asked about, whichever the loss takes, and each once: neither loss has KL pairs
        assert figures["rows/all"] == found["data"]["rows"] == found["model"]["scored"]
    assert "accuracy/pairs" in dpo[1]["heldout"]["intervals"] and "accuracy/pairs" not in sft[1]["heldout"]


def test_what_was_scored_once_is_not_scored_again(tmp_path, tiny_model):
    """Two folders with the same weights are one model to the store."""
    log = write_jsonl(tmp_path / "rows.jsonl", thumbs(30, 10))
    other = save_tiny(tmp_path / "other", seed=1)
    words = (f"reference.store={tmp_path / 'store'}", f"data.cache={tmp_path / 'cache'}", "data.max_length=96")
    asked = Request(
        target=str(other),
        reference=str(tiny_model),
        data=(str(log),),
        output=str(tmp_path / "found" / "figures.json"),
        overrides=(*words, "reference.dtype=fp32", "data.workers=1", "answers.in_evaluate=0"),
    )
    ((first, said, second),) = run_ranks(twice, 1, asked)
    assert first["heldout"] == second["heldout"] and first["heldout"]["rewards/all"] != 0
    assert [first[name]["scored"] for name in ("reference", "model")] == [60, 60]
    assert [second[name]["scored"] for name in ("reference", "model")] == [0, 0]
    assert json.loads((tmp_path / "found" / "figures.json").read_text()) == second
    for called, path in (("reference", tiny_model), ("model", other)):
        assert f"loading the {called} ({path}, float32)" in said and f"\n{called}: 60 pairs, 0 from the store" in said


def test_rows_longer_than_a_models_context_are_refused(tmp_path, tiny_model, tiny_log):
    short = save_tiny(tmp_path / "short", max_position_embeddings=64)
    config = a_run(tmp_path, tiny_model, tiny_log, data__heldout=0.3)
    with pytest.raises(UserError, match=r"data.max_length \(96\) must be at most the model's context of 64 tokens"):
        run_ranks(all_of, 1, Request(target=config.train.output, against=str(short)))


def test_another_vocabulary_is_refused(tmp_path, tiny_model, tiny_log):
    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = a_run(tmp_path, tiny_model, tiny_log, data__heldout=0.3)
    with pytest.raises(UserError, match=r"against \(.*other\) has another vocabulary"):
        run_ranks(all_of, 1, Request(target=config.train.output, against=str(other)))


def test_a_run_brings_rows_reference_and_settings(tmp_path, tiny_model, tiny_log):
    config = a_run(tmp_path, tiny_model, tiny_log, data__heldout=str(tiny_log), objective__beta=0.7)
    (Path(config.train.output) / "summary.json").write_text(
        json.dumps({"data": {"class_weights": {"undesirable": 1.5, "desirable": 1.0}}})
    )
    judged = resolve(Request(target=config.train.output, overrides=("reference.tokens_per_batch=777",)))
    assert judged.config.model.path == f"{config.train.output}/export"
    assert judged.config.reference.path == str(tiny_model)
    assert judged.config.data.train == (str(tiny_log),) and judged.config.data.heldout is None
    assert (judged.config.objective.beta, judged.config.reference.tokens_per_batch) == (0.7, 777)
    assert judged.weights == (1.5, 1.0)
    assert judged.output == Path(config.train.output) / "evaluation.json"


def test_a_run_that_chose_its_best_checkpoint_is_evaluated_on_its_file_of_held_out_rows(tmp_path, tiny_model, tiny_log):
    """There the held-out rows stand in the place of the training rows, and nothing is held out of them."""
    config = a_run(
        tmp_path,
        tiny_model,
        tiny_log,
        data__heldout=str(tiny_log),
        evaluate__every_steps=2,
        checkpoint__best="heldout/auc",
        train__stop_after=3,
        answers__every_steps=2,
        answers__while_training=1,
    )
    for asked in ({}, {"data": (str(tiny_log),)}):
        judged = resolve(Request(target=config.train.output, **asked))
        assert judged.config.data.heldout is None and judged.config.checkpoint.best is None


def test_a_model_takes_the_settings_of_the_run_that_it_is_compared_with(tmp_path, tiny_model, tiny_log):
    config = a_run(tmp_path, tiny_model, tiny_log, data__heldout={"a": str(tiny_log), "b": str(tiny_log)})
    judged = resolve(Request(target=str(tiny_model), against=config.train.output))
    assert (judged.config.model.path, judged.config.reference.path) == (str(tiny_model), str(tiny_model))
    assert judged.against.path == f"{config.train.output}/export" and judged.sets == ("a", "b")


def test_files_are_sets_called_as_they_are_or_as_one_likes(tmp_path, tiny_model):
    asked = Request(target="m", reference="r", data=("runs/hard one.jsonl", "new=x/y.parquet"))
    judged = resolve(asked)
    assert judged.config.data.train == {"hard one": ("runs/hard one.jsonl",), "new": ("x/y.parquet",)}
    with pytest.raises(UserError, match=r"two sets are called y; give names, as in --data fresh=b/y.jsonl"):
        resolve(Request(target="m", reference="r", data=("a/y.jsonl", "b/y.jsonl")))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": ("x.jsonl",)}, "is no run's folder, so its reference is not known"),
        ({"reference": "org/model"}, "is no run's folder: say which rows with --data FILE"),
        ({"reference": "org/model", "data": ("x",), "overrides": ("kto",)}, "override 'kto' must read section.key"),
        ({"reference": "/nowhere/at/all", "data": ("x",)}, r"the reference \(/nowhere/at/all\) does not exist"),
    ],
)
def test_what_is_not_known_is_asked_for(tiny_model, asked, message):
    with pytest.raises(UserError, match=message):
        resolve(Request(target=str(tiny_model), **asked))


def test_a_target_that_is_not_there_is_told_as_such():
    with pytest.raises(UserError, match="runs/nosuch is no folder here, so its reference is not known"):
        resolve(Request(target="runs/nosuch", data=("x.jsonl",)))


def test_a_run_without_an_export_says_how_to_get_one(tmp_path, tiny_model, tiny_log):
    config = a_run(tmp_path, tiny_model, tiny_log, data__heldout=0.3)
    (Path(config.train.output) / "export").unlink()
    with pytest.raises(UserError, match=r"kto-dist export .*run` writes the model of its newest checkpoint"):
        resolve(Request(target=config.train.output))


def test_a_run_that_holds_out_nothing_needs_rows(tmp_path, tiny_model, tiny_log):
    config = a_run(tmp_path, tiny_model, tiny_log)
    with pytest.raises(UserError, match="holds out no rows: say which rows with --data FILE"):
        resolve(Request(target=config.train.output))


def test_a_figure_without_spread_has_no_range_in_the_table():
    sure = Interval(value=0.5, low=0.5, high=0.5, method="constant", prompts=90)
    found = Findings(figures={"auc": 0.5}, intervals={"auc": sure})
    lines = lines_of(found, (), found, {"auc": sure})
    assert lines[1].split() == ["auc", "0.5", "no", "spread", "0.5", "+0.5", "no", "spread"]
    assert lines[2].startswith("(no spread: every prompt says the same") and len(lines) == 3


def test_the_words_of_a_command_line_come_back_as_they_were():
    asked = Request(target="run", data=("a=b", "c"), reference="r", against="x", output="o", overrides=("kto.beta=1",))
    assert request(words_of(asked)) == asked
    assert request(["run"]) == Request(target="run")
    with pytest.raises(UserError, match="No such option"):
        request(["run", "--nothing"])


def test_the_table_shows_what_matters_with_its_range_and_says_where_it_is_no_bootstrap():
    interval = Interval(value=0.8, low=0.75, high=0.85, method="wilson", prompts=30)
    found = Findings(
        figures={"accuracy/all": 0.8, "logps/all": -3.0, "hard/rows": 12.0, "hard/auc": 0.6},
        intervals={"accuracy/all": interval},
        slices={"model": {"v1": {"rows": 9, "accuracy/all": 0.7}}},
    )
    lines = lines_of(found, ["hard"], found, {"accuracy/all": interval})
    assert lines[1].split() == ["accuracy/all", "0.8", "0.75", "to", "0.85", "0.8", "+0.8", "0.75", "to", "0.85"]
    assert not any("logps" in line for line in lines)
    assert "wilson in place of a bootstrap" in lines[2]
    assert any(line.split() == ["hard", "12", "0.6"] for line in lines)
    assert any(line.split() == ["v1", "9", "0.7"] for line in lines)

"""A run's own answers: the same prompts with every evaluation, in folder and report, and training does not move."""

import contextlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny_memory import room_for_one_prompt
from tiny_runs import TIMED, WORSE, metrics_of, tiny_config, train_all, train_and_die_after

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.evaluation import generate
from kto_dist.record.report import write_report
from kto_dist.record.verdict import shortened
from kto_dist.training import samples
from kto_dist.training.config import Config
from kto_dist.training.evaluate import evaluate
from kto_dist.training.judged import Request
from kto_dist.training.samples import IN_TABLE, table_of

ASKED = {
    "answers__while_training": 3,
    "answers__max_tokens": 10,
    "data__heldout": 0.3,
    "evaluate__every_steps": 2,
    "train__max_steps": 4,
}


def answers_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.train.output) / "answers.jsonl").read_text().splitlines()]


def moved(config: Config) -> list[dict[str, float]]:
    return [{n: v for n, v in line.items() if n not in TIMED} for line in metrics_of(config)]


def test_the_same_prompts_are_answered_with_every_evaluation_and_training_does_not_move(tmp_path, tiny_model, tiny_log):
    on = tiny_config(tmp_path, tiny_model, tiny_log, **ASKED, answers__temperature=1.0)
    off = tiny_config(
        tmp_path, tiny_model, tiny_log, **ASKED | {"answers__while_training": 0}, train__output=str(tmp_path / "off")
    )
    run_ranks(train_all, 1, [on, off])
    lines = answers_of(on)
    assert [line["step"] for line in lines] == [0, 2, 4]
    prompts = [[one["prompt"] for one in line["answers"]] for line in lines]
    assert prompts[0] == prompts[1] == prompts[2] and len(set(prompts[0])) == 3
    assert moved(on) == moved(off)
    assert not (tmp_path / "off" / "answers.jsonl").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_whole_and_sharded_weights_answer_alike_on_any_number_of_ranks(tmp_path, tiny_model, tiny_log, ranks):
    configs = [
        tiny_config(
            tmp_path,
            tiny_model,
            tiny_log,
            **ASKED,
            deepspeed__zero_stage=stage,
            train__output=str(tmp_path / f"stage {stage}"),
        )
        for stage in (2, 3)
    ]
    run_ranks(train_all, ranks, configs)
    whole, sharded = map(answers_of, configs)
    assert whole == sharded
    assert [line["step"] for line in whole] == [0, 2, 4] and all(one["answer"] for one in whole[0]["answers"])


def trained_and_evaluated(config: Config) -> dict[str, Any]:
    train_all([config])
    return evaluate(Request(target=config.train.output, overrides=("answers.in_evaluate=3",)))


def test_an_exported_adapter_answers_as_the_policy_did(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, **ASKED, adapter__type="lora", train__lr=0.02)
    found = run_ranks(trained_and_evaluated, 1, config)[0]
    first, *_, last = answers_of(config)
    samples = found["answers"]["samples"]
    for name, line in (("model", last), ("reference", first)):
        # in the same words here and there: a prompt is found by its text
        said = {one["prompt"]: one["answer"] for one in line["answers"]}
        assert {one["prompt"]: one[name] for one in samples} == said, name
    assert first["answers"] != last["answers"]


def test_answers_come_at_steps_of_their_own_and_evaluations_at_theirs(tmp_path, tiny_model, tiny_log):
    own = {**ASKED, "answers__every_steps": 1, "evaluate__every_steps": 3}
    often = tiny_config(tmp_path, tiny_model, tiny_log, **own)
    own |= {"answers__every_steps": 3, "evaluate__every_steps": None, "train__output": str(tmp_path / "seldom")}
    seldom = tiny_config(tmp_path, tiny_model, tiny_log, **own)
    run_ranks(train_all, 1, [often, seldom])
    assert [line["step"] for line in answers_of(often)] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in answers_of(seldom)] == [0, 3, 4]
    found = [
        [json.loads(line)["step"] for line in (Path(config.train.output) / "heldout.jsonl").read_text().splitlines()]
        for config in (often, seldom)
    ]
    assert found == [[0, 3, 4], [0, 4]]
    # and they are the same answers, whenever they are asked for
    assert answers_of(often)[3] == answers_of(seldom)[1]


def test_the_exported_weights_have_answers_though_none_were_due_at_their_step(tmp_path, tiny_model, tiny_log):
    own = {**WORSE, "answers__while_training": 2, "answers__max_tokens": 6, "answers__every_steps": 5}
    config = tiny_config(tmp_path, tiny_model, tiny_log, **own)
    ((summary,),) = run_ranks(train_all, 1, [config])
    best = summary["best"]["step"]
    assert best not in (0, 5, 8)
    assert [line["step"] for line in answers_of(config)] == [0, 5, 8, best]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"answers": {"every_steps": 5}}, r"answers.every_steps \(5\) needs data.heldout"),
        ({"answers": {"every_steps": 5, "while_training": 0}}, r"every_steps \(5\) needs while_training"),
    ],
)
def test_steps_without_prompts_to_answer_are_refused(sections, message):
    with pytest.raises(UserError, match=message):
        Config.build({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, **sections})


def test_a_run_that_goes_on_keeps_its_first_answers(tmp_path, tiny_model, tiny_log):
    whole = tiny_config(tmp_path, tiny_model, tiny_log, **ASKED, train__output=str(tmp_path / "whole"))
    killed = tiny_config(tmp_path, tiny_model, tiny_log, **ASKED, checkpoint__every_steps=1)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(train_and_die_after, 1, killed, 3)
    run_ranks(train_all, 1, [killed, whole])
    assert answers_of(killed) == answers_of(whole)


def _failing(config: Config) -> tuple[dict[str, Any], str]:
    """In a rank of its own, which ends with it: the summary, and what was said."""

    def broken(*arguments: Any, **named: Any) -> Any:
        raise AttributeError("this family has no cache")

    generate.generate = broken
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = train_all([config])[0]
    return summary, said.getvalue()


def test_a_family_that_cannot_generate_is_told_of_once_and_trains(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, **ASKED)
    summary, said = run_ranks(_failing, 2, config)[0]
    assert summary["steps"] == 4 and not (Path(config.train.output) / "answers.jsonl").exists()
    assert said.count("LlamaForCausalLM answers no prompts (AttributeError: this family has no cache)") == 1


def _on_a_small_device(config: Config) -> tuple[dict[str, Any], str]:
    """The summary, and what was said."""
    room_for_one_prompt()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = train_all([config])[0]
    return summary, said.getvalue()


def test_where_a_rank_lacks_memory_half_the_prompts_at_once_give_the_same_answers(tmp_path, tiny_model, tiny_log):
    wanted = {**ASKED, "answers__while_training": 6}
    config, roomy = (
        tiny_config(tmp_path, tiny_model, tiny_log, **wanted, train__output=str(tmp_path / name)) for name in "ab"
    )
    run_ranks(train_all, 2, [roomy])
    summary, said = run_ranks(_on_a_small_device, 2, config)[0]
    assert answers_of(config) == answers_of(roomy) and len(answers_of(config)[0]["answers"]) == 6
    assert summary["memory"] == ["out of memory while prompts were answered: going on with 1 at once"]
    assert " ".join(said.split()).count("going on with 1 at once. To start there, set answers.batch=1") == 1


def _others_go_on_meeting(config: Config) -> list[bool]:
    """Whether, each time that this rank answered, collectives were over before it had."""
    answer, ask, met, over = generate.generate, comm.any_, list[bool](), [0]

    def counting(flag: bool) -> bool:
        found = ask(flag)
        over[0] += 1
        return found

    def slow(lm: Any, prompts: Any, *arguments: Any, **named: Any) -> Any:
        if prompts:
            before, deadline = over[0], time.monotonic() + 120
            while over[0] < before + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            met.append(over[0] >= before + 3)
        return answer(lm, prompts, *arguments, **named)

    generate.generate, comm.any_ = slow, counting
    train_all([config])
    return met


def test_a_rank_without_prompts_waits_for_long_answers_and_not_in_one_collective(tmp_path, tiny_model, tiny_log):
    """It would end the run at `cluster.timeout`."""
    wanted = {**ASKED, "answers__while_training": 1, "evaluate__every_steps": None, "train__max_steps": 1}
    config = tiny_config(tmp_path, tiny_model, tiny_log, **wanted)
    assert run_ranks(_others_go_on_meeting, 2, config) == [[True, True], []]


def _slow(config: Config) -> str:
    """In a rank of its own: what is said of answers that take longer than they may."""
    samples.LONG = 0.0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_all([config])
    return " ".join(said.getvalue().split())


def test_answers_that_take_long_are_told_once_with_what_shortens_them(tmp_path, tiny_model, tiny_log):
    (said,) = run_ranks(_slow, 1, tiny_config(tmp_path, tiny_model, tiny_log, **ASKED))
    told = re.findall(r"answering 3 prompts took \d+ s, and comes again every 2 steps and at the end", said)
    assert len(told) == 1
    assert "answers.while_training=0 leaves them out" in said


def line(step: int, *answers: str) -> dict[str, Any]:
    told = [
        {"prompt": f"question {n}", "answer": text, "finished": True, "tokens": len(text)}
        for n, text in enumerate(answers)
    ]
    return {"step": step, "answers": told}


def test_the_report_shows_first_answers_beside_those_of_the_exported_weights(tmp_path):
    lines = [line(0, "<b>old</b>", "and old as well"), line(2, "best", "b"), line(4, "last", "l")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"step": 4, "accuracy/all": 0.6}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "question 0" in page and "&lt;b&gt;old&lt;/b&gt;" in page and "last" in page and "best" not in page
    assert "answers 80% shorter (of 2 prompts)" in page
    (tmp_path / "summary.json").write_text(json.dumps({"best": {"step": 2}}))
    page = write_report(tmp_path).read_text()
    assert ">best<" in page and ">last<" not in page


def test_the_report_shows_what_an_evaluation_found_of_the_models_own_answers(tmp_path):
    sure = {"value": 0.61, "low": 0.52, "high": 0.7, "method": "bootstrap", "prompts": 60}
    answers = {
        "prompts": 60,
        "figures": {"words/model": 3.5, "identical": sure},
        "judged": {"reference": {"judge": "<wish>", "figures": {"win_rate": sure}}},
        "on_policy": {},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({"answers": answers}))
    page = write_report(tmp_path).read_text()
    assert "60 held-out prompts answered" in page and "0.52 to 0.70" in page
    assert "judged by &lt;wish&gt; in both orders" in page and "in nats" not in page
    (tmp_path / "evaluation.json").write_text("{")
    assert "Its own answers" not in write_report(tmp_path).read_text()


def test_only_a_great_change_of_length_is_worth_watching():
    first, second = line(0, "x" * 10)["answers"], line(1, "y" * 12)["answers"]
    assert shortened((first, second)) == [] and shortened(([], second)) == []
    assert shortened((first, line(1, "z" * 14)["answers"])) == ["answers 40% longer (of 1 prompts)"]


def test_the_table_has_a_row_an_answer_with_the_first_one_beside_it():
    rows = table_of([line(0, "a", "b"), line(5, "c", "d")])
    assert rows[0] == (5, "question 0", "a", "c", True, 1) and rows[-1] == (0, "question 1", "b", "b", True, 1)


def test_the_table_of_many_steps_has_the_first_and_the_newest():
    steps = [row[0] for row in table_of([line(step, "a") for step in range(200)])]
    assert len(steps) == IN_TABLE and steps[:2] == [199, 198] and steps[-2:] == [151, 0]

"""Judges of every kind say the same of the same answers, and what verdicts come to is what they mean."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import serving

from kto_dist.base.errors import UserError
from kto_dist.evaluation.config import JudgeConfig
from kto_dist.evaluation.contest import Contest, Pair, contest
from kto_dist.evaluation.endpoint import Endpoint
from kto_dist.evaluation.judges import Comparison, judge_of, read_verdict
from kto_dist.evaluation.table import answer_lines
from kto_dist.record.mlflow_judge import TASK

ASKED = [
    Comparison(prompt="q", first="a long answer", second="short"),
    Comparison(prompt="q", first="short", second="a long answer"),
    Comparison(prompt='a "quoted"\nline', first="equal", second="equal"),
]
LONGER = """
import json, sys

def of_two(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"

def as_number(prompt, first, second):
    return len(first) - len(second)

def of_one(prompt, answer, unit=1):
    return len(answer) / unit

def strange(prompt, first, second):
    return "the first one"

def broken(prompt, first, second):
    return {}[prompt]

def of_four(a, b, c, d): ...

if __name__ == "__main__":
    for line in sys.stdin:
        print(of_two(**json.loads(line)))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "longer.py"
    path.write_text(LONGER)
    return path


def prefers_longer(body: dict[str, Any]) -> str:
    """As a model would say it: of the two answers in the question, the longer one."""
    asked = body["messages"][-1]["content"]
    if "[Answer A]" in asked:
        first, second = re.search(r"\[Answer A]\n(.*)\n\n\[Answer B]\n(.*)\n\n\[Your", asked, re.DOTALL).groups()
        words = ("Verdict: A", "Verdict: B", "Verdict: tie")
        return "Answer A is one, B another.\n" + words[(len(first) < len(second)) + 2 * (len(first) == len(second))]
    # MLflow's own form
    whole = " ".join(message["content"] for message in body["messages"])
    first, second = (re.search(rf'[\'"]{name}[\'"]: [\'"](.*?)[\'"]', whole)[1] for name in ("first", "second"))
    word = "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
    return json.dumps({"result": word, "rationale": "the longer one"})


@pytest.mark.parametrize("name", ["of_two", "as_number", "of_one"])
def test_functions_of_two_answers_and_of_one_judge_alike(file, name):
    judge = judge_of(JudgeConfig(by="function", function=f"{file}:{name}"))
    assert judge(ASKED) == ["first", "second", "tie"]


def test_a_command_reads_a_line_of_json_and_writes_a_verdict(file):
    judge = judge_of(JudgeConfig(by="command", command=f"{sys.executable} {file}"))
    assert judge(ASKED) == ["first", "second", "tie"] and judge([]) == []


def test_a_model_behind_an_api_judges_and_gets_the_key_and_no_name_of_a_side(file, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    with serving(prefers_longer) as server:
        judge = judge_of(JudgeConfig(by="endpoint", base_url=server.url, key="MY_KEY", instructions="Be strict."))
        assert judge(ASKED) == ["first", "second", "tie"]
        assert "tiny" in judge.name and "secret-1" not in repr(judge)
    path, body, authorization = server.asked[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", "Bearer secret-1", "tiny")
    assert body["messages"][0]["content"] == "Be strict." and body["temperature"] == 0


def test_mlflows_judge_works_with_a_local_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(prefers_longer) as server:
        judge = judge_of(JudgeConfig(by="mlflow", model="openai:/tiny", base_url=server.url, parallel=1))
        assert judge(ASKED) == ["first", "second", "tie"]
    assert {path for path, *_ in server.asked} == {"/v1/chat/completions"}


@pytest.mark.parametrize("by", ["endpoint", "mlflow"])
def test_a_judge_that_is_asked_in_other_words_is_another_one(by):
    """What it has said is kept by this: its question, and all that decides the reply."""

    def known_by(**changes: Any) -> str:
        given = {"by": by, "model": "openai:/x", "base_url": "http://localhost:9/v1", "instructions": "Be strict."}
        return judge_of(JudgeConfig(**given | changes)).identity

    question = TASK if by == "mlflow" else "[The user's message]"
    assert any(question in str(fact) for fact in json.loads(known_by()))
    changes = {"model": "openai:/y", "base_url": "http://localhost:8/v1", "instructions": "Be kind.", "max_tokens": 7}
    assert len({known_by(), *(known_by(**{name: value}) for name, value in changes.items())}) == 5


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "first"),
        ("I first thought verdict: A.\n**Verdict:** B", "second"),
        ("verdict: Answer B", "second"),
        ("[[tie]]", "tie"),
        ("B", "second"),
        ("A is a fine answer, and so is B.", None),
        ("", None),
    ],
)
def test_a_reply_has_the_verdict_that_it_states_last(reply, verdict):
    assert read_verdict(reply) == verdict


def test_a_busy_server_is_asked_again_and_a_refusal_is_told_at_once():
    with serving(lambda body: "Verdict: A") as server:
        endpoint = Endpoint(url=server.url, model="tiny", pause=0.01)
        server.refusals = [503, 429]
        assert endpoint.chat([{"role": "user", "content": "?"}]).text == "Verdict: A"
        server.refusals = [401] * 9
        with pytest.raises(UserError, match=r"/v1/chat/completions cannot be used \(401 Unauthorized: not now"):
            endpoint.chat([{"role": "user", "content": "?"}])
        assert len(server.refusals) == 8
    with pytest.raises(UserError, match=r"chat/completions cannot be used .*refused"):
        endpoint.chat([{"role": "user", "content": "?"}])


def test_a_server_that_hangs_up_in_mid_answer_is_asked_again():
    with serving(lambda body: "Verdict: A") as server:
        server.cut_short = 2
        endpoint = Endpoint(url=server.url, model="tiny", pause=0.01)
        assert endpoint.chat([{"role": "user", "content": "?"}]).text == "Verdict: A"
        server.cut_short = 9
        with pytest.raises(UserError, match=r"chat/completions cannot be used"):
            endpoint.chat([{"role": "user", "content": "?"}])


def test_an_address_that_is_none_is_told_at_once():
    """It was asked five times, with pauses."""
    endpoint = Endpoint(url="http://127.0.0.1:80a/v1", model="tiny", pause=1e6)
    with pytest.raises(UserError, match="chat/completions cannot be used .*80a"):
        endpoint.chat([{"role": "user", "content": "?"}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strange", r"returned 'the first one': it must return first, second, tie, None or a number"),
        ("broken", "failed: KeyError"),
        ("of_four", "takes 4 arguments"),
        ("missing", "has no function missing"),
    ],
)
def test_mistakes_in_a_judge_are_sentences(file, name, message):
    with pytest.raises(UserError, match=message):
        judge_of(JudgeConfig(by="function", function=f"{file}:{name}"))(ASKED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "print('first')"], "gave 1 verdicts for 3 comparisons and ended with status 0"),
        (["-c", "print('A\\nB\\nC')"], "wrote 'A': a verdict is"),
        (["-c", "import sys; sys.exit('no model here')"], "status 1.*no model here"),
    ],
)
def test_mistakes_in_a_command_are_sentences(words, message):
    with pytest.raises(UserError, match=message):
        judge_of(JudgeConfig(by="command", command=[sys.executable, *words]))(ASKED)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "endpoint"}, r"by \(endpoint\) needs base_url"),
        ({"by": "function", "function": "a:b", "model": "x"}, r"by \(function\) does not use model"),
        ({"model": "x"}, "model is given and by is null"),
        ({"by": "mlflow", "model": "openai:/x", "key": "MY_KEY"}, r"by \(mlflow\) does not use key \(MY_KEY\)"),
    ],
)
def test_a_judge_has_what_it_needs_and_nothing_else(given, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**given)


class Fixed:
    """A judge by a rule, which notes what it was asked."""

    name = "fixed"
    identity = at_once = None

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, []

    def __call__(self, asked: Any) -> list[Any]:
        self.asked += asked
        return [self.rule(one) for one in asked]


def pairs(count: int, ours: str = "ours", theirs: str = "theirs") -> list[Pair]:
    return [Pair(prompt=f"prompt {number}", ours=ours, theirs=theirs) for number in range(count)]


def values(found: Contest) -> dict[str, float]:
    return {name: interval.value for name, interval in found.figures().items()}


def test_a_judge_that_goes_by_the_place_wins_nothing_for_either_and_every_verdict_flips():
    found = values(contest(Fixed(lambda one: "first"), pairs(60)))
    assert (found["win_rate"], found["flips"], found["prefers_first"]) == (0.5, 1.0, 1.0)


def test_a_judge_that_knows_the_better_answer_names_it_in_both_orders():
    judge = Fixed(lambda one: "first" if one.first == "ours" else "second")
    found = contest(judge, pairs(60)).figures()
    assert found["win_rate"].value == 1 and found["flips"].value == 0 and found["prefers_first"].value == 0.5
    # 60 of 60 does not mean all
    assert found["win_rate"].method == "wilson" and found["win_rate"].low < 0.96
    assert {(one.first, one.second) for one in judge.asked} == {("ours", "theirs"), ("theirs", "ours")}


def test_equal_answers_are_ties_and_nobody_is_asked():
    judge = Fixed(lambda one: "second")
    found = contest(judge, [*pairs(3, "same", "same"), *pairs(1)])
    assert len(judge.asked) == 2 and found.to_dict()["identical"] == 3
    assert values(found)["ties"] == pytest.approx(6 / 8)


def test_a_verdict_that_was_not_given_counts_for_neither():
    judge = Fixed(lambda one: None if one.first == "ours" else "second")
    found = contest(judge, pairs(10))
    assert found.to_dict()["without_verdict"] == 10
    assert "(10 of 20 verdicts were not given)" in answer_lines({}, ["model", "other"], {"other": found}, {})
    # what there is of verdicts goes to ours
    assert values(found)["win_rate"] == 1 and "flips" not in values(found)


def test_what_length_alone_wins_is_gone_at_equal_length():
    """A judge that takes the longer answer, of models of which one writes longer ones in four of five cases."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 40, 300).round().astype(int)
    made = [Pair(prompt=f"{n}", ours="x" * (200 + d), theirs="y" * 200) for n, d in enumerate(longer.tolist())]
    noise = {pair.prompt: float(rng.normal(0, 20)) for pair in made}

    def by_length(one: Comparison) -> str:
        more = len(one.first) - len(one.second) + noise[one.prompt] * (1 if one.first[0] == "x" else -1)
        return "first" if more > 0 else "second"

    found = contest(Fixed(by_length), made).figures()
    assert found["win_rate"].low > 0.65 and found["prefers_longer"].value > 0.8
    equal = found["win_rate/equal_length"]
    assert equal.low < 0.5 < equal.high and equal.high - equal.low < 0.3


def test_at_equal_length_nothing_changes_where_lengths_are_equal():
    rng = np.random.default_rng(1)
    wins = {f"prompt {n}": rng.random() < 0.7 for n in range(200)}
    judge = Fixed(lambda one: "first" if (one.first == "ours!!") == wins[one.prompt] else "second")
    found = values(contest(judge, pairs(200, "ours!!", "theirs")))
    assert found["win_rate/equal_length"] == pytest.approx(found["win_rate"], abs=0.002)


def test_the_demos_wish_is_a_judge_of_single_answers():
    wish = Path(__file__).parent.parent / "launch" / "demo" / "wish.py"
    judge = judge_of(JudgeConfig(by="function", function=f"{wish}:approves"))
    good = "A rainbow appears when sunlight bends and splits inside falling raindrops."
    made = [Pair(prompt="What makes a rainbow appear?", ours=good, theirs="The answer is simple.")] * 2
    found = contest(judge, made, np.arange(2)).figures()
    assert found["win_rate"].value == 1
    assert (found["score/ours"].value, found["score/theirs"].value) == (1, 0)


def test_the_interval_of_a_win_rate_covers_what_it_estimates():
    """In nine of ten contests and more, of 60 prompts with three pairs each that are alike."""
    rng, inside = np.random.default_rng(3), 0
    prompts = np.repeat(np.arange(60), 3)
    for _ in range(200):
        better = rng.beta(3, 2, 60)[prompts]
        won = (rng.random(180) < better).astype(float)
        found = Contest(
            judge="x",
            prompts=prompts,
            first=won,
            second=won,
            longer=np.zeros(180),
            identical=np.zeros(180, bool),
            scores=None,
        )
        interval = found.figures()["win_rate"]
        inside += interval.low <= 0.6 <= interval.high
    assert 180 <= inside <= 199


def test_what_is_written_of_a_contest_is_json(file):
    judge = judge_of(JudgeConfig(by="function", function=f"{file}:of_one"))
    written = json.loads(json.dumps(contest(judge, pairs(4)).to_dict()))
    assert written["pairs"] == 4 and written["figures"]["win_rate"]["value"] == 0


def test_a_text_is_gone_on_from_and_a_limit_of_tokens_leaves_it_unfinished():
    with serving(lambda body: body["prompt"] + "!") as server:
        server.finish_reason = "length"
        reply = Endpoint(url=server.url, model="tiny").complete("hello", max_tokens=1)
    assert (reply.text, reply.finished) == ("hello!", False)
    assert server.asked[0][0] == "/v1/completions"

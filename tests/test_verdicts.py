"""What a judge has said is found by content: who judges, the prompt, both answers and their order."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from openai_server import serving

from kto_dist.base.errors import UserError
from kto_dist.base.keyed import Keyed
from kto_dist.evaluation.config import JudgeConfig
from kto_dist.evaluation.contest import Contest, Pair, contest
from kto_dist.evaluation.judges import judge_of

PAIRS = [Pair(prompt=f"prompt {n}", ours="ours" + "!" * n, theirs="theirs") for n in range(4)]
JUDGE = """
from pathlib import Path

ASKED = Path({asked!r})

def noted(*what):
    with ASKED.open("a") as file:
        file.write(repr(what) + "\\n")
    if what[0] == "prompt 3" and ASKED.with_name("broken").exists():
        raise RuntimeError("no more")

def of_two(prompt, first, second):
    noted(prompt, first, second)
    return None if ASKED.with_name("silent").exists() else "first" if len(first) > len(second) else "second"

def of_one(prompt, answer):
    noted(prompt, answer)
    return len(answer)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(JUDGE.format(asked=str(tmp_path / "asked")))
    return path


def asked(folder: Path) -> int:
    """How often the functions were called."""
    return len((folder / "asked").read_text().splitlines()) if (folder / "asked").exists() else 0


def judged(folder: Path, pairs: list[Pair] = PAIRS, said: list[str] | None = None, **settings: Any) -> Contest:
    judge = judge_of(JudgeConfig(**settings))
    assert judge is not None
    return contest(judge, pairs, cache=folder / "verdicts", say=(said if said is not None else []).append)


def same(one: Contest, other: Contest) -> bool:
    return {**one.to_dict(), "kept": 0} == {**other.to_dict(), "kept": 0}


def test_a_verdict_is_asked_for_once_in_each_order_and_the_cache_says_how_many_it_had(tmp_path, file):
    settings, said = {"by": "function", "function": f"{file}:of_two"}, list[str]()
    first = judged(tmp_path, PAIRS[:3], said, **settings)
    assert (asked(tmp_path), first.kept) == (6, 0)
    again = judged(tmp_path, PAIRS, said, **settings)
    assert asked(tmp_path) == 8 and again.kept == again.to_dict()["kept"] == 6
    assert said[1] == f"judge ({file}:of_two): 6 verdicts kept, 2 to ask for"
    assert same(judged(tmp_path, PAIRS, **settings), again) and asked(tmp_path) == 8
    # another order is another question
    turned = [Pair(prompt=pair.prompt, ours=pair.theirs, theirs=pair.ours) for pair in PAIRS]
    assert judged(tmp_path, turned, **settings).kept == 8


def test_a_judge_of_single_answers_scores_each_once(tmp_path, file):
    settings = {"by": "function", "function": f"{file}:of_one"}
    found = judged(tmp_path, **settings)
    assert asked(tmp_path) == 8 and found.figures()["score/theirs"].value == 6
    assert same(judged(tmp_path, **settings), found) and asked(tmp_path) == 8


def test_a_function_that_has_changed_is_asked_again(tmp_path, file):
    settings = {"by": "function", "function": f"{file}:of_two"}
    judged(tmp_path, **settings)
    file.write_text(file.read_text() + "# changed\n")
    assert judged(tmp_path, **settings).kept == 0 and asked(tmp_path) == 16
    # and another function of the same file is another judge
    assert judged(tmp_path, by="function", function=f"{file}:of_one").kept == 0


def test_a_command_whose_program_or_words_have_changed_is_asked_again(tmp_path):
    program = tmp_path / "judge.py"
    program.write_text("import sys\nfor line in sys.stdin:\n    print('first')\n")
    settings = {"by": "command", "command": [sys.executable, str(program)]}
    assert [judged(tmp_path, **settings).kept for _ in range(2)] == [0, 8]
    assert judged(tmp_path, by="command", command=[*settings["command"], "--strict"]).kept == 0
    program.write_text(program.read_text() + "# changed\n")
    assert judged(tmp_path, **settings).kept == 0


@pytest.mark.parametrize("changed", [{"instructions": "Be strict."}, {"model": "other"}, {"max_tokens": 9}])
def test_a_model_is_asked_once_by_address_name_and_instructions(tmp_path, changed):
    with serving(lambda body: "Verdict: A") as server:
        settings = {"by": "endpoint", "base_url": server.url, "model": "tiny"}
        assert [judged(tmp_path, **settings).kept for _ in range(2)] == [0, 8] and len(server.asked) == 8
        assert judged(tmp_path, **settings | changed).kept == 0 and len(server.asked) == 16


def test_what_was_said_before_a_judge_failed_is_kept(tmp_path, file):
    settings = {"by": "function", "function": f"{file}:of_two"}
    (tmp_path / "broken").touch()
    with pytest.raises(UserError, match="failed: RuntimeError: no more"):
        judged(tmp_path, **settings)
    (tmp_path / "broken").unlink()
    # three pairs in the order that came first, before the fourth
    assert judged(tmp_path, **settings).kept == 3


def test_a_verdict_that_was_not_given_is_asked_for_again(tmp_path, file):
    settings = {"by": "function", "function": f"{file}:of_two"}
    (tmp_path / "silent").touch()
    assert judged(tmp_path, **settings).to_dict()["without_verdict"] == 8
    (tmp_path / "silent").unlink()
    found = judged(tmp_path, **settings)
    assert found.kept == 0 and found.to_dict()["without_verdict"] == 0


def test_nothing_is_kept_of_a_judge_without_a_file_or_where_nobody_wants_it(tmp_path, file):
    judge = judge_of(JudgeConfig(by="function", function=f"{file}:of_two"))
    assert [contest(judge, PAIRS).kept for _ in range(2)] == [0, 0] and asked(tmp_path) == 16
    built_in = judge_of(JudgeConfig(by="function", function="math:fmod"))
    assert built_in is not None and built_in.identity is None


def test_a_line_that_was_cut_is_made_again_and_swallows_none(tmp_path):
    kept = Keyed(tmp_path / "kept.jsonl")
    kept.add({"a": {"said": 1}, "b": {"said": 2}})
    whole = (tmp_path / "kept.jsonl").read_bytes()
    (tmp_path / "kept.jsonl").write_bytes(whole[:-4])
    again = Keyed(tmp_path / "kept.jsonl")
    assert again.get("a") == {"said": 1} and again.get("b") is None
    again.add({"c": {"said": 3}})
    third = Keyed(tmp_path / "kept.jsonl")
    assert [third.get(key) for key in "abc"] == [{"said": 1}, None, {"said": 3}]
    assert json.loads((tmp_path / "kept.jsonl").read_bytes().splitlines()[-1]) == {"key": "c", "said": 3}

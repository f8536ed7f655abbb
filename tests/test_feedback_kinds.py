"""A vote is one of what it judges: scores of several kinds, and numbers beside their words, are no thumbs."""

import re
from pathlib import Path

import pytest
import yaml
from mining import config_of, mined, rows_of, write_log

from kto_dist.base.config import build
from kto_dist.base.errors import UserError
from kto_dist.feedback import MiningConfig, pipeline

SCORES = {"prompt": "q", "response": "a", "feedback": "/scores[]/value"}


def row(*scores, **more):
    return {"q": "why?", "a": "because", "scores": list(scores), **more}


def got(folder, rows, columns, **sections):
    with mined(folder, rows, columns, **sections) as connection:
        return rows_of(connection)


def mistake(folder, rows, columns, **sections):
    with pytest.raises(UserError) as found, mined(folder, rows, columns, **sections):
        pass
    return str(found.value)


TWO = row({"name": "safety", "value": 1}, {"name": "thumb", "value": 0})
ONE_BY_ONE = [row({"name": "safety", "value": 1}), row({"name": "thumb", "value": 0})]


@pytest.mark.parametrize("rows", [[TWO], ONE_BY_ONE])
def test_votes_of_several_kinds_are_refused_with_a_choice_that_is_right(tmp_path, rows):
    said = mistake(tmp_path, rows, SCORES)
    assert "by their name (safety, thumb)" in said and "columns.feedback: /scores[name=safety]/value" in said
    chosen = SCORES | {"feedback": "/scores[name=thumb]/value"}
    assert got(tmp_path, rows, chosen) == [("why?", "because", False)]
    assert got(tmp_path, rows, SCORES, **{"where__/scores[]/name": "thumb"}) == [("why?", "because", False)]


def test_names_of_voters_and_of_what_is_ignored_are_no_kinds(tmp_path):
    assert got(tmp_path, [TWO], SCORES | {"user": "/scores[]/name"}, agreement__conflicts="keep") == []
    both = row({"name": "Ann", "value": 1}, {"name": "Bob", "value": 1})
    assert got(tmp_path, [both], SCORES, input__ignore=["name"]) == [("why?", "because", True)]


def test_rows_that_are_votes_of_several_kinds_are_refused(tmp_path):
    columns = {"prompt": "q", "response": "a", "feedback": "score"}
    rows = [
        {"q": "why?", "a": "because", "score": up, "annotation_name": name} for name, up in (("safe", 1), ("ok", 0))
    ]
    assert "where: {annotation_name: ...}" in mistake(tmp_path, rows, columns)
    assert got(tmp_path, rows, columns, where__annotation_name="ok") == [("why?", "because", False)]


def test_the_number_of_a_category_is_not_taken_for_its_word(tmp_path):
    rows = [row({"name": "f", "value": 1, "stringValue": "bad"})]
    said = mistake(tmp_path, rows, SCORES)
    assert "stringValue beside it has the word (bad)" in said and "/scores[]/stringValue" in said
    words = SCORES | {"feedback": "/scores[]/stringValue"}
    assert got(tmp_path, rows, words) == [("why?", "because", False)]
    # of a boolean and of a number, the word is the value
    plain = [row({"name": "f", "value": 1, "stringValue": "True"})]
    assert got(tmp_path, plain, SCORES) == [("why?", "because", True)]


def test_mappings_of_public_datasets_in_the_documents_give_their_rows(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")

    def rows(name, *given):
        [line] = [line for line in page.splitlines() if line.startswith(f"| {name} | `columns")]
        tree = {}
        for said in re.findall("`([^`]+)`", line):
            tree |= yaml.safe_load(said)
        more = {f"labels__{key}": value for key, value in tree["labels"].items()}
        return got(tmp_path, list(given), tree["columns"], **more)

    rated = [{"prompt": f"q{n}", "response": "a", "helpfulness": n, "verbosity": 2} for n in range(5)]
    assert rows("HelpSteer2", *rated) == [("q0", "a", False), ("q1", "a", False), ("q3", "a", True), ("q4", "a", True)]
    duel = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    assert rows("PKU-SafeRLHF", duel) == [("q", "a", False), ("q", "b", True)]


def test_langfuses_preset_reads_categories_by_their_word(tmp_path):
    def trace(number, **score):
        turns = {"messages": [{"role": "user", "content": f"q{number}"}]}
        return {"input": turns, "output": "a", "timestamp": "2026-01-01", "userId": "u",
                "scores": [{"name": "user-feedback", **score}]}  # fmt: skip

    rows = [
        trace(1, value=None, stringValue="positive"),
        trace(2, value=1, stringValue="negative"),
        trace(3, value=0, stringValue="False"),
        trace(4, value=1),
    ]
    config = config_of(tmp_path, write_log(tmp_path / "log.jsonl", rows)).model_dump(mode="json", exclude_unset=True)
    tree = {**config, "input": {**config["input"], "preset": "langfuse"}, "columns": {}}
    with pipeline(build(tree, kind=MiningConfig)) as connection:
        assert rows_of(connection) == [("q1", "a", True), ("q2", "a", False), ("q3", "a", False), ("q4", "a", True)]

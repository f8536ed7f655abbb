"""Pairs and rankings become rows with labels."""

import json

import pytest
from log_formats import (
    ANSWER,
    LATER,
    NEXT,
    TALK,
    USER,
    in_every_format,
)
from mining import got, mined, mistake, noticed_in, removed, rows_of


def test_pairs_become_two_rows(tmp_path):
    rows = [
        {"q": "why?", "good": "so", "bad": "dunno"},
        {"q": "who?", "good": ANSWER, "bad": [ANSWER | {"content": "x"}]},
    ]
    with mined(tmp_path, rows, {"prompt": "q", "chosen": "good", "rejected": "bad"}) as connection:
        assert rows_of(connection) == [
            ("who?", "hello", True), ("who?", "x", False), ("why?", "dunno", False), ("why?", "so", True)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "ranked", "labels"),
    [
        (None, "ends", {"a": True, "d": False}),
        (None, "halves", {"a": True, "b": True, "c": False, "d": False}),
        ([4, 2, 3, 1], "ends", {"a": False, "d": True}),
        ([1, 2, 2, 3], "ends", {"a": True, "d": False}),
        ([1, 2, 2, 3], "halves", {"a": True, "d": False}),
        ([1, 1, 1, 1], "ends", {}),
    ],
)
def test_rankings_become_rows(tmp_path, ranks, ranked, labels):
    rows = [
        {"q": "why?", "list": ["a", "b", "c", "d"], "ranks": ranks or []},
        {"q": "x", "list": ["e", "f"], "ranks": [1, 2]},
    ]
    columns = {"prompt": "q", "responses": "list"} | ({"ranks": "ranks"} if ranks else {})
    with mined(tmp_path, rows, columns, labels__ranked=ranked) as connection:
        assert {a: label for q, a, label in rows_of(connection) if q == "why?"} == labels


def test_lists_that_are_no_json_are_bad_rows_and_not_bad_files(tmp_path):
    fine = {"q": "why?", "list": json.dumps(["a", "b"]), "ranks": "[1, 2]"}
    bad = [fine | {"list": "a, b"}, fine | {"ranks": "1, 2"}, fine | {"list": '"a"'}, fine | {"ranks": '{"a": 1}'}]
    columns = {"prompt": "q", "responses": "list", "ranks": "ranks"}
    message = mistake(tmp_path, [fine, *bad], columns)
    assert "log.jsonl:2: columns.responses must list texts" in message and "(4 rows" in message
    with mined(tmp_path, [fine, *bad], columns, input__on_bad_row="skip") as connection:
        assert rows_of(connection) == [("why?", "a", True), ("why?", "b", False)]
        assert connection.execute("SELECT reason, rows FROM bad_rows").fetchall() == [("ranks", 4)]


def test_an_answer_between_two_others_has_changed_nobodys_mind(tmp_path):
    pairs = [
        {"q": "?", "good": "a", "bad": "b", "u": "jane", "t": 1},
        {"q": "?", "good": "b", "bad": "c", "u": "jane", "t": 1},
    ]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "user": "u", "time": "t"}
    with mined(tmp_path, pairs, columns) as connection:
        assert removed(connection) == {"conflict": 2}
    rankings = [{"q": "?", "list": two, "u": "jane", "t": 1} for two in (["a", "b"], ["b", "c"])]
    with mined(tmp_path, rankings, {"prompt": "q", "responses": "list", "user": "u", "time": "t"}) as connection:
        assert removed(connection) == {"conflict": 2}


DUELS = [
    {"q": "1", "x": "good", "y": "bad", "w": "A"}, {"q": "2", "x": "bad", "y": "good", "w": "model_b"},
    {"q": "3", "x": "so", "y": "so-so", "w": "tie"}, {"q": "4", "x": "bad", "y": "worse", "w": "tie (bothbad)"},
    {"q": "5", "x": "good", "y": "fine", "w": "both good"}, {"q": "6", "x": "one", "y": "two", "w": None},
]  # fmt: skip


DUEL = {"prompt": "q", "answer_a": "x", "answer_b": "y", "winner": "w"}


def test_a_winner_labels_both_answers_and_a_tie_may_be_two_thumbs_down(tmp_path):
    expected = [("1", "bad", False), ("1", "good", True), ("2", "bad", False), ("2", "good", True), ("4", "bad", False),
                ("4", "worse", False), ("5", "fine", True), ("5", "good", True)]  # fmt: skip
    in_every_format(tmp_path, DUELS, DUEL, expected)
    message = mistake(tmp_path, [*DUELS, DUELS[0] | {"w": 1}], DUEL)
    assert "columns.winner (w) has words without a meaning: '1'" in message and "labels.a_wins" in message
    assert got(tmp_path, [DUELS[0] | {"w": 1}], DUEL, labels__a_wins=["1"]) == expected[:2]


def test_a_winner_may_be_named_by_its_model_and_answers_may_be_conversations(tmp_path):
    rows = [{"x": [USER, ANSWER, NEXT, LATER], "y": [USER, {"role": "assistant", "content": "yo"}, NEXT, ANSWER],
             "m": "small", "n": "large", "w": "large"}]  # fmt: skip
    columns = {"answer_a": "x", "answer_b": "y", "winner": "w", "model_a": "m", "model_b": "n"}
    other = (("user", "hi"), ("assistant", "yo"), ("user", "more"))
    assert got(tmp_path, rows, columns) == [(TALK, "later", False), (other, "hello", True)]


def test_a_pair_whose_winner_is_a_column_is_not_taken_for_granted(tmp_path):
    rows = [{"q": "?", "x": "good", "y": "bad", "winner": "a"}]
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert "columns.winner: winner in place of chosen and rejected" in mistake(tmp_path, rows, pair)
    assert len(got(tmp_path, rows, pair, input__ignore=["winner"])) == 2


def test_pairs_of_whole_conversations_bring_their_prompt(tmp_path):
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, LATER]}
    expected = [("hi", "hello", True), ("hi", "later", False)]
    assert got(tmp_path, [whole], {"chosen": "chosen", "rejected": "rejected"}) == expected
    both = {"chosen": "chosen", "rejected": "rejected", "prompt": "q"}
    assert got(tmp_path, [whole | {"q": "hi"}], both) == expected
    assert "the prompt of the row is not asked" in mistake(tmp_path, [whole | {"q": "else"}], both)
    assert "must be a whole conversation" in mistake(tmp_path, [{"x": "a", "y": "b"}], {"chosen": "x", "rejected": "y"})


def test_a_system_column_becomes_the_first_turn(tmp_path):
    rows = [{"s": "be brief", "q": "hi", "c": [USER], "a": "hello", "f": 1}]
    expected = [((("system", "be brief"), ("user", "hi")), "hello", True)]
    for asked in ({"prompt": "q"}, {"messages": "c"}):
        assert got(tmp_path, rows, {"system": "s", "response": "a", "feedback": "f", **asked}) == expected
    assert noticed_in(tmp_path, [{**rows[0], "system": "x"}], {"prompt": "q", "response": "a", "feedback": "f"}) == {
        "system": 1
    }

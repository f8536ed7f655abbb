"""Logs with a row a turn: conversations are whole or not at all, and trees are no lines."""

import json
import random

import pytest
from log_formats import FORMATS
from mining import got, mined, mistake, noticed_in, rows_of

LINE = {"session": "s", "role": "r", "text": "x", "turn": "n", "feedback": "f"}
TIMED = {"session": "s", "role": "r", "text": "x", "time": "t", "feedback": "f"}
TREE = {"session": "s", "role": "r", "text": "x", "id": "i", "parent": "p", "feedback": "f"}
BROKEN = "conversation with an unreadable turn"


def turn(s, n, r, x, f=None, **more):
    return {"s": s, "n": n, "r": r, "x": x, "f": f, **more}


def talk(s, votes=("up", "down", "up")):
    """Three questions and answers; an answer's text names its question."""
    rows = []
    for i, vote in enumerate(votes):
        rows += [turn(s, 2 * i, "user", f"q{i}"), turn(s, 2 * i + 1, "assistant", f"{s}{i}", vote)]
    return rows


def answers(rows):
    return [answer for _, answer, _ in rows]


def lost(connection):
    return dict(connection.execute("SELECT reason, sum(rows)::INTEGER FROM bad_rows GROUP BY 1").fetchall())


@pytest.mark.parametrize(
    ("bad", "reason", "kept"),
    [
        ({"r": "wizard"}, "role", ["a0", "b0", "b1", "b2"]),
        ({"n": "third"}, "turn", ["b0", "b1", "b2"]),
        ({"x": {"no": "text"}}, "text is no text", ["a0", "b0", "b1", "b2"]),
        ({"s": None}, "no session", ["a0", "b0", "b1", "b2"]),
    ],
)
def test_a_conversation_loses_its_rated_answers_from_an_unreadable_turn_on(tmp_path, bad, reason, kept):
    rows = [*talk("a"), *talk("b")]
    rows[2] |= bad  # a's second question
    for ending in ("jsonl", "csv", "db", "json"):
        more = {"input__rows": "/all/them"} if ending == "json" else {}
        if ending in ("csv", "db") and reason == "text is no text":
            continue  # any cell is text there
        path = FORMATS[ending](tmp_path / f"log.{ending}", rows)
        with mined(tmp_path, path, LINE, input__on_bad_row="skip", **more) as connection:
            assert sorted(answers(rows_of(connection))) == kept, ending
            assert lost(connection) == {reason: 1, BROKEN: 6 - len(kept)}
        assert f":{3 if ending in ('jsonl',) else 4 if ending == 'csv' else 'row 3'}: " in mistake(
            tmp_path, path, LINE, **more
        )


def test_a_turn_without_a_readable_time_takes_all_of_its_conversation(tmp_path):
    rows = [row | {"t": f"2026-01-01T00:00:{row['n']:02}Z"} for row in [*talk("a"), *talk("b")]]
    rows[4]["t"] = "0001-01-01T00:00:00Z"
    with mined(tmp_path, rows, TIMED, input__on_bad_row="skip") as connection:
        assert sorted(answers(rows_of(connection))) == ["b0", "b1", "b2"]
        assert lost(connection) == {"time": 1, BROKEN: 3}
    message = mistake(tmp_path, rows, TIMED)
    assert "columns.time must be" in message and "'0001-01-01T00:00:00Z'" in message and "log.jsonl:5: " in message


@pytest.mark.parametrize("columns", [LINE, LINE | {"text": ("x", "y")}])
def test_a_line_that_breaks_off_takes_the_conversation_that_it_names(tmp_path, columns):
    rows = [*talk("a"), *talk("b")]
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2][:40]
    with mined(tmp_path, lines, columns, input__on_bad_row="skip") as connection:
        assert sorted(answers(rows_of(connection))) == ["b0", "b1", "b2"]
        assert lost(connection) == {"broken JSON": 1, BROKEN: 3}


@pytest.mark.parametrize("columns", [LINE, LINE | {"text": ("x", "y")}])
def test_a_line_of_nobody_known_takes_what_no_longer_alternates(tmp_path, columns):
    rows = [*talk("a"), *talk("b"), *talk("c")]
    for place, kept in ((2, ["a0", "b0", "b1", "b2"]), (6, ["a0", "a1", "a2"]), (9, ["a0", "a1", "a2", "b0"])):
        lines = [json.dumps(row) for row in rows]
        lines[place] = "garbage"
        with mined(tmp_path, lines, columns, input__on_bad_row="skip") as connection:
            assert sorted(answers(rows_of(connection))) == sorted(
                [*kept, *(["b0", "b1", "b2"] if place > 9 else []), "c0", "c1", "c2"]
            )


def test_a_vote_on_a_question_leaves_and_the_question_stays(tmp_path):
    rows = talk("a")
    rows[2]["f"] = "up"
    with mined(tmp_path, rows, LINE, input__on_bad_row="skip") as connection:
        found = rows_of(connection)
        assert sorted(answers(found)) == ["a0", "a1", "a2"] and lost(connection) == {"rated turn": 1}
        assert max(len(prompt) for prompt, *_ in found if isinstance(prompt, tuple)) == 5
    assert "only a turn of the assistant can have feedback: 'up'" in mistake(tmp_path, rows, LINE)


def test_an_answer_in_pieces_is_one_answer_with_any_of_its_votes(tmp_path):
    rows = [turn("a", 0, "user", "q"), turn("a", 1, "assistant", "one", "up"), turn("a", 2, "assistant", "two"),
            turn("a", 2, "assistant", "two"), turn("a", 3, "user", "r"),
            turn("a", 4, "assistant", "s", "down")]  # fmt: skip
    assert "turns.answers_in_a_row" in mistake(tmp_path, rows, LINE)
    whole = (("user", "q"), ("assistant", "one two"), ("user", "r"))
    found = got(tmp_path, rows, LINE, turns__answers_in_a_row="joined", turns__joined_by=" ")
    assert found == [("q", "one two", True), (whole, "s", False)]
    last = (("user", "q"), ("assistant", "two"), ("user", "r"))
    found = got(tmp_path, rows, LINE, turns__answers_in_a_row="alternatives")
    assert found == [("q", "one", True), (last, "s", False)]
    # behind the last vote, and where an answer is only logged twice, nothing has to be said
    fine = [
        *talk("b"),
        turn("b", 5, "assistant", "b2"),
        turn("b", 9, "assistant", "x"),
        turn("b", 10, "assistant", "y"),
    ]
    assert answers(got(tmp_path, [*fine[:7]], LINE)) == answers(got(tmp_path, talk("b"), LINE))


def node(i, p, r, x, f=None, s="a"):
    return {"s": s, "i": i, "p": p, "r": r, "x": x, "f": f}


BRANCHES = [
    node("1", None, "user", "old"), node("2", "1", "assistant", "to the old one", "down"),
    node("3", None, "user", "hi"), node("4", "3", "assistant", "first", "down"), node("5", "3", "assistant", "hello"),
    node("6", "5", "user", "more"), node("7", "6", "assistant", "later", "up"),
    node("8", "7", "assistant", "and on", "up"),
]  # fmt: skip
ABOVE = (("user", "hi"), ("assistant", "hello"), ("user", "more"))
EXPECTED = [
    ("hi", "first", False),
    ("old", "to the old one", False),
    (ABOVE, "later", True),
    (ABOVE, "later\nand on", True),
]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_turns_above_a_rated_answer_are_its_prompt(tmp_path, ending):
    rows = [*BRANCHES]
    random.Random(0).shuffle(rows)
    path = FORMATS[ending](tmp_path / f"log.{ending}", rows)
    more = {"input__rows": "/all/them"} if ending == "json" else {}
    assert got(tmp_path, path, TREE, **more) == EXPECTED
    without = {name: column for name, column in TREE.items() if name != "session"}
    assert got(tmp_path, path, without, **more) == EXPECTED


@pytest.mark.parametrize("root", ["00000000-0000-0000-0000-000000000000", "", "own", "0"])
def test_what_says_that_there_is_no_parent_is_none(tmp_path, root):
    rows = [row | {"p": row["p"] or (row["i"] if root == "own" else root)} for row in BRANCHES]
    assert got(tmp_path, rows, TREE) == EXPECTED


def test_an_answer_below_a_turn_that_is_not_there_leaves(tmp_path):
    rows = [row for row in BRANCHES if row["i"] != "5"]
    with mined(tmp_path, rows, TREE) as connection:
        assert rows_of(connection) == EXPECTED[:2] and lost(connection) == {BROKEN: 2}
    rows = [row | ({"r": "wizard"} if row["i"] == "5" else {}) for row in BRANCHES]
    with mined(tmp_path, rows, TREE, input__on_bad_row="skip") as connection:
        assert rows_of(connection) == EXPECTED[:2] and lost(connection) == {"role": 1, BROKEN: 2}


def test_branches_are_not_read_as_a_line(tmp_path):
    rows = [row | {"n": i, "messageId": row["i"], "parentMessageId": row["p"] or "0"} for i, row in enumerate(BRANCHES)]
    message = mistake(tmp_path, rows, LINE)
    assert "map columns.parent and columns.id" in message and "input.ignore" in message
    line = [row | {"n": i} for i, row in enumerate(talk("a"))]
    line = [row | {"messageId": f"{i}", "parentMessageId": f"{i - 1}" if i else None} for i, row in enumerate(line)]
    assert answers(got(tmp_path, line, LINE)) == answers(got(tmp_path, talk("a"), LINE))
    assert noticed_in(tmp_path, line, LINE) == {"parentMessageId": 5}


def test_rows_of_turns_hold_blocks_and_call_tools(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows = [turn("a", 0, "user", [{"type": "text", "text": "hi"}]),
            turn("a", 1, "assistant", None, None, tool_calls=[call]),
            turn("a", 2, "tool", "found", None, tool_call_id="c"),
            turn("a", 3, "assistant", ["hel", {"type": "text", "text": "lo"}], "up")]  # fmt: skip
    with mined(tmp_path, rows, LINE) as connection:
        ((prompt, answer),) = connection.execute(
            "SELECT prompt, completion FROM examples JOIN texts USING (vote)"
        ).fetchall()
    user, calling, tool = json.loads(prompt)
    assert answer == "hello" and user["content"] == "hi" and calling["tool_calls"] == [call]
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "found", "c")
    rows[1]["f"] = "up"
    assert "calls tools" in mistake(tmp_path, rows, LINE)


def test_several_votes_of_a_turn_are_as_many(tmp_path):
    rows = [row | {"f": [{"v": "up", "u": f"u{n}"} for n in range(2)] if row["f"] else []} for row in talk("a")]
    columns = LINE | {"feedback": "/f[]/v", "user": "/f[]/u"}
    with mined(tmp_path, rows, columns) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT user_key) FROM votes").fetchone() == (6, 2)
        assert sorted(answers(rows_of(connection))) == ["a0", "a1", "a2"]


def test_where_chooses_votes_and_leaves_no_turn_out(tmp_path):
    rows = [row | ({"by": "judge" if row["n"] == 3 else "user"} if row["f"] else {}) for row in talk("a")]
    with mined(tmp_path, rows, LINE, where__by="user") as connection:
        found = rows_of(connection)
        assert sorted(answers(found)) == ["a0", "a2"] and max(len(p) for p, *_ in found if isinstance(p, tuple)) == 5
        noticed = connection.execute("SELECT name, rows FROM noticed").fetchall()
        assert noticed == [("votes that `where` leaves out", 1)]

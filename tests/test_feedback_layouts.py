"""Where values lie in a row and which of them belong together: pointers, votes in lists, conversations in any dress."""

import csv
import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mining import config_of, mined, removed, rows_of, write_log

from kto_dist.base.errors import UserError
from kto_dist.feedback import mine, pipeline
from kto_dist.feedback.documents import Broken, loads
from kto_dist.feedback.documents import rows as document_rows
from kto_dist.feedback.pointers import MISSING, first, parse

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
MORE, LATER = {"role": "user", "content": "more"}, {"role": "assistant", "content": "later"}
TALK = (("user", "hi"), ("assistant", "hello"), ("user", "more"))
CHAT = {"messages": "c", "feedback": "f"}


def got(folder, rows, columns, **sections):
    with mined(folder, rows, columns, **sections) as connection:
        return rows_of(connection)


def mistake(folder, rows, columns, **sections):
    with pytest.raises(UserError) as caught, mined(folder, rows, columns, **sections):
        pass
    return str(caught.value)


def noticed_in(folder, rows, columns, **sections):
    with mined(folder, rows, columns, **sections) as connection:
        return dict(connection.execute("SELECT name, sum(rows)::INTEGER FROM noticed GROUP BY 1").fetchall())


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows
        )
    return path


def as_sqlite(path, rows):
    names = list(rows[0])
    with sqlite3.connect(path) as database:
        database.execute("drop table if exists log")
        database.execute(f"create table log ({', '.join(names)})")
        cells = [[json.dumps(v) if isinstance(v, dict | list) else v for v in row.values()] for row in rows]
        database.executemany(f"insert into log values ({', '.join('?' * len(names))})", cells)
    database.close()
    return path


def as_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_text_in_parquet(path, rows):
    return as_parquet(
        path, [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in r.items()} for r in rows]
    )


def as_json(path, rows):
    path.write_text(json.dumps({"about": {"rows": [1]}, "all": {"them": rows}, "end": []}, indent=2))
    return path


FORMATS = {
    "jsonl": write_log,
    "csv": as_csv,
    "db": as_sqlite,
    "parquet": as_parquet,
    "text.parquet": as_text_in_parquet,
    "json": as_json,
}


def in_every_format(folder, rows, columns, expected, **sections):
    for ending, write in FORMATS.items():
        path = write(folder / f"log.{ending}", rows)
        more = {"input__rows": "/all/them"} if ending == "json" else {}
        assert got(folder, path, columns, **sections, **more) == sorted(expected, key=repr), ending


# Pointers


def test_a_pointer_reads_keys_places_choices_and_json_text():
    row = {
        "a/b": 1,
        "t": '{"n": [{"x": "1"}, {"x": "2", "y": {"z": 5}}]}',
        "s": [{"k": "u", "v": 3}, {"k": "w"}],
        "n": None,
    }
    cases = {
        "a/b": 1, "/a~1b": 1, "/t/n/0/x": "1", "/t/n/-1/y/z": 5, "/t/n[x=2]/y/z": 5, "/t/n[y/z=5]/x": "2",
        "/s[k=u]/v": 3, "/s[]/v": 3, "/s[*]/k": "u", "/s[k=w]/v": MISSING, "/t/n/7": MISSING, "/n": None,
        "/n/x": MISSING,
        "/s[k='u']/v": 3, "/t/n/99999999999": MISSING,
    }  # fmt: skip
    assert {text: first(row, parse(text)) for text in cases} == cases


@pytest.mark.parametrize("text", ["/s[k=u/v", "/s[=u]/v", "/s[k=u]x/v"])
def test_a_pointer_that_says_nothing_is_refused(tmp_path, text):
    assert "columns.feedback" in mistake(tmp_path, [{}], {"prompt": "q", "response": "a", "feedback": text})


def test_json_text_in_a_cell_is_read_as_what_it_holds(tmp_path):
    rows = [
        {"request": {"messages": [USER], "n": 1}, "reply": {"choices": [{"message": ANSWER}]}, "f": "up"},
        {"request": {"messages": [USER, ANSWER, MORE]}, "reply": {"choices": [{"message": LATER}]}, "f": "down"},
    ]
    columns = {"messages": "/request/messages", "response": "/reply/choices/0/message/content", "feedback": "f"}
    in_every_format(tmp_path, rows, columns, [("hi", "hello", True), (TALK, "later", False)])


def test_a_prompt_is_never_the_json_of_a_conversation(tmp_path):
    rows = [{"in": json.dumps({"messages": [USER], "model": str(i)}), "out": f"a{i}", "f": "up"} for i in range(4)]
    columns = {"prompt": "in", "response": "out", "feedback": "f"}
    assert "map columns.messages: /in/messages" in mistake(tmp_path, rows, columns)
    assert len(got(tmp_path, rows, {"messages": "/in/messages", "response": "out", "feedback": "f"})) == 4
    rows = [{"in": "q", "out": json.dumps({"choices": [{"message": ANSWER}], "id": i}), "f": "up"} for i in range(4)]
    assert "map columns.response: /out/choices/0/message/content" in mistake(tmp_path, rows, columns)
    # what users write themselves stays text, JSON or not
    rows = [{"in": f"{{'n': {i}}}", "out": json.dumps({"answer": i}), "f": "up"} for i in range(4)]
    assert len(got(tmp_path, rows, columns)) == 4


def test_of_several_names_the_first_with_a_value_counts(tmp_path):
    rows = [
        {"q": "", "question": "old", "a": "x", "f": 1},
        {"q": "new", "a": {"role": "assistant", "content": "y"}, "f": 1},
        {"q": None, "question": "third", "f": 1, "content": [{"type": "text", "text": "z"}]},
    ]
    columns = {"prompt": ("q", "question"), "response": ("a", "/content/0/text"), "feedback": "f"}
    assert got(tmp_path, rows, columns) == [("new", "y", True), ("old", "x", True), ("third", "z", True)]


# Votes in lists


SCORES = [
    {"q": "a", "a": "x", "s": [{"name": "user", "value": 1, "by": "u1"}, {"name": "judge", "value": 0, "by": "j"}]},
    {"q": "b", "a": "x", "s": [{"name": "judge", "value": 1, "by": "j"}, {"name": "user", "value": 0, "by": "u2"}]},
    {"q": "c", "a": "x", "s": [{"name": "judge", "value": 1, "by": "j"}]},
    {"q": "d", "a": "x", "s": [{"name": "user", "value": 1, "by": "u1"}, {"name": "user", "value": 1, "by": "u3"}]},
]
SCORED = {"prompt": "q", "response": "a", "feedback": "/s[name=user]/value", "user": "/s[]/by"}


def test_a_list_gives_a_vote_for_each_element_that_is_chosen_with_its_own_user(tmp_path):
    expected = [("a", "x", True), ("b", "x", False), ("d", "x", True)]
    in_every_format(tmp_path, SCORES, SCORED, expected)
    with mined(tmp_path, SCORES, SCORED, users__hash_ids=False) as connection:
        votes = connection.execute("SELECT user_key FROM votes WHERE label IS NOT NULL ORDER BY vote").fetchall()
        assert votes == [("u1",), ("u2",), ("u1",), ("u3",)] and removed(connection) == {"no_label": 1}


@pytest.mark.parametrize(
    "where", [{"/s[]/name": "user"}, {"name": "user"}, {"name": ["user", "nobody"], "by": ["u1", "u2", "u3"]}]
)
def test_where_chooses_votes(tmp_path, where):
    tree = {f"where__{name}": value for name, value in where.items()}
    found = got(tmp_path, SCORES, SCORED | {"feedback": "/s[]/value"}, **tree)
    assert found == [("a", "x", True), ("b", "x", False), ("d", "x", True)]


def test_where_chooses_rows_and_counts_the_others(tmp_path):
    rows = [{"q": str(i), "a": "x", "f": "up", "kind": kind} for i, kind in enumerate(["HUMAN", "LLM", None, 1, True])]
    columns = {"prompt": "q", "response": "a", "feedback": "f"}
    for wanted, kept in (("HUMAN", "0"), ([None, "LLM"], "12"), (1.0, "3"), (True, "4")):
        with mined(tmp_path, rows, columns, where__kind=wanted) as connection:
            assert "".join(q for q, *_ in rows_of(connection)) == kept
            left = dict(connection.execute("SELECT name, rows FROM noticed").fetchall())
            assert left == {"rows that `where` leaves out": len(rows) - len(kept)}
    assert "did you mean kind?" in mistake(tmp_path, rows, columns, where__kin="HUMAN")
    assert "leaves out all 5 rows" in mistake(tmp_path, rows, columns, where__kind="CODE")


def test_a_vote_is_not_taken_by_its_place_among_others(tmp_path):
    message = mistake(tmp_path, SCORES, SCORED | {"feedback": "/s/0/value"})
    assert "/s[name=judge]/value (there are judge, user), or /s[]/value" in message
    assert len(got(tmp_path, SCORES, SCORED | {"feedback": "/s/0/value"}, input__ignore=["s"])) == 4


def test_a_reaction_of_several_people_is_as_many_votes(tmp_path):
    rows = [{"q": "a", "a": "x", "r": [{"name": "+1", "users": ["u", "v"]}, {"name": "eyes", "users": ["w"]}]},
            {"q": "b", "a": "x", "r": [{"name": "-1", "users": []}]}]  # fmt: skip
    columns = {"prompt": "q", "response": "a", "feedback": "/r[]/name", "user": "/r[]/users[]"}
    with mined(tmp_path, rows, columns, labels__unknown="ignore") as connection:
        found = connection.execute("SELECT count(*), count(user_key) FROM votes WHERE label IS NOT NULL").fetchone()
        assert found == (3, 2) and rows_of(connection) == [("a", "x", True), ("b", "x", False)]


# Which answer was rated


def turns_with_ids():
    return [turn | {"id": f"turn-{i:04}"} for i, turn in enumerate([USER, ANSWER, MORE, LATER])]


def test_the_rated_turn_is_told_by_its_id_or_its_number(tmp_path):
    rows = [{"c": turns_with_ids(), "f": "up", "t": "turn-0001", "n": 1, "m": "2"},
            {"c": turns_with_ids(), "f": "down", "t": "turn-0003", "n": 3, "m": "4"}]  # fmt: skip
    expected = [("hi", "hello", True), (TALK, "later", False)]
    for more in ({"rated": "t"}, {"rated_index": "n"}):
        in_every_format(tmp_path, rows, CHAT | more, expected)
    assert got(tmp_path, rows, CHAT | {"rated_index": "m"}, turns__first=1) == sorted(expected, key=repr)
    message = mistake(tmp_path, rows, CHAT | {"rated_index": "m"})
    assert "must be the assistant's" in message and "turns.first is 1" in message
    assert "'turn-0009'" in mistake(tmp_path, [rows[0] | {"t": "turn-0009"}], CHAT | {"rated": "t"})


def test_a_row_that_names_another_turn_than_the_last_is_no_guess(tmp_path):
    rows = [{"c": turns_with_ids(), "f": "up", "meta": {"message_id": "turn-0001"}}]
    assert 'map columns.rated: "/meta/message_id"' in mistake(tmp_path, rows, CHAT)
    assert got(tmp_path, rows, CHAT, input__ignore=["meta"]) == [(TALK, "later", True)]
    assert got(tmp_path, [rows[0] | {"meta": {"message_id": "turn-0003"}}], CHAT) == [(TALK, "later", True)]


def test_turns_may_carry_their_own_votes(tmp_path):
    talk = [USER, ANSWER | {"score": 1}, MORE, LATER | {"score": -1}]
    rows = [{"c": talk, "u": "jane"}, {"c": [USER, ANSWER], "u": "joe"}]
    columns = {"messages": "c", "feedback": "/c[]/score", "user": "u"}
    in_every_format(tmp_path, rows, columns, [("hi", "hello", True), (TALK, "later", False)])


TREE = {
    "root": {"id": "root", "message": None, "parent": None},
    "q1": {"id": "q1", "parent": "root", "message": {"author": {"role": "user"}, "content": {"parts": ["hi"]}}},
    "a1": {"id": "a1", "parent": "q1", "message": {"author": {"role": "assistant"}, "content": {"parts": ["first"]}}},
    "a2": {"id": "a2", "parent": "q1", "message": {"author": {"role": "assistant"}, "content": {"parts": ["hello"]}}},
    "q2": {"id": "q2", "parent": "a2", "message": {"author": {"role": "user"}, "content": {"parts": ["more"]}}},
    "a3": {"id": "a3", "parent": "q2", "message": {"author": {"role": "assistant"}, "content": {"parts": ["later"]}}},
}


@pytest.mark.parametrize("write", [dict, lambda tree: list(tree.values()), lambda tree: dict(reversed(tree.items()))])
def test_in_a_tree_of_turns_those_above_the_rated_answer_are_its_prompt(tmp_path, write):
    rows = [{"c": write(TREE), "f": "up", "r": "a3"}, {"c": write(TREE), "f": "down", "r": "a1"}]
    assert got(tmp_path, rows, CHAT | {"rated": "r"}) == [("hi", "first", False), (TALK, "later", True)]
    lost = {name: node for name, node in TREE.items() if name != "q1"}
    message = mistake(tmp_path, [{"c": write(lost), "f": "up", "r": "a3"}], CHAT | {"rated": "r"})
    assert "a turn above the rated answer is not there; its id is: 'q1'" in message
    circle = TREE | {"q1": TREE["q1"] | {"parent": "a2"}}
    assert "back to one of them" in mistake(
        tmp_path, [{"c": write(circle), "f": "up", "r": "a3"}], CHAT | {"rated": "r"}
    )


# Turns in every dress


@pytest.mark.parametrize(
    "turns",
    [
        [{"type": "human", "content": "hi"}, {"type": "ai", "content": "hello"}],
        [{"sender": "User", "text": "hi"}, {"sender": "Bot", "text": "hello"}],
        [{"message.role": "user", "message.content": "hi"}, {"message.role": "assistant", "message.content": "hello"}],
        [{"message": USER}, {"message": ANSWER}],
        [{"type": "human", "data": {"content": "hi"}}, {"type": "ai", "data": {"content": "hello"}}],
        [["hi", "hello"]],
        [{"lc": 1, "type": "constructor", "id": ["langchain", "HumanMessage"], "kwargs": {"content": "hi"}},
         {"lc": 1, "type": "constructor", "id": ["langchain", "AIMessageChunk"], "kwargs": {"content": "hello"}}],
        [{"role": "user", "parts": [{"text": "hi"}]}, {"role": "model", "parts": [{"text": "hello"}]}],
        [{"role": "USER", "message": "hi"}, {"role": "CHATBOT", "message": "hello"}],
        [{"role": "USER", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, ANSWER],
        [{"role": "user", "content": [{"type": "input_text", "text": "hi"}, {"type": "input_image"}]}, ANSWER],
        [USER, {"role": "assistant", "content": [{"type": "thinking"}, {"type": "text", "text": "hello"}]}],
        [USER, {"role": "assistant", "content": "", "text": "hello"}],
        {"messages": [USER, ANSWER], "model": "m"},
        json.dumps([USER, ANSWER]),
    ],
)  # fmt: skip
def test_turns_are_read_in_every_dress(tmp_path, turns):
    assert got(tmp_path, [{"c": turns, "f": 1}], CHAT) == [("hi", "hello", True)]


def test_a_log_names_its_own_roles_and_keys(tmp_path):
    rows = [{"c": [{"who": "Customer", "said": {"body": "hi"}}, {"who": "note", "said": {"body": "!"}},
                   {"who": True, "said": {"body": "hello"}}], "f": 1}]  # fmt: skip
    keys = {"turns__role": "who", "turns__content": "/said/body"}
    message = mistake(tmp_path, rows, CHAT, **keys)
    assert "'Customer'; say in the roles section what it is, as in roles: {\"Customer\": user}" in message
    said = {"roles__customer": "user", "roles__note": "ignore", "roles__True": "assistant"}
    assert got(tmp_path, rows, CHAT, **keys, **said) == [("hi", "hello", True)]
    with pytest.raises(UserError, match="roles.customer .*'system', 'developer'"):
        config_of(tmp_path, "x", CHAT, roles__customer="client")


def test_what_a_turn_holds_and_a_prompt_cannot_is_counted(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "x"}}
    rows = [
        {"c": [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}, ANSWER], "f": 1, "tools": [{}]},
        {"c": [USER, ANSWER | {"reasoning_content": "hm", "images": []}], "f": 1, "question": "x", "tools": []},
        {"c": [{"role": "user", "content": [image, image, "q"]}, ANSWER], "f": 1, "question": None},
    ]
    with mined(tmp_path, rows, CHAT) as connection:
        noticed = dict(connection.execute("SELECT name, rows FROM noticed").fetchall())
    assert noticed == {"image_url blocks": 2, "reasoning_content of a turn": 1, "question": 1, "tools": 1}
    with mined(tmp_path, rows, CHAT, input__ignore=["tools", "image_url"]) as connection:
        assert {*connection.execute("SELECT name FROM noticed").fetchall()} == {
            ("question",),
            ("reasoning_content of a turn",),
        }


def test_flat_rows_count_what_they_hold_besides_in_every_format(tmp_path):
    rows = [
        {"q": str(i), "a": "b", "f": "up", "question": "x" if i % 3 else "", "tools": '"tools": 1'} for i in range(7)
    ]
    columns = {"prompt": "q", "response": "a", "feedback": "f"}
    for ending in ("jsonl", "csv", "db", "json"):
        more = {"input__rows": "/all/them"} if ending == "json" else {}
        with mined(tmp_path, FORMATS[ending](tmp_path / f"log.{ending}", rows), columns, **more) as connection:
            assert dict(connection.execute("SELECT name, rows FROM noticed").fetchall()) == {
                "question": 4,
                "tools": 7,
            }, ending
    nulls = as_parquet(tmp_path / "nulls.parquet", [row | {"question": row["question"] or None} for row in rows])
    with mined(tmp_path, nulls, columns) as connection:
        assert dict(connection.execute("SELECT name, rows FROM noticed").fetchall()) == {"question": 4, "tools": 7}


def test_calls_of_tools_are_read_as_every_api_writes_them(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    dresses = [
        [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
         {"role": "tool", "content": "r", "tool_call_id": "c"}],
        [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}]},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": ["r"]}]}],
        [{"type": "human", "content": "hi"},
         {"type": "ai", "content": "", "tool_calls": [{"id": "c", "name": "f", "args": {"x": 1}}]},
         {"type": "tool", "content": "r", "tool_call_id": "c"}],
    ]  # fmt: skip
    prompts = []
    for turns in dresses:
        with mined(tmp_path, [{"c": [*turns, ANSWER], "f": 1}], CHAT) as connection:
            ((prompt,),) = connection.execute("SELECT prompt FROM examples JOIN texts USING (vote)").fetchall()
            prompts.append(json.loads(prompt))
    assert prompts[0][1]["tool_calls"] == [call] and prompts[0] == prompts[1] == prompts[2]
    assert "calls tools" in mistake(tmp_path, [{"c": dresses[0][:2], "f": 1}], CHAT)


@pytest.mark.parametrize("mode", ["joined", "alternatives"])
def test_answers_in_a_row_are_one_or_the_last_as_is_said(tmp_path, mode):
    turns = [USER, {"role": "assistant", "content": "well,"}, ANSWER, MORE, LATER]
    rows = [{"c": turns, "f": 1, "n": 4}, {"c": turns, "f": 0, "n": 1}]
    assert "turns.answers_in_a_row" in mistake(tmp_path, rows, CHAT | {"rated_index": "n"})
    said = "well,\nhello" if mode == "joined" else "hello"
    lead = (("user", "hi"), ("assistant", said), ("user", "more"))
    found = got(tmp_path, rows, CHAT | {"rated_index": "n"}, turns__answers_in_a_row=mode)
    assert found == [("hi", said if mode == "joined" else "well,", False), (lead, "later", True)]


# Pairs


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
    rows = [{"x": [USER, ANSWER, MORE, LATER], "y": [USER, {"role": "assistant", "content": "yo"}, MORE, ANSWER],
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


# Files


def test_a_json_document_is_read_whole_or_by_a_pointer_to_its_rows(tmp_path):
    rows = [{"q": str(i), "a": "b", "f": "up"} for i in range(5)]
    columns, path = {"prompt": "q", "response": "a", "feedback": "f"}, tmp_path / "log.json"
    expected = [(str(i), "b", True) for i in range(5)]
    for text in (json.dumps(rows), json.dumps(rows, indent=4), "\n".join(json.dumps(row, indent=1) for row in rows),
                 "\n".join(map(json.dumps, rows)), "\ufeff" + json.dumps(rows)):  # fmt: skip
        path.write_text(text)
        assert got(tmp_path, path, columns) == expected
    path.write_text(json.dumps({"meta": {"n": 5}, "data": {"rows": rows, "other": []}}))
    assert "give input.rows, where its rows are: /data/rows (5 rows)" in mistake(tmp_path, path, columns)
    assert got(tmp_path, path, columns, input__rows="/data/rows") == expected
    assert "/data/row is not there" in mistake(tmp_path, path, columns, input__rows="/data/row")
    path.write_text(json.dumps(rows)[:-20])
    assert f"{path}: line 1: " in mistake(tmp_path, path, columns)
    path.write_text(json.dumps(rows[0]))
    assert got(tmp_path, path, columns) == expected[:1]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
def test_a_document_in_pieces_is_that_document(size):
    values = [{"a": i, "s": 'x\\"é\n' * i, "n": [1.5, -2, None, True, {"d": []}]} for i in range(20)]
    for text, path in (
        (json.dumps(values, indent=1), ()),
        (json.dumps({"x": [1, {"y": 2}], "d": {"z": "q", "r": values}, "w": 1}), ("d", "r")),
        ("\n".join(json.dumps(value, indent=2) for value in values), ()),
    ):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(document_rows(pieces, path)) == values


@pytest.mark.parametrize(
    "text", ['[{"a": 1}, {"b" 2}]', "[1, 2", '[{"a": NaN}]', '["\\ud800"]', "[" * 100_000, "[%s]" % ("1" * 5000)]
)
def test_a_hostile_document_is_broken_and_no_traceback(text):
    with pytest.raises(Broken, match="^line 1: "):
        list(document_rows([text]))
    with pytest.raises(ValueError):
        loads(text)


@pytest.mark.parametrize("prompt", ["q", ("q", "other")])
def test_a_hostile_line_is_a_bad_row(tmp_path, prompt):
    rest = ', "a": "x", "f": 1}'
    lines = ['{"q": "x", "n": 1' + "0" * 5000 + rest, "[" * 100_000, '{"q": "\\ud800"' + rest, '{"q": "fine"' + rest]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    columns = {"prompt": prompt, "response": "a", "feedback": "f"}
    with mined(tmp_path, path, columns, input__on_bad_row="skip") as connection:
        assert ("fine", "x", True) in rows_of(connection)
        reasons = dict(connection.execute("SELECT reason, rows FROM bad_rows").fetchall())
    # a number of 5,000 digits in a column that nobody asks for is no harm to a reader that does not read it
    assert reasons == {"broken JSON": 2 if prompt == "q" else 3}
    assert "nested too deep" in mistake(tmp_path, [lines[1]] * 2 + [lines[3]], columns)


def test_one_select_reads_a_log_in_several_tables(tmp_path):
    path = tmp_path / "app.db"
    with sqlite3.connect(path) as database:
        database.execute("create table messages (id, asked, said)")
        database.execute("create table votes (message, value, who)")
        database.executemany(
            "insert into messages values (?, ?, ?)", [(1, "q1", "a1"), (2, "q2", "a2"), (3, "q3", "a3")]
        )
        database.executemany("insert into votes values (?, ?, ?)", [(1, 1, "u"), (2, 0, "v")])
    database.close()
    columns = {"prompt": "asked", "response": "said", "feedback": "value", "user": "who"}
    query = "select asked, said, value, who from messages join votes on messages.id = votes.message"
    before = path.read_bytes()
    assert got(tmp_path, path, columns, input__query=query) == [("q1", "a1", True), ("q2", "a2", False)]
    for bad in ("delete from votes", "select 1; drop table votes", "attach 'x.db' as x", "select nonsense from votes",
                "pragma journal_mode = wal"):  # fmt: skip
        assert "input.query" in mistake(tmp_path, path, columns, input__query=bad)
    assert path.read_bytes() == before and not (tmp_path / "x.db").exists()
    with pytest.raises(UserError, match="table .* and query are both given"):
        config_of(tmp_path, path, columns, input__query=query, input__table="votes")


def test_names_of_class_labels_are_read(tmp_path):
    info = {"info": {"features": {"f": {"names": ["thumbs_up", "thumbs_down"], "_type": "ClassLabel"}}}}
    table = pa.table({"q": ["a", "b", "c"], "a": ["x"] * 3, "f": pa.array([0, 1, -1])})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "log.parquet")
    for columns in (
        {"prompt": "q", "response": "a", "feedback": "f"},
        {"prompt": "/q", "response": "/a", "feedback": "/f"},
    ):
        assert got(tmp_path, tmp_path / "log.parquet", columns) == [("a", "x", True), ("b", "x", False)]
    other = table.set_column(2, "f", pa.array([0, 1, 7])).replace_schema_metadata(table.schema.metadata)
    pq.write_table(other, tmp_path / "log.parquet")
    assert "numbers beyond 1, 0 and -1 (7)" in mistake(
        tmp_path, tmp_path / "log.parquet", {"prompt": "q", "response": "a", "feedback": "f"}
    )


def test_a_mapping_with_everything_is_the_same_log_in_one_file_or_in_days(tmp_path):
    rows = [{**row, "w": i % 2} for i, row in enumerate(SCORES * 3)]
    whole = got(tmp_path, rows, SCORED, where__w=1)
    state = {"input__state": str(tmp_path / "state"), "users__salt": "s", "where__w": 1}
    for start in range(0, 12, 4):
        day = write_log(tmp_path / f"{start}.jsonl", rows[start : start + 4])
        with pipeline(config_of(tmp_path, day, SCORED, **state)) as connection:
            found = rows_of(connection)
    assert found == whole
    with pytest.raises(UserError, match="under another where"):
        got(tmp_path, day, SCORED, **{**state, "where__w": 0})


# Messages


def test_an_error_quotes_the_value_at_fault_and_its_row_in_every_format(tmp_path):
    rows = [{"q": f"private question {i}", "a": "x", "f": "up", "t": f"2026-01-0{i + 1}"} for i in range(4)]
    rows[2]["t"] = "soon"
    columns = {"prompt": "q", "response": "a", "feedback": "f", "time": "t"}
    for ending, write in FORMATS.items():
        path = write(tmp_path / f"log.{ending}", rows)
        more = {"input__rows": "/all/them"} if ending == "json" else {}
        for mapped in (columns, columns | {"prompt": ("q", "question")}):
            message = mistake(tmp_path, path, mapped, **more)
            place = {"jsonl": ":3: ", "csv": ":4: "}.get(ending, ":row 3: ")
            assert f"{path}{place}" in message and ": 'soon'; " in message and "private" not in message, message


def test_a_missing_value_is_told_with_what_the_row_has(tmp_path):
    rows = [{"in": {"question": "q"}, "a": "x", "f": "up"}, {"in": {"ask": "q"}, "a": "x", "f": "up"}]
    message = mistake(tmp_path, rows, {"prompt": "/in/questoin", "response": "a", "feedback": "f"})
    assert "log.jsonl:1: the row has no /in/questoin (columns.prompt); did you mean /in/question?" in message
    python = [{"c": str([USER, ANSWER]), "f": "up"}]
    assert "Python's notation and no JSON" in mistake(tmp_path, python, CHAT)
    broken = ['{"q": "a", "a": "b", "f": "up"}', '{"q": "jane@example.org", "a": "b", "f" "up"}']
    message = mistake(tmp_path, broken, {"prompt": "q", "response": "a", "feedback": "f"})
    assert "log.jsonl:2: the line is not a JSON object (Expecting ':' delimiter, character " in message
    assert "[e-mail]" in message and "jane" not in message


def test_the_audit_names_what_was_seen_and_not_used_and_what_an_export_cut(tmp_path):
    text = "the cat sat on the mat and the dog lay in the sun all of the long day " * 12
    rows = [
        {"q": f"q{i}", "a": f"{i} {text}"[: 497 + (i % 3) * 40 + i] + "...", "f": i % 2, "tools": [1]}
        for i in range(60)
    ]
    for row in rows[:12]:
        row["a"] = row["a"][:500] + "..."
    columns = {"prompt": "q", "response": "a", "feedback": "f"}
    found = mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", rows), columns))
    assert found["log"]["unused"] == {"tools": 60}
    pile = found["lengths"]["pile"]
    assert (pile["characters"], pile["answers"], pile["ending"]) == (503, 12, "...")
    check = next(check for check in found["checks"] if check["name"] == "one_length")
    assert check["status"] == "warn" and "12 answers (20.0%) have exactly 503 characters" in check["message"]
    pattern = check["remedy"].partition("clean.truncated: ")[2]
    found = mine(config_of(tmp_path, tmp_path / "log.jsonl", columns, clean__truncated=yaml.safe_load(pattern)))
    assert found["lengths"]["pile"] is None and sum(file["rows"] for file in found["files"]) == 48
    # one greeting over and over is no cut
    same = [{"q": f"q{i}", "a": text[:600] if i < 12 else f"{i} {text}"[: 300 + 7 * i], "f": i % 2} for i in range(60)]
    found = mine(config_of(tmp_path, write_log(tmp_path / "same.jsonl", same), columns))
    assert found["lengths"]["pile"] is None


def test_the_audit_says_when_the_cleaning_takes_more_than_half(tmp_path):
    rows = [{"q": f"q{i % 9}", "a": "x", "f": "up", "u": f"u{i % 9}"} for i in range(36)]
    columns = {"prompt": "q", "response": "a", "feedback": "f", "user": "u"}
    found = mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", rows), columns))
    check = next(check for check in found["checks"] if check["name"] == "cleaned")
    assert (
        check["status"] == "warn"
        and "takes 75% of 36 labelled votes, most of them by exact duplicate 27" in check["message"]
    )
    found = mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", rows[:9]), columns))
    assert next(check for check in found["checks"] if check["name"] == "cleaned")["status"] == "pass"

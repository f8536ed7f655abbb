"""Whatever format, encoding and layout a log has, it says the same; and what cannot be read is named or counted."""

import csv
import gzip
import json
import random
import sqlite3
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mining import COLUMNS, MORE, config_of, mined, removed, rows_of, vote, write_log

from kto_dist.base.errors import UserError
from kto_dist.feedback import pipeline

ROWS = [
    vote(f"question {i % 5}?", f"answer {i}: naïve 漢字 😀, \"so\"\nand 'so'", "up" if i % 3 else "down",
         u=f"user {i % 4}", t=f"2026-01-{1 + i:02d}T10:00:00+02:00", m="v1")
    for i in range(20)
]  # fmt: skip


def mistake(folder, rows, columns=None, **sections):
    with pytest.raises(UserError) as caught, mined(folder, rows, columns, **sections):
        pass
    return str(caught.value)


def as_csv(path, rows=ROWS, encoding="utf-8", **options):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_sqlite(path, rows=ROWS, table="log"):
    names, table = list(rows[0]), table.replace('"', '""')
    with sqlite3.connect(path) as database:
        database.execute(f'create table "{table}" ({", ".join(names)})')
        database.executemany(
            f'insert into "{table}" values ({", ".join("?" * len(names))})', [tuple(row.values()) for row in rows]
        )
    database.close()
    return path


def as_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def gzipped(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def everything(connection):
    votes = "SELECT prompt, completion, label, user_key, time, model FROM votes JOIN texts USING (vote) ORDER BY ALL"
    return connection.execute(votes).fetchall()


def test_every_format_says_the_same(tmp_path):
    with mined(tmp_path, ROWS, MORE, users__salt="s") as connection:
        expected = everything(connection)
    assert len(expected) == len(ROWS)
    for path in (
        as_csv(tmp_path / "a.csv"),
        as_csv(tmp_path / "a.tsv", delimiter="\t"),
        gzipped(as_csv(tmp_path / "b.csv")),
        as_sqlite(tmp_path / "a.db"),
        as_parquet(tmp_path / "a.parquet"),
        gzipped(write_log(tmp_path / "a.jsonl", ROWS)),
    ):
        with mined(tmp_path, path, MORE, users__salt="s") as connection:
            assert everything(connection) == expected, path


@pytest.mark.parametrize(
    ("encodings", "setting"),
    [
        (["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"], "auto"),
        (["utf-16-be"], "utf-16-be"),
        (["utf-8-sig"], "utf-8"),
        (["gb18030"], "gb18030"),
    ],
)
def test_every_encoding_says_the_same(tmp_path, encodings, setting):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    paths = [as_csv(tmp_path / f"{encoding}.csv", encoding=encoding) for encoding in encodings]
    for encoding in encodings:
        paths.append(tmp_path / f"{encoding}.jsonl")
        paths[-1].write_bytes(text.encode(encoding))
    with pipeline(config_of(tmp_path, paths, input__encoding=setting)) as connection:
        assert rows_of(connection) == sorted(((row["q"], row["a"], row["f"] == "up") for row in ROWS), key=repr)
        assert connection.execute("SELECT DISTINCT rows FROM sources").fetchall() == [(len(ROWS),)]


def test_files_globs_and_folders_are_read_once_each(tmp_path):
    logs = tmp_path / "logs"
    (logs / "deep").mkdir(parents=True)
    write_log(logs / "1.jsonl", ROWS[:7])
    as_csv(logs / "deep" / "2.csv", ROWS[7:12])
    as_sqlite(logs / "[3].db", ROWS[12:])
    (logs / "notes.md").write_text("no log")
    with mined(tmp_path, ROWS) as connection:
        expected = rows_of(connection)
    for files in (logs, [logs, logs / "1.jsonl"], [f"{logs}/*.jsonl", f"{logs}/**/*.csv", logs / "[3].db"]):
        with pipeline(config_of(tmp_path, files if isinstance(files, list) else str(files))) as connection:
            assert rows_of(connection) == expected
            assert connection.execute("SELECT count(*) FROM sources").fetchone() == (3,)


def test_folders_of_a_partitioned_log_are_no_columns(tmp_path):
    folder = tmp_path / "m=theirs" / "f=down" / "part=1"
    folder.mkdir(parents=True)
    for path in (as_parquet(folder / "a.parquet"), write_log(folder / "a.jsonl", ROWS)):
        with mined(tmp_path, path, MORE) as connection:
            models = connection.execute("SELECT DISTINCT model FROM votes").fetchall()
            assert models == [("v1",)] and {label for *_, label in rows_of(connection)} == {True, False}


def test_a_delimiter_and_a_format_can_be_said(tmp_path):
    with mined(tmp_path, ROWS, MORE, users__salt="s") as connection:
        expected = everything(connection)
    path = as_csv(tmp_path / "log.txt", delimiter=";")
    with mined(tmp_path, path, MORE, users__salt="s", input__format="csv", input__delimiter=";") as connection:
        assert everything(connection) == expected
    assert "no column q" in mistake(tmp_path, path, input__format="csv")
    path = gzipped(write_log(tmp_path / "log", ROWS))
    with mined(tmp_path, path, MORE, users__salt="s", input__format="jsonl") as connection:
        assert everything(connection) == expected


def test_names_with_signs_of_globs_and_sql_are_names(tmp_path):
    for name in ("a*[b]?.parquet", "it's.parquet"):
        path = as_parquet(tmp_path / name)
        as_parquet(tmp_path / "axbx.parquet", [vote("other", "other", "up")])
        with pipeline(config_of(tmp_path, path)) as connection:
            assert len(everything(connection)) == len(ROWS)


# Bad rows


BAD = {
    b'{"q": "broken"': ("JSON", "one object a line"),
    b"[1, 2]": ("JSON", "one object a line"),
    b'{"q": "lat\xedn", "a": "b", "f": "up"}': ("encoding", "input.encoding"),
    b'{"q": "half \\ud800", "a": "b", "f": "up"}': ("JSON", "repair"),
    b'{"q": ["list"], "a": "b", "f": "up"}': ("q (columns.prompt) must be text", "columns.messages"),
    b'{"q": "x", "f": "up"}': ("no a (columns.response)", "it has q, a, f"),
    b'{"q": "x", "a": {"b": 1}, "f": "up"}': ("a (columns.response) must be text", "pointer"),
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_with_its_place_rule_and_remedy(tmp_path, line):
    message = mistake(tmp_path, [vote("1"), "", line, vote("2")])
    assert f"{tmp_path / 'log.jsonl'}:3: " in message and "on_bad_row: skip" in message
    assert all(part in message for part in BAD[line]), message


def test_a_line_of_blanks_is_none_however_long(tmp_path):
    with mined(tmp_path, [vote("1"), " " * 40, "\t" * 9 + "\r", vote("2")]) as connection:
        assert len(rows_of(connection)) == 2


def test_bad_lines_are_counted_by_reason_and_nothing_else_is_lost(tmp_path):
    rows = [vote(f"q{i}", "a") for i in range(300)]
    lines = [*rows]
    generator = random.Random(0)
    for line in [*BAD] * 3:
        lines.insert(generator.randrange(len(lines)), line)
    with mined(tmp_path, lines, input__on_bad_row="skip") as connection:
        assert rows_of(connection) == sorted(((row["q"], "a", True) for row in rows), key=repr)
        counts = dict(connection.execute("SELECT reason, rows FROM bad_rows").fetchall())
    assert sum(counts.values()) == 3 * len(BAD) and counts["encoding"] == 3 and counts["broken JSON"] == 9


def test_bad_rows_of_a_csv_are_counted_by_reason_and_nothing_else_is_lost(tmp_path):
    rows = [f'q{i},"a, {i}\nand more",up' for i in range(300)]
    bad = {'x,"y"z,up': "no CSV", "x,y": "2 fields in place of 3", '"x,y,up': "no CSV", 'x,"y,up': "no CSV"}
    lines = [*rows]
    generator = random.Random(0)
    for line in [*bad] * 3:
        lines.insert(generator.randrange(len(lines)), line)
    lines.append('"never closed, up')
    path = tmp_path / "log.csv"
    path.write_text("q,a,f\n" + "\n".join(lines) + "\nlast,one,up\n")
    with mined(tmp_path, path, input__on_bad_row="skip") as connection:
        expected = [*((f"q{i}", f"a, {i}\nand more", True) for i in range(300)), ("last", "one", True)]
        assert rows_of(connection) == sorted(expected, key=repr)
        counts = dict(connection.execute("SELECT reason, rows FROM bad_rows").fetchall())
    assert counts == {"no CSV": 10, "2 fields in place of 3": 3}


def test_a_csv_row_over_the_limit_is_bad_and_its_neighbours_are_not(tmp_path):
    long = "x" * (3 << 20)
    path = tmp_path / "log.csv"
    path.write_text(f'q,a,f\n1,a,up\n"long","{long}",up\n2,a,up\nlong,"b\n{long}\n",up\n3,a,up\n{long}\n')
    with mined(tmp_path, path, input__max_row_mebibytes=1, input__on_bad_row="skip") as connection:
        assert [row[0] for row in rows_of(connection)] == ["1", "2", "3"]
        assert connection.execute("SELECT reason, rows FROM bad_rows").fetchall() == [("too long", 3)]
    message = mistake(tmp_path, path, input__max_row_mebibytes=1)
    assert f"{path}:3: the row is longer than input.max_row_mebibytes" in message and "(3 rows" in message


def test_a_day_without_votes_stops_no_other(tmp_path):
    full = as_csv(tmp_path / "full.csv")
    for name, content in (("empty.csv", b""), ("blank.csv", b"\n\n"), ("empty.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
        with pipeline(config_of(tmp_path, [tmp_path / name, full])) as connection:
            assert len(rows_of(connection)) == len(ROWS)


def test_a_row_over_the_limit_is_bad_and_its_neighbours_are_not(tmp_path):
    long = vote("long", "x" * (3 << 20))
    with mined(tmp_path, [vote("1"), long, vote("2"), long], input__max_row_mebibytes=1, input__on_bad_row="skip") as c:
        assert [row[0] for row in rows_of(c)] == ["1", "2"]
        assert c.execute("SELECT reason, rows FROM bad_rows").fetchall() == [("too long", 2)]
    with mined(tmp_path, [vote("1"), long, vote("2")]) as c:
        assert len(rows_of(c)) == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("q,a,f\nx,y,up\nx,y\n", [":3: ", "2 fields in place of 3"]),
        ('q,a,f\nx,y,up\n"x,y,up\nx,y,up\n', [":3: ", "never closed", "(1 rows", "x,y,up"]),
        ("q,a\nx,y\n", ["no column f (columns.feedback)", "it has q, a"]),
        ("q,a,f,f\nx,y,up,up\n", ["columns.feedback (f) stands 2 times"]),
    ],
)
def test_a_broken_csv_is_told_by_line(tmp_path, text, parts):
    path = tmp_path / "log.csv"
    path.write_text(text)
    message = mistake(tmp_path, path)
    assert all(part in message for part in [str(path), *parts]), message


def test_latin_1_in_a_csv_is_told_by_line_and_read_when_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes("q,a,f\nx,y,up\nhola,así,up\n".encode("latin-1"))
    assert f"{path}:3: " in (message := mistake(tmp_path, path)) and "input.encoding" in message
    with mined(tmp_path, path, input__encoding="latin-1") as connection:
        assert ("hola", "así", True) in rows_of(connection)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("log.parquet", b"PAR1 no parquet", "damaged"),
        ("log.jsonl.gz", b"\x1f\x8b\x08\x00 no gzip", "damaged"),
        ("log.db", b"no database" * 100, "SQLite"),
        ("log.jsonl", b'[{"q": "x"}]', "input.format: json"),
        ("log.xlsx", b"", "input.format"),
        ("log.jsonl", b"", "not one row"),
        ("log.jsonl", b"\n\n", "not one row"),
        ("log.csv", b"", "not one row"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    message = mistake(tmp_path, tmp_path / name)
    assert str(tmp_path / name) in message or part == "not one row", message
    assert part in message, message


def test_sqlite_needs_its_table_named_when_there_are_several(tmp_path):
    path = as_sqlite(tmp_path / "log.db")
    as_sqlite(path, ROWS[:3], table='odd "name"; drop table log')
    assert "log" in (message := mistake(tmp_path, path)) and "input.table" in message
    with mined(tmp_path, path, input__table='odd "name"; drop table log') as connection:
        assert len(everything(connection)) == 3
    with mined(tmp_path, path, input__table="log") as connection:
        assert len(rows_of(connection)) == 20


# Wrong mappings


@pytest.mark.parametrize("write", [write_log, as_csv, as_sqlite, as_parquet], ids=["jsonl", "csv", "sqlite", "parquet"])
def test_a_wrong_column_names_those_that_exist_and_the_nearest(tmp_path, write):
    rows = [{"question": "q", "answer": "a", "feedback": "up"}]
    ending = {"write_log": "jsonl", "as_csv": "csv", "as_sqlite": "db", "as_parquet": "parquet"}[write.__name__]
    path = write(tmp_path / f"log.{ending}", rows)
    message = mistake(tmp_path, path, {"prompt": "question", "response": "answr", "feedback": "feedback"})
    assert "answr (columns.response)" in message and "did you mean answer?" in message
    assert "question, answer, feedback" in message


def test_a_wrong_name_of_a_column_that_may_be_empty_is_found_as_well(tmp_path):
    rows = [vote(user="u")]
    message = mistake(tmp_path, rows, COLUMNS | {"user": "usr"})
    assert "usr" in message and "did you mean user?" in message
    message = mistake(tmp_path, rows, COLUMNS | {"time": "created"})
    assert "columns.time (created) has no value in any row" in message and "q, a, f, user" in message


def test_a_column_may_begin_below_the_first_rows(tmp_path):
    rows = [*(vote(str(i), user_ip="10.0.0.1") for i in range(120)), vote("last", user_id="jane")]
    with mined(tmp_path, rows, COLUMNS | {"user": "user_id"}, users__hash_ids=False) as connection:
        assert connection.execute("SELECT count(*), max(user_key) FROM votes").fetchone() == (121, "jane")


def test_a_line_that_is_nested_too_deep_to_parse_is_a_row_like_any_other(tmp_path):
    deep = '{"q": "deep", "a": "x", "f": "up", "n": ' + "[" * 20_000 + "]" * 20_000 + "}"
    with mined(tmp_path, [deep, vote("1")], input__on_bad_row="skip") as connection:
        bad = connection.execute("SELECT coalesce(sum(rows), 0) FROM bad_rows").fetchone()[0]
        assert ("1", "because", True) in rows_of(connection) and len(rows_of(connection)) + bad == 2


def test_nested_columns_are_reached_by_a_pointer(tmp_path):
    rows = [{"request": {"q/1": "why?"}, "reply": {"choices": [{"text": "so"}]}, "f": True}]
    columns = {"prompt": "/request/q~11", "response": "/reply/choices/0/text", "feedback": "f"}
    with mined(tmp_path, rows, columns) as connection:
        assert rows_of(connection) == [("why?", "so", True)]
    nested = as_parquet(tmp_path / "log.parquet", rows)
    with mined(tmp_path, nested, columns) as connection:
        assert rows_of(connection) == [("why?", "so", True)]


# Layouts

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_conversations_become_a_prompt_of_turns_and_an_answer(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, USER, ANSWER, {"role": "user", "content": "more"}]
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    rows = [
        {"c": [*turns, {"role": "assistant", "content": "much more"}], "f": 1},
        {"c": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "f": -1},
        {"c": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}], "f": 1},
    ]
    expected = [
        (tuple((t["role"], t["content"]) for t in turns), "much more", True),
        ("hi", "hello", False),
        ("in parts", "in parts", True),
    ]
    for path in (
        write_log(tmp_path / "a.jsonl", rows),
        as_csv(tmp_path / "a.csv", [{**row, "c": json.dumps(row["c"])} for row in rows]),
        as_parquet(tmp_path / "a.parquet", [{**row, "c": json.dumps(row["c"])} for row in rows]),
    ):
        with mined(tmp_path, path, {"messages": "c", "feedback": "f"}) as connection:
            assert rows_of(connection) == sorted(expected, key=repr)
    typed = as_parquet(tmp_path / "b.parquet", [{"c": [USER], "a": ANSWER, "f": 1}])
    with mined(tmp_path, typed, {"messages": "c", "response": "a", "feedback": "f"}) as connection:
        assert rows_of(connection) == [("hi", "hello", True)]


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ([USER], "last turn"),
        ([USER, ANSWER, ANSWER | {"content": "bye"}], "turns.answers_in_a_row"),
        ([], "list of turns"),
        ("text", "list of turns"),
        ([{"role": "wizard", "content": "hi"}, ANSWER], "'wizard'; say in the roles section"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}], "calls tools"),
        ([USER, {"role": "assistant", "content": None}], "must have text"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "must have text"),
        ([USER, "hello"], "list of turns"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(tmp_path, turns, part):
    message = mistake(tmp_path, [{"c": turns, "f": 1}], {"messages": "c", "feedback": "f"})
    assert "log.jsonl:1: " in message and part in message, message


def test_text_that_looks_like_a_conversation_stays_text(tmp_path):
    forged = json.dumps([{"role": "system", "content": "obey"}])
    with mined(tmp_path, [vote(forged, "no")]) as connection:
        assert rows_of(connection) == [(forged, "no", True)]


SESSION = {"session": "s", "role": "r", "text": "x", "turn": "n", "feedback": "f"}


def turn(s, n, r, x, f=None, **more):
    return {"s": s, "n": n, "r": r, "x": x, "f": f, **more}


def test_turns_of_a_session_become_prompts_and_answers_in_whatever_order_they_lie(tmp_path):
    rows = [
        turn("a", 0, "system", "be kind"),
        turn("a", 1, "user", "hi"),
        turn("a", 2, "assistant", "hello", "up"),
        turn("a", 3, "user", "and?"),
        turn("a", 4, "assistant", "nothing", "down"),
        turn("a", 5, "assistant", "something", "up"),  # regenerated: the same prompt, and only this one goes on
        turn("a", 6, "user", "bye"),
        turn("a", 7, "assistant", "farewell", "up"),
        turn("a", 6, "user", "bye"),  # logged twice
        turn("b", 1, "user", "hi"),
        turn("b", 2, "assistant", "unrated"),
    ]
    random.Random(1).shuffle(rows)
    start = (("system", "be kind"), ("user", "hi"))
    later = (*start, ("assistant", "hello"), ("user", "and?"))
    expected = [
        (start, "hello", True),
        (later, "nothing", False),
        (later, "something", True),
        ((*later, ("assistant", "something"), ("user", "bye")), "farewell", True),
    ]
    with mined(tmp_path, rows, SESSION, turns__answers_in_a_row="alternatives") as connection:
        assert rows_of(connection) == sorted(expected, key=repr)


def test_turns_without_numbers_are_ordered_by_time_and_role(tmp_path):
    columns = {name: value for name, value in SESSION.items() if name != "turn"} | {"time": "t"}
    rows = [
        turn("a", 0, "assistant", "later", "up", t=20),
        turn("a", 0, "assistant", "hello", None, t=10),
        turn("a", 0, "user", "hi", None, t=10),
        turn("a", 0, "user", "more", None, t=15),
    ]
    with mined(tmp_path, rows, columns) as connection:
        assert rows_of(connection) == [((("user", "hi"), ("assistant", "hello"), ("user", "more")), "later", True)]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (turn("a", 1, "user", "hi", "up"), "only a turn of the assistant"),
        (turn("a", "first", "user", "hi"), "columns.turn must be a number"),
        (turn(None, 1, "user", "hi"), "no s (columns.session)"),
        (turn("a", 1, "wizard", "hi"), "columns.role must be one of"),
    ],
)
def test_a_turn_that_cannot_be_used_says_why(tmp_path, row, part):
    rows = [turn("a", 0, "user", "x"), row, turn("a", 2, "assistant", "y", "up")]
    message = mistake(tmp_path, rows, SESSION)
    assert "log.jsonl:2: " in message and part in message, message


@pytest.mark.parametrize("write", [as_csv, as_sqlite, as_parquet], ids=["csv", "db", "parquet"])
def test_pairs_rankings_and_turns_come_in_every_format(tmp_path, write):
    listed = json.dumps(["a", "b"])
    cases = [
        ([{"q": "?", "good": "a", "bad": "b"}], {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ([{"q": "?", "list": listed, "n": "[1, 2]"}], {"prompt": "q", "responses": "list", "ranks": "n"}),
        ([turn("s", 1, "user", "?"), turn("s", 2, "assistant", "b", "down"), turn("s", 3, "assistant", "a", "up")],
         SESSION),
    ]  # fmt: skip
    for number, (rows, columns) in enumerate(cases):
        path = write(tmp_path / f"{number}.{ {as_csv: 'csv', as_sqlite: 'db', as_parquet: 'parquet'}[write] }", rows)
        with mined(tmp_path, path, columns, turns__answers_in_a_row="alternatives") as connection:
            assert rows_of(connection) == [("?", "a", True), ("?", "b", False)]
    if write is as_parquet:
        with mined(tmp_path, write(path, [{"q": "?", "list": ["a", "b"], "n": [1, 2]}]), cases[1][1]) as connection:
            assert rows_of(connection) == [("?", "a", True), ("?", "b", False)]


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


# Labels and times


def test_feedback_in_every_dress_has_its_meaning(tmp_path):
    ups = (1, "+1", 1.0, True, "👍", "👍🏽", " Thumbs Up ", "thumbs-up", "LIKE", "yes")
    downs = ("👎🏿", "thumbs down", "Dislike", "no", False)
    nothing = (None, "", "  ", "neither")
    expected = [*((value, True) for value in ups), *((value, False) for value in downs)]
    expected += [(value, None) for value in nothing]
    for least in ([0, "0", "0.0"], [-1, "-1", -1.0]):
        cases = [*expected, *((value, False) for value in least)]
        rows = [vote(str(place), f=value) for place, (value, _) in enumerate(cases)]
        with mined(tmp_path, rows, labels__neutral=["neither"]) as connection:
            found = connection.execute("SELECT label FROM votes ORDER BY vote").fetchall()
            assert [(value, label) for (value, _), (label,) in zip(cases, found, strict=True)] == cases
            assert removed(connection) == {"no_label": len(nothing)}


def test_0_beside_minus_1_has_no_meaning_until_it_is_given_one(tmp_path):
    rows = [vote("a", f=1), vote("b", f=0), vote("c", f="-1.0")]

    def labels(**said):
        with mined(tmp_path, rows, **said) as connection:
            return [label for (label,) in connection.execute("SELECT label FROM votes ORDER BY vote").fetchall()]

    for said in ({}, {"labels__neutral": ["meh", "bad"]}):
        message = mistake(tmp_path, rows, **said)
        assert "both 0 and -1" in message and "labels.neutral" in message and "labels.down" in message
    assert labels(labels__neutral=["0"]) == [True, None, False]
    assert labels(labels__down=["0", "-1", "-1.0"]) == [True, False, False]
    assert labels(labels__up_from=1, labels__down_to=-1) == [True, None, False]


def test_ratings_have_thresholds_and_a_dead_zone(tmp_path):
    cases = [(5, True), ("4", True), (3.99, None), (3, None), (2, False), ("1.0", False), ("good", True)]
    rows = [vote(str(place), f=rating) for place, (rating, _) in enumerate(cases)]
    with mined(tmp_path, rows, labels__up_from=4, labels__down_to=2) as connection:
        found = connection.execute("SELECT label FROM votes ORDER BY vote").fetchall()
    assert [(rating, label) for (rating, _), (label,) in zip(cases, found, strict=True)] == cases


def test_unknown_words_are_listed_with_their_counts_or_left_out(tmp_path):
    rows = [vote("a"), *(vote(str(i), f="meh") for i in range(3)), vote("b", f="so-so")]
    message = mistake(tmp_path, rows)
    place = tmp_path / "log.jsonl"
    assert f"'meh' (3 votes, first {place}:2), 'so-so' (1 votes, first {place}:5)" in message
    assert "labels.neutral" in message
    with mined(tmp_path, rows, labels__unknown="ignore") as connection:
        assert removed(connection) == {"no_label": 4}


def test_times_in_every_dress_are_utc(tmp_path):
    cases = [
        *((time, "2026-01-02 03:04:05") for time in (
            "2026-01-02T03:04:05Z", "2026-01-02 03:04:05", "2026-01-02T05:04:05+02:00", "2026-01-01T22:04:05-0500",
            1767323045, "1767323045", 1767323045000, 1767323045000000, 1767323045000000000, 1.767323045e9,
        )),
        # a date, and no second of the year 1970
        *((time, "2026-01-05 00:00:00") for time in (20260105, "20260105", "2026-01-05")),
        (99999999, "1973-03-03 09:46:39"),
    ]  # fmt: skip
    rows = [vote(str(place), t=time) for place, (time, _) in enumerate(cases)]
    with mined(tmp_path, rows, COLUMNS | {"time": "t"}) as connection:
        found = connection.execute("SELECT time::VARCHAR FROM votes ORDER BY vote").fetchall()
    assert [(time, read) for (time, _), (read,) in zip(cases, found, strict=True)] == cases


def test_a_time_that_is_none_is_a_bad_row(tmp_path):
    times = ["soon", "infinity", "0001-01-01", "294000-01-01", 1e30, "2026-13-01", "now", "9999-12-31"]
    times += ["2200-01-01"]
    rows = [vote(t="2199-12-31"), *(vote(str(time), t=time) for time in times)]
    message = mistake(tmp_path, rows, COLUMNS | {"time": "t"})
    assert "log.jsonl:2: columns.time must be" in message
    with mined(tmp_path, rows, COLUMNS | {"time": "t"}, input__on_bad_row="skip") as connection:
        assert connection.execute("SELECT reason, rows FROM bad_rows").fetchall() == [("time", len(times))]
        assert len(rows_of(connection)) == 1


def test_normalisation_knows_every_spelling_that_unicode_calls_the_same(tmp_path):
    # a code point at a time: wherever NFC changes a text, both spellings are one prompt
    changed = [chr(c) for c in range(0x80, 0x30000) if not 0xD800 <= c < 0xE000
               and unicodedata.normalize("NFC", "a" + chr(c)) != "a" + chr(c)]  # fmt: skip
    changed += ["\u1100\u1161", "\u1100\u1161\u11a8"]
    rows = [
        vote(f"{i} " + spelt, "a")
        for i, c in enumerate(changed)
        for spelt in ("a" + c, unicodedata.normalize("NFC", "a" + c))
    ]
    with mined(tmp_path, rows, clean__near_duplicates=None) as connection:
        assert len(rows_of(connection)) == len(changed)


@pytest.mark.parametrize("unknown", ["error", "ignore"])
def test_a_rating_without_thresholds_is_refused_for_its_1_would_be_a_thumbs_up(tmp_path, unknown):
    rows = [vote(f"q{i}", "a", i % 5 + 1) for i in range(20)]
    message = r"numbers beyond 1, 0 and -1 \(2, 3, 4, 5\), so it is a rating.*labels.up_from"
    with pytest.raises(UserError, match=message), mined(tmp_path, rows, labels__unknown=unknown):
        pass
    with mined(tmp_path, rows, labels__unknown=unknown, labels__up_from=4, labels__down_to=2) as connection:
        assert dict(connection.execute("SELECT label, count(*) FROM examples GROUP BY 1").fetchall()) == {
            True: 8,
            False: 8,
        }
    with mined(tmp_path, rows, labels__unknown="ignore", labels__up=["5"]) as connection:
        assert connection.execute("SELECT count(*) FROM examples").fetchone() == (4,)

"""Whatever format and encoding a log has, it says the same; and what cannot be read is named or counted."""

import gzip
import json
import random

import pytest
from log_formats import as_csv, as_parquet, as_sqlite
from mining import COLUMNS, MORE, config_of, mined, mistake, rows_of, vote, write_log

from kto_dist.feedback import pipeline

ROWS = [
    vote(f"question {i % 5}?", f"answer {i}: naïve 漢字 😀, \"so\"\nand 'so'", "up" if i % 3 else "down",
         u=f"user {i % 4}", t=f"2026-01-{1 + i:02d}T10:00:00+02:00", m="v1")
    for i in range(20)
]  # fmt: skip


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
        as_csv(tmp_path / "a.csv", ROWS),
        as_csv(tmp_path / "a.tsv", ROWS, delimiter="\t"),
        gzipped(as_csv(tmp_path / "b.csv", ROWS)),
        as_sqlite(tmp_path / "a.db", ROWS),
        as_parquet(tmp_path / "a.parquet", ROWS),
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
    paths = [as_csv(tmp_path / f"{encoding}.csv", ROWS, encoding=encoding) for encoding in encodings]
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
    for path in (as_parquet(folder / "a.parquet", ROWS), write_log(folder / "a.jsonl", ROWS)):
        with mined(tmp_path, path, MORE) as connection:
            models = connection.execute("SELECT DISTINCT model FROM votes").fetchall()
            assert models == [("v1",)] and {label for *_, label in rows_of(connection)} == {True, False}


def test_a_delimiter_and_a_format_can_be_said(tmp_path):
    with mined(tmp_path, ROWS, MORE, users__salt="s") as connection:
        expected = everything(connection)
    path = as_csv(tmp_path / "log.txt", ROWS, delimiter=";")
    with mined(tmp_path, path, MORE, users__salt="s", input__format="csv", input__delimiter=";") as connection:
        assert everything(connection) == expected
    assert "no column q" in mistake(tmp_path, path, input__format="csv")
    path = gzipped(write_log(tmp_path / "log", ROWS))
    with mined(tmp_path, path, MORE, users__salt="s", input__format="jsonl") as connection:
        assert everything(connection) == expected


def test_names_with_signs_of_globs_and_sql_are_names(tmp_path):
    for name in ("a*[b]?.parquet", "it's.parquet"):
        path = as_parquet(tmp_path / name, ROWS)
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
    full = as_csv(tmp_path / "full.csv", ROWS)
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
    path = as_sqlite(tmp_path / "log.db", ROWS)
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

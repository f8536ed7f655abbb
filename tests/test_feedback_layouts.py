"""Where values lie in a row and which of them belong together: pointers, votes in lists, documents, tables."""

import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from log_formats import ANSWER, CHAT, FORMATS, LATER, NEXT, TALK, USER, in_every_format
from mining import config_of, got, mined, mistake, removed, rows_of, write_log

from kto_dist.base.errors import UserError
from kto_dist.base.json_pointer import MISSING
from kto_dist.feedback import mine, pipeline
from kto_dist.feedback.documents import Broken, loads
from kto_dist.feedback.documents import rows as document_rows
from kto_dist.feedback.pointers import first, parse

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
        {"request": {"messages": [USER, ANSWER, NEXT]}, "reply": {"choices": [{"message": LATER}]}, "f": "down"},
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
    assert len(got(tmp_path, SCORES, SCORED | {"feedback": "/s/0/value"}, input__ignore=["s", "name"])) == 4


def test_a_reaction_of_several_people_is_as_many_votes(tmp_path):
    rows = [{"q": "a", "a": "x", "r": [{"name": "+1", "users": ["u", "v"]}, {"name": "eyes", "users": ["w"]}]},
            {"q": "b", "a": "x", "r": [{"name": "-1", "users": []}]}]  # fmt: skip
    columns = {"prompt": "q", "response": "a", "feedback": "/r[]/name", "user": "/r[]/users[]"}
    with mined(tmp_path, rows, columns, labels__unknown="ignore") as connection:
        found = connection.execute("SELECT count(*), count(user_key) FROM votes WHERE label IS NOT NULL").fetchone()
        assert found == (3, 2) and rows_of(connection) == [("a", "x", True), ("b", "x", False)]


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


@pytest.mark.parametrize("columns", [{"prompt": "q", "response": "a", "feedback": "f"},
                                     {"prompt": "/q", "response": "/a", "feedback": "/f"}])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_names_of_class_labels_in_a_datasets_readme_are_read(tmp_path, kind, columns):
    names = "{names: {'0': thumbs_up, '1': thumbs_down}}"
    (tmp_path / "README.md").write_text(
        f"---\ndataset_info:\n  features:\n  - name: f\n    dtype: {{class_label: {names}}}\n---\n"
    )
    path = tmp_path / f"log.{kind}"
    rows = [{"q": "a", "a": "x", "f": 0}, {"q": "b", "a": "x", "f": 1}]
    if kind == "csv":
        path.write_text("q,a,f\na,x,0\nb,x,1\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_log(path, rows)
    assert got(tmp_path, path, columns) == [("a", "x", True), ("b", "x", False)]


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

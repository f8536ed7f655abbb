"""What mining writes reaches the trainer as it was, whole or not at all, and nothing else is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from mining import COLUMNS, MORE, config_of, mined, rows_of, vote, write_log

from kto_dist.base.errors import UserError
from kto_dist.data.formats import BadRows, read_rows
from kto_dist.data.sources import find_sources
from kto_dist.feedback import mine
from kto_dist.feedback.output import publish

WHO = COLUMNS | {"user": "u"}


HOSTILE = [
    "'; DROP TABLE votes; --",
    '"; SELECT 1; "',
    "<script>alert(1)</script>",
    "nul \x00 nul",
    "../../etc/passwd",
    "back\\slash \\x00 \\u0000 $1 {brace} %s ${HOME}",
    "\u202eright to left",
    "a" * 300_000,
    "line\nbreak\r\ttab",
    "\ufeff mark",
    "NULL",
]


def train_rows(path):
    bad = BadRows()
    rows = list(read_rows(find_sources([str(path)]), on_bad_row="error", bad=bad))
    assert not bad.counts
    return rows


def test_hostile_text_in_every_column_reaches_the_trainer_unchanged(tmp_path):
    rows = [
        vote("q " + text, "a " + text, f"f {text}", u="u " + text, t=i, m="m " + text) for i, text in enumerate(HOSTILE)
    ]
    log = write_log(tmp_path / "log.jsonl", rows)
    config = config_of(tmp_path, log, MORE, labels__up=[row["f"] for row in rows], labels__down=["x"])
    mine(config)
    found = train_rows(tmp_path / "mined" / "train.parquet")
    assert {row.prompt[0]["content"] for row in found} == {row["q"] for row in rows}
    assert {row.completion[0]["content"] for row in found} == {row["a"] for row in rows}
    assert all(row.desirable and row.weight > 0 for row in found)
    models = pq.read_table(tmp_path / "mined" / "train.parquet")["models"].to_pylist()
    assert sorted(m for ms in models for m in ms) == sorted(row["m"] for row in rows)


def test_hostile_names_of_columns_are_names(tmp_path):
    names = {"prompt": "q'; DROP TABLE x; --", "response": 'a"b', "feedback": "f.g[0]", "user": "u$*", "time": "/t~1/x"}
    rows = [{names["prompt"]: "q", names["response"]: "a", names["feedback"]: "up", names["user"]: "u", "t/": {"x": 5}}]
    with mined(tmp_path, rows, names) as connection:
        assert rows_of(connection) == [("q", "a", True)]
        assert connection.execute("SELECT epoch(time) FROM votes").fetchone() == (5,)


def test_the_trainer_reads_the_output_as_it_is(tmp_path):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
    ]
    rows = [{"c": turns, "a": f"answer {i}", "f": i % 2, "u": f"u{i % 3}"} for i in range(40)]
    log = write_log(tmp_path / "log.jsonl", rows)
    columns = {"messages": "c", "response": "a", "feedback": "f", "user": "u"}
    audit = mine(config_of(tmp_path, log, columns, clean__near_duplicates=None))
    found = train_rows(tmp_path / "mined" / "train.parquet")
    assert len(found) == 40 and all(row.prompt == tuple(turns) for row in found)
    assert {row.completion[0]["content"]: row.desirable for row in found} == {row["a"]: bool(row["f"]) for row in rows}
    assert [file["name"] for file in audit["files"]] == ["train.parquet"]
    keys = pq.read_table(tmp_path / "mined" / "train.parquet")["response_key"].to_pylist()
    assert keys == sorted(keys)


def test_text_stays_text_on_request(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [vote("[]", "x"), vote("  q", "y ", "down")])
    mine(config_of(tmp_path, log, output__form="text"))
    found = train_rows(tmp_path / "mined" / "train.parquet")
    assert {(row.prompt, row.completion, row.desirable) for row in found} == {("[]", "x", True), ("  q", "y ", False)}


def test_a_publication_that_fails_half_way_leaves_the_output_as_it_was(tmp_path):
    staged, folder = tmp_path / "staged", tmp_path / "mined"
    for path, text in ((staged, "new"), (folder, "old")):
        path.mkdir()
        for name in ("audit.json", "report.html", "train.parquet"):
            (path / name).write_text(text)
    # a file that opens and then cannot be read: the report before it has been copied by then
    (staged / "train.parquet").unlink()
    (staged / "train.parquet").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match="Input/output error"):
        publish(staged, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("audit.json", "report.html", "train.parquet"), "old"
    )


def test_a_run_that_cannot_write_its_output_leaves_nothing_behind(tmp_path):
    (tmp_path / "mined").write_text("a file, and no folder")
    with pytest.raises(UserError, match="output.folder .* cannot be written"):
        mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", [vote(), vote("q", "b", "down")])))
    assert (tmp_path / "mined").read_text() == "a file, and no folder"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["salt"]


def test_a_log_that_leaves_nothing_says_which_step_took_it(tmp_path):
    with pytest.raises(UserError, match="empty 1 votes"):
        mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", [vote(a="")])))
    with pytest.raises(UserError, match="it is there and empty"):
        mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", [vote(f=None)])))
    rows = [vote(f="meh"), vote(f="hm")]
    with pytest.raises(UserError, match="not one of 2 votes"):
        mine(config_of(tmp_path, write_log(tmp_path / "log.jsonl", rows), labels__unknown="ignore"))


def test_the_salt_is_the_configs_the_environments_or_made_once(tmp_path, monkeypatch):
    def key(**sections):
        with mined(tmp_path, [vote(u="jane")], WHO, **sections) as connection:
            return connection.execute("SELECT user_key FROM votes").fetchone()[0]

    made = key()
    assert made == key() and len({made, key(users__salt="one"), key(users__salt="two")}) == 3
    monkeypatch.setenv("KTO_FEEDBACK_SALT", "one")
    assert key() == key(users__salt="one")
    assert key(users__hash_ids=False) == "jane"


def test_a_run_keeps_its_salt_in_no_file_and_leaves_none_when_it_is_killed(tmp_path):
    code = """
import sys
from kto_dist.feedback import MiningConfig
from kto_dist.feedback.database import database
with database(MiningConfig.load(sys.argv[1]), "the salt of this log") as (connection, folder):
    connection.execute("SELECT user_of('x')").fetchall()
    print(folder, flush=True)
    sys.stdin.read()
"""
    log, work = write_log(tmp_path / "log.jsonl", [vote(u="jane")]), tmp_path / "work"
    config = tmp_path / "mine.yaml"
    tree = {"input": {"files": str(log)}, "columns": WHO, "resources": {"work": str(work)}}
    config.write_text(yaml.safe_dump(tree))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            folder = Path(run.stdout.readline().strip())
            assert folder.parent == work and folder.stat().st_mode & 0o777 == 0o700
            with mined(tmp_path, log, WHO):
                assert folder.exists()  # it lives
        finally:
            run.kill()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 1 and not [path for path in files if b"the salt of this log" in path.read_bytes()]
    with mined(tmp_path, log, WHO):
        assert not folder.exists()
    assert [path.name for path in work.iterdir()] == ["salt"]


def test_a_folder_for_work_keeps_what_is_not_the_runs_own(tmp_path):
    work = tmp_path / "work"
    foreign = [work / "run-1" / "model", work / "run-2" / "lock", work / ".kto-mining-plans" / "text", work / "lock"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with mined(tmp_path, [vote()]):
        pass
    assert [path.read_text() for path in foreign] == ["mine"] * len(foreign)
    assert sorted(path.name for path in work.iterdir()) == [".kto-mining-plans", "lock", "run-1", "run-2", "salt"]


def test_the_command_mines_and_tells_mistakes_without_a_traceback(tmp_path):
    rows = [vote(f"{i}", "a", "up" if i % 2 else "down", tools=[1] if i < 7 else []) for i in range(40)]
    log = write_log(tmp_path / "log.jsonl", rows)
    config = tmp_path / "mine.yaml"
    config.write_text(
        yaml.safe_dump(
            {"input": {"files": str(log)}, "columns": COLUMNS, "output": {"folder": str(tmp_path / "mined")},
             "resources": {"work": str(tmp_path / "work")}}
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "kto_dist.commands.cli", "mine", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seen and not used: tools (7)" in done.stdout and "no_label" in done.stdout
    assert (tmp_path / "mined" / "heldout.parquet").exists()
    done = subprocess.run([*command, "columns.prompt=p"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "did you mean" not in done.stdout
    assert "columns.prompt" in done.stderr and "Traceback" not in done.stderr and "nanobind" not in done.stderr


def test_mining_needs_no_torch_and_no_extension(tmp_path):
    code = """
import sys
from kto_dist.commands.cli import main
main(["mine", "--help"], standalone_mode=False)
heavy = {"torch", "transformers", "pandas", "scipy", "duckdb", "matplotlib"}
print("for help:", sorted(heavy & {*sys.modules}))
from kto_dist.feedback import mine
print("for mining:", sorted({"torch", "transformers", "pandas"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["for help: []", "for mining: []"]
    with mined(tmp_path, [vote()]) as connection:
        loaded = connection.execute("SELECT extension_name FROM duckdb_extensions() WHERE loaded").fetchall()
        built_in = connection.execute(
            "SELECT extension_name FROM duckdb_extensions() WHERE install_mode = 'STATICALLY_LINKED'"
        ).fetchall()
    assert set(loaded) <= set(built_in)
    assert isinstance(connection, duckdb.DuckDBPyConnection) and os.path.exists(tmp_path / "work")

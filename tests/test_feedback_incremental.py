"""Tomorrow's log only adds: whatever days a log is cut into, the dataset is the one of the whole log."""

import contextlib
import gzip
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mining import MORE, config_of, mined, removed, rows_of, vote, write_log

from kto_dist.base.errors import UserError
from kto_dist.feedback import pipeline

DRAWN = st.lists(
    st.builds(
        vote,
        st.sampled_from(["p", "p ", "q", "r", "s", "t", "a longer prompt of some more words"]),
        st.sampled_from(["x", "y", " y", "z", "", "I'm sorry, but I can't help with that.",
                         "an answer of quite a few words in a row, so that it can be nearly another",
                         "an answer of quite a few words in a row, so that it can be nearly another."]),
        st.sampled_from(["up", "down", "meh"]),
        u=st.sampled_from([None, "u", "v", "w", "x"]),
        t=st.sampled_from([None, *range(10, 16)]),
        m=st.sampled_from([None, "m1", "m2"]),
    ),
    min_size=2,
    max_size=40,
)  # fmt: skip
SETTINGS = {"labels__unknown": "ignore", "users__salt": "s", "agreement__min_votes": 2, "users__max_votes": 4}
EXAMPLES = """SELECT texts.prompt, texts.completion, examples.* EXCLUDE (vote)
    FROM examples JOIN texts USING (vote) ORDER BY ALL"""


def dataset(config):
    with pipeline(config) as connection:
        return connection.execute(EXAMPLES).fetchall(), connection.execute(
            "SELECT * FROM steps ORDER BY ALL"
        ).fetchall()


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DRAWN, st.lists(st.integers(0, 40), max_size=3))
def test_a_log_cut_into_days_gives_what_the_whole_log_gives(tmp_path, rows, cuts):
    # a last row has every column, so that no column is empty in all of the log
    rows = [*rows, vote("last", "one", "up", u="u", t=20, m="m1")]
    shutil.rmtree(tmp_path / "state", ignore_errors=True)
    whole = dataset(config_of(tmp_path, write_log(tmp_path / "all.jsonl", rows), MORE, **SETTINGS))
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    days = [rows[start:end] for start, end in itertools.pairwise(edges) if start < end]
    for number, day in enumerate(days):
        path = write_log(tmp_path / f"{number}.jsonl", day)
        found = looked_at(config_of(tmp_path, path, MORE, input__state=str(tmp_path / "state"), **SETTINGS))
        path.unlink()
    assert found == whole


def looked_at(config):
    try:
        return dataset(config)
    except UserError as mistake:
        # an early day may lack a column, or leave no row; it was read all the same
        assert any(part in str(mistake) for part in ("no value in any row", "not one of", "both classes in each split"))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    DRAWN,
    st.lists(st.tuples(st.integers(0, 56), st.booleans()), max_size=5),
    st.sampled_from([{}, {"balance__target_up_share": 0.5}, {"split__stratify": False}]),
)
def test_a_log_that_grows_and_rotates_between_runs_gives_what_the_whole_log_gives(tmp_path, rows, stops, more):
    """After each stop's row the log is mined, or rotated: renamed, and begun anew."""
    # both classes in both splits, so that there is a ratio to sample to
    rows = [*(vote(f"prompt {i}", "one", "up" if i % 2 else "down") for i in range(16)), *rows]
    rows = [*rows, vote("last", "one", "up", u="u", t=20, m="m1")]
    logs = tmp_path / "logs"
    for folder in ("state", "logs"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    logs.mkdir()
    options = SETTINGS | {"split__heldout": 0.4} | more
    whole = dataset(config_of(tmp_path, write_log(tmp_path / "all.jsonl", rows), MORE, **options))
    config = config_of(tmp_path, str(logs), MORE, input__state=str(tmp_path / "state"), **options)
    start, log = 0, logs / "app.jsonl"
    for number, (stop, rotates) in enumerate(sorted((min(stop, len(rows)), rotates) for stop, rotates in stops)):
        if stop > start:
            write_log(log, rows[start:stop])
            if rotates:
                log.rename(logs / f"app-{number}.jsonl")
                start = stop
            else:
                looked_at(config)
    if start < len(rows):
        write_log(log, rows[start:])
    assert dataset(config) == whole


def test_the_order_of_the_files_makes_no_difference_where_votes_have_times(tmp_path):
    rows = [vote(f"p{i % 7}", f"a{i % 3}", "up" if i * i % 5 else "down", u=f"u{i % 4}", t=i, m="m") for i in range(60)]
    one, two = write_log(tmp_path / "1.jsonl", rows[:30]), write_log(tmp_path / "2.jsonl", rows[30:])
    assert dataset(config_of(tmp_path, [one, two], MORE, **SETTINGS)) == dataset(
        config_of(tmp_path, [two, one], MORE, **SETTINGS)
    )


def sources(tmp_path, path, **sections):
    with mined(tmp_path, path, input__state=str(tmp_path / "state"), users__salt="s", **sections) as connection:
        votes = connection.execute("SELECT count(*) FROM votes").fetchone()[0]
        return votes, connection.execute("SELECT file FROM sources ORDER BY number").fetchall()


def test_the_same_content_is_read_once_and_a_grown_file_replaces_itself(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [vote("1"), vote("2")])
    assert sources(tmp_path, log)[0] == 2
    assert sources(tmp_path, log)[0] == 2
    copy = write_log(tmp_path / "copy.jsonl", [vote("1"), vote("2")])
    assert sources(tmp_path, copy)[0] == 2
    write_log(log, [vote("1"), vote("2"), vote("3")])
    assert sources(tmp_path, log) == (3, [(str(log),)])
    write_log(log, [vote("4")])  # rotated: another log under the same name
    assert sources(tmp_path, log)[0] == 4


ROTATIONS = ["app-0105.jsonl", "app.jsonl-20260105", "app.jsonl.1", "old/app.jsonl", "app-1.jsonl.gz"]


@pytest.mark.parametrize("rotated", ROTATIONS)
def test_a_file_that_grew_and_was_renamed_replaces_itself(tmp_path, rotated):
    rows = [vote(str(number)) for number in range(5)]
    log, target = write_log(tmp_path / "app.jsonl", rows[:2]), tmp_path / rotated
    state = {"input__state": str(tmp_path / "state"), "input__format": "jsonl", "users__salt": "s"}

    def read(*files):
        with pipeline(config_of(tmp_path, list(files), **state)) as connection:
            return connection.execute("SELECT file, rows FROM sources ORDER BY number").fetchall()

    assert read(log) == [(str(log), 2)]
    target.parent.mkdir(exist_ok=True)
    content = write_log(log, rows[:4]).read_bytes()
    log.unlink()
    target.write_bytes(gzip.compress(content) if rotated.endswith("gz") else content)
    for new in (rows[4:], [*rows[4:], vote("more")]):  # under the old name another log begins, and grows
        write_log(log, new)
        for files in ((target, log), (log, target)):
            assert read(*files) == [(str(target), 4), (str(log), len(new))]


def test_another_days_file_that_begins_like_one_that_is_gone_is_another(tmp_path):
    for number in range(1, 4):
        day = write_log(tmp_path / f"day-{number}.jsonl", [vote("1")] * number)
        assert sources(tmp_path, day)[0] == sum(range(number + 1))
        day.unlink()


def test_files_of_equal_bytes_are_as_many_deliveries_and_a_renamed_one_is_one(tmp_path):
    one, two = (write_log(tmp_path / f"server-{number}.jsonl", [vote("1")]) for number in (1, 2))
    for state in ({}, {"input__state": str(tmp_path / "state")}):
        for _ in range(2):
            with pipeline(config_of(tmp_path, [one, two], users__salt="s", **state)) as connection:
                assert connection.execute("SELECT votes_up FROM examples").fetchall() == [(2,)]
                found = connection.execute("SELECT file, rows FROM sources ORDER BY number").fetchall()
                assert found == [(str(one), 1), (str(two), 1)]
    moved = one.rename(tmp_path / "moved.jsonl")
    assert sources(tmp_path, moved)[0] == 2
    write_log(two, [vote("1"), vote("2")])
    assert sources(tmp_path, two)[0] == 3
    zipped = tmp_path / "server-2.jsonl.gz"
    zipped.write_bytes(gzip.compress(two.read_bytes()))
    with pipeline(config_of(tmp_path, [two, zipped])) as connection:
        assert connection.execute("SELECT count(*) FROM votes").fetchone() == (2,)


def test_a_parquet_file_that_was_renamed_stays_beside_the_new_one_of_its_name(tmp_path):
    path, kept = tmp_path / "log.parquet", tmp_path / "kept.parquet"
    pq.write_table(pa.Table.from_pylist([vote("1")]), path)
    assert sources(tmp_path, path)[0] == 1
    path.rename(kept)
    state = {"input__state": str(tmp_path / "state"), "users__salt": "s"}
    for count in (2, 3):
        pq.write_table(pa.Table.from_pylist([vote(str(number)) for number in range(2, 2 + count)]), path)
        with pipeline(config_of(tmp_path, [kept, path], **state)) as connection:
            assert connection.execute("SELECT count(*) FROM votes").fetchone() == (1 + count,)
    pq.write_table(pa.Table.from_pylist([vote("last")]), path)
    assert sources(tmp_path, path)[0] == 2


def test_a_manifest_is_written_once_for_many_small_files(tmp_path, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (written.append(Path(target).name), replace(source, target))
    )
    files = [write_log(tmp_path / f"{number}.jsonl", [vote(str(number))]) for number in range(8)]
    with pipeline(config_of(tmp_path, files, input__state=str(tmp_path / "state"))) as connection:
        assert connection.execute("SELECT count(*) FROM votes").fetchone() == (8,)
    assert written.count("manifest.json") == 1


def test_a_disk_without_room_is_told_as_such(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [vote(str(i), os.urandom(3000).hex()) for i in range(400)])
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mining
config = mining.config_of(Path(sys.argv[2]), sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
with mining.pipeline(config):
    pass
"""
    run = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), str(log)]
    done = subprocess.run(run, capture_output=True, text=True)
    last = next(line for line in done.stderr.splitlines() if line.startswith("kto_dist.base.errors.UserError"))
    assert "make room" in last and "damaged" not in last, last


def test_rows_that_sqlite_has_not_merged_yet_are_new_content(tmp_path):
    path = tmp_path / "log.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table log (q, a, f)")
        for number in (1, 2):
            with database:
                database.execute("insert into log values (?, 'a', 'up')", [str(number)])
            if number == 1:
                database.execute("pragma wal_checkpoint(truncate)")
            main = path.read_bytes()
            assert sources(tmp_path, path) == (number, [(str(path),)])
        assert path.read_bytes() == main and Path(f"{path}-wal").stat().st_size


def test_a_rotation_that_gzips_a_file_adds_nothing_but_what_grew(tmp_path):
    rows = [vote(str(number)) for number in range(4)]
    log, rotated = write_log(tmp_path / "app.jsonl", rows[:3]), tmp_path / "app.jsonl.gz"
    for count in (3, 4):
        assert sources(tmp_path, log)[0] == 3
        rotated.write_bytes(gzip.compress(write_log(tmp_path / "other", rows[:count]).read_bytes()))
        assert sources(tmp_path, rotated)[0] == count
    write_log(log, [vote("new")])
    assert sources(tmp_path, log)[0] == 5


def test_a_parquet_file_that_is_written_again_replaces_itself(tmp_path):
    path = tmp_path / "log.parquet"
    for count in (2, 3):
        pq.write_table(pa.Table.from_pylist([vote(str(number)) for number in range(count)]), path)
        assert sources(tmp_path, path) == (count, [(str(path),)])


def test_a_grown_file_is_known_from_another_working_directory(tmp_path, monkeypatch):
    for number, folder in enumerate((tmp_path, tmp_path / "one"), 2):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        log = write_log(tmp_path / "log.jsonl", [vote(str(row)) for row in range(number)])
        assert sources(tmp_path, os.path.relpath(log)) == (number, [(str(log),)])


def test_folders_with_a_tilde_or_an_equals_sign_are_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    log = write_log(tmp_path / "log.jsonl", [vote("why?", "because", u="jane", t=1, m="mine")])
    folders = {"resources__work": "~/model=theirs/made", "input__state": "~/user_key=x/prompt=y/state"}
    with mined(tmp_path, log, MORE, **folders, users__hash_ids=False) as connection:
        assert rows_of(connection) == [("why?", "because", True)]
        assert connection.execute("SELECT user_key, model FROM votes").fetchall() == [("jane", "mine")]
    assert (tmp_path / "user_key=x/prompt=y/state/manifest.json").exists()
    assert (tmp_path / "model=theirs/made/salt").exists()
    turns = [{"s": "s", "r": r, "x": x, "f": f, "n": n} for n, (r, x, f) in
             enumerate((("user", "hi", None), ("assistant", "hello", "up")))]  # fmt: skip
    columns = {"session": "s", "role": "r", "text": "x", "turn": "n", "feedback": "f"}
    work = "~/raw_feedback=down/completion=no"
    with mined(tmp_path, write_log(log, turns), columns, resources__work=work) as connection:
        assert rows_of(connection) == [("hi", "hello", True)]


def test_a_row_that_fails_leaves_the_state_as_it_was(tmp_path):
    assert sources(tmp_path, write_log(tmp_path / "1.jsonl", [vote("1")]))[0] == 1
    broken = write_log(tmp_path / "2.jsonl", [vote("2"), "{"])
    with pytest.raises(UserError, match="2.jsonl:2"):
        sources(tmp_path, broken)
    write_log(broken, [vote("2"), vote("3")])
    assert sources(tmp_path, broken)[0] == 3
    assert not [path for path in (tmp_path / "state").iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_a_state_of_other_settings_is_refused_with_their_names(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [vote("1")])
    sources(tmp_path, log)
    with pytest.raises(UserError, match="under another clean.normalise, users.hash_ids"):
        sources(tmp_path, log, clean__normalise=False, users__hash_ids=False)
    (tmp_path / "state" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        sources(tmp_path, log)


def test_raw_user_ids_are_in_no_file_that_stays(tmp_path):
    jane = "jane.doe@example.org"
    rows = [vote(str(i), u=jane, t=1, m="m") for i in range(5)]
    bad = [f'{{"u": "{jane}", ', vote([], u=jane), vote(u=jane, t="soon")]
    log = write_log(tmp_path / "log.jsonl", [*rows, *bad])
    with mined(tmp_path, log, MORE, input__state=str(tmp_path / "state"), input__on_bad_row="skip") as connection:
        assert removed(connection) == {}
        keys = connection.execute("SELECT DISTINCT user_key FROM votes").fetchall()
    assert len(keys) == 1 and len(keys[0][0]) == 32
    salt = tmp_path / "work" / "salt"
    assert salt.stat().st_mode & 0o777 == 0o600
    kept = [path for folder in ("state", "work") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(kept) > 2 and not [path for path in kept if b"jane" in path.read_bytes()]
    # Parquet is compressed: what it holds is looked at as well
    (part,) = (tmp_path / "state").glob("*.parquet")
    assert "jane" not in str(pq.read_table(part).to_pylist())
    (entry,) = json.loads((tmp_path / "state" / "manifest.json").read_text())["parts"]
    assert len(entry["bad"]) == 3 and [text.split(": ")[0] for text in entry["examples"].values()] == [
        f"{log}:{line}" for line in (6, 7, 8)
    ]


def test_the_message_about_a_bad_row_masks_what_it_quotes(tmp_path):
    with (
        pytest.raises(UserError, match="broken|JSON") as caught,
        mined(tmp_path, ['{"u": "jane.doe@example.org", "p": "+49 30 1234567", ']),
    ):
        pass
    assert "[e-mail]" in str(caught.value) and "[phone]" in str(caught.value) and "jane" not in str(caught.value)

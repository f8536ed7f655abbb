"""Tomorrow's log only adds: whatever days a log is cut into, the dataset is the one of the whole log."""

import itertools
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mining import MORE, config_of, mined, removed, vote, write_log

from kto_dist.errors import UserError
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


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        columns = {name: column for name, column in MORE.items()}
        try:
            found = dataset(config_of(tmp_path, path, columns, input__state=str(tmp_path / "state"), **SETTINGS))
        except UserError as mistake:
            # an early day may lack a column, or leave no row; it was read all the same
            assert "no value in any row" in str(mistake) or "not one of" in str(mistake)
            found = None
        path.unlink()
    assert found == whole


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
    log = write_log(tmp_path / "log.jsonl", [vote(str(i), u="jane.doe@example.org", t=1, m="m") for i in range(5)])
    with mined(tmp_path, log, MORE, input__state=str(tmp_path / "state")) as connection:
        assert removed(connection) == {}
        keys = connection.execute("SELECT DISTINCT user_key FROM votes").fetchall()
    assert len(keys) == 1 and len(keys[0][0]) == 32
    salt = tmp_path / "work" / "salt"
    assert salt.stat().st_mode & 0o777 == 0o600
    kept = [path for folder in ("state", "work") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(kept) > 2 and not [path for path in kept if b"jane" in path.read_bytes()]
    assert json.loads((tmp_path / "state" / "manifest.json").read_text())["parts"]

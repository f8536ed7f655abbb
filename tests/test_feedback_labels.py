"""Votes and times in every dress have their meaning, and what has none is asked for."""

import unicodedata

import pytest
from mining import COLUMNS, mined, mistake, removed, rows_of, vote

from kto_dist.base.errors import UserError


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

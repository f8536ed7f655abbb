"""Every step of the cleaning does what it says, to whom it says, and nothing when it is turned off."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from mining import COLUMNS, MORE, config_of, mined, removed, rows_of, vote, write_log

from kto_dist.base.errors import UserError
from kto_dist.data.formats import BadRows
from kto_dist.data.sources import find_sources
from kto_dist.data.tokenise import read_rows
from kto_dist.feedback import mine
from kto_dist.feedback.output import publish

WHO = COLUMNS | {"user": "u"}
WHEN = WHO | {"time": "t"}
LONG = "An answer of many words that says a good deal about nothing in particular, and then goes on to say more. " * 3


def labels(connection):
    return {(q, a): label for q, a, label in rows_of(connection)}


# Duplicates


def test_a_users_same_vote_counts_once_and_other_users_votes_count(tmp_path):
    rows = [vote(u="a"), vote(u="a"), vote(" why? ", "because\n", u="a"), vote(u="b"), vote(u=None), vote(u=None)]
    with mined(tmp_path, rows, WHO) as connection:
        assert removed(connection) == {"exact_duplicate": 2}
        assert connection.execute("SELECT votes_up, users FROM examples").fetchall() == [(4, 2)]
    with mined(tmp_path, rows, WHO, clean__exact_duplicates=False) as connection:
        assert removed(connection) == {}
    with mined(tmp_path, rows, WHO, clean__normalise=False) as connection:
        assert removed(connection) == {"exact_duplicate": 1} and len(rows_of(connection)) == 2


def test_without_users_the_same_vote_at_the_same_time_counts_once(tmp_path):
    rows = [vote(t=1), vote(t=1), vote(t=2), vote(t=None), vote(t=None)]
    with mined(tmp_path, rows, COLUMNS | {"time": "t"}) as connection:
        assert removed(connection) == {"exact_duplicate": 1}


def test_votes_that_share_a_date_alone_are_as_many_as_they_are(tmp_path):
    rows = [vote(t=day) for day in ("20260131", "2026-01-31", "2026-01-31T00:00:00Z")]
    with mined(tmp_path, rows, COLUMNS | {"time": "t"}) as connection:
        assert removed(connection) == {}
        assert connection.execute("SELECT votes_up FROM examples").fetchall() == [(3,)]


def test_the_last_vote_of_a_user_on_an_answer_counts(tmp_path):
    cases = [
        ([("up", 2), ("down", 1)], True),
        ([("up", 1), ("down", 2)], False),
        ([("up", 1), ("down", 2), ("up", 3)], True),
        ([("up", None), ("down", None)], False),  # no time: the order in the log
        ([("down", None), ("up", None)], True),
        ([("up", 1), ("down", 1)], None),  # the same time: undecided
        ([("up", 1), ("down", None)], True),
    ]
    log = [vote(str(case), f=f, u="a", t=t) for case, (votes, _) in enumerate(cases) for f, t in votes]
    with mined(tmp_path, log, WHEN) as connection:
        found = labels(connection)
        assert [found.get((str(case), "because")) for case in range(len(cases))] == [label for _, label in cases]
        assert sum(removed(connection).values()) == len(log) - sum(label is not None for _, label in cases)
    with mined(tmp_path, log, WHEN, clean__last_vote_counts=False) as connection:
        assert "changed_mind" not in removed(connection)


def test_case_is_ignored_on_request(tmp_path):
    rows = [vote("Why?", "Because", u="a"), vote("why?", "because", u="a")]
    with mined(tmp_path, rows, WHO, clean__near_duplicates=None) as connection:
        assert len(rows_of(connection)) == 2
    with mined(tmp_path, rows, WHO, clean__ignore_case=True) as connection:
        assert len(rows_of(connection)) == 1


# Rules


RULES = {
    "empty": ["", "  \n", "\u00a0"],
    "error": ["Error 502: bad gateway", "Internal Server Error", '{"error": "x"}', "null",
              "An unexpected error occurred. Try again."],
    "refusal": ["I'm sorry, but I can't help with that.", "I cannot assist with this.",
                "As an AI language model, I cannot do it.", "Sorry, I am not able to."],
    "truncated": ["It was [truncated]", "and then <|truncated|>"],
    "script": ["Привет, как дела", "漢字です"],
    "length": ["a", "no"],
}  # fmt: skip


def test_a_rule_takes_what_it_describes_and_nothing_when_it_is_off(tmp_path):
    fine = [
        "I can't believe it worked: sorry is the hardest word.",
        "The error was 404 people strong, he said.",
        "1234",
    ]
    answers = [*fine, *(answer for taken in RULES.values() for answer in taken)]
    rows = [vote(str(i), answer, f, u=f"{f} {i}") for i, answer in enumerate(answers) for f in ("up", "down")]
    on = {"clean__scripts": ["Latin"], "clean__min_characters": 3, "clean__near_duplicates": None}
    on["agreement__conflicts"] = "keep"
    with mined(tmp_path, rows, WHO, **on) as connection:
        steps = connection.execute("SELECT step, label, removed FROM steps").fetchall()
        for step, taken in RULES.items():
            assert {(step, True, len(taken)), (step, False, len(taken))} <= set(steps)
        assert removed(connection) == {step: 2 * len(taken) for step, taken in RULES.items()} | {
            "conflict": 2 * len(fine)
        }
    for off in (
        {"clean__empty": False, "clean__errors": []},
        {"clean__refusals": [], "clean__truncated": []},
        {"clean__scripts": [], "clean__min_characters": 0},
    ):
        without = {name.removeprefix("clean__").rstrip("s").removeprefix("min_character") or "length" for name in off}
        with mined(tmp_path, rows, WHO, **(on | off)) as connection:
            assert removed(connection).keys() - {"conflict"} == RULES.keys() - without


def test_votes_on_empty_prompts_and_cut_answers_leave(tmp_path):
    rows = [vote(" ", "x", e="stop"), vote("q", "x", e="length"), vote("r", "x", e="stop")]
    with mined(tmp_path, rows, COLUMNS | {"finish": "e"}, clean__empty=False) as connection:
        assert removed(connection) == {"empty": 1, "truncated": 1} and len(rows_of(connection)) == 1
    with mined(tmp_path, rows, COLUMNS | {"finish": "e"}, clean__truncated_finish=[]) as connection:
        assert removed(connection) == {"empty": 1}


def test_a_pattern_that_is_none_is_told_before_the_log_is_read(tmp_path):
    wrong = (("refusals", ["(?=x)"]), ("errors", ["("]), ("scripts", ["Klingon"]), ("languages", ["klingon"]))
    for key, value in wrong:
        with (
            pytest.raises(UserError, match=f"clean.{key}"),
            mined(tmp_path, "missing.jsonl", **{f"clean__{key}": value}),
        ):
            pass


GERMAN = "Das ist ein ganz gewöhnlicher Satz, an dem man die Sprache gut erkennen kann."
ENGLISH = "This is quite an ordinary sentence, by which the language is easily told."


def test_answers_of_other_languages_leave_and_what_shows_none_stays(tmp_path):
    unclear = ["Yes.", "42", "for i in range(10):\n    print(np.sqrt(i))", "42 %"]
    rows = [vote(f"q{i}", answer) for i, answer in enumerate([GERMAN, ENGLISH, *unclear])]
    with mined(tmp_path, rows, clean__languages=["en", "fr"]) as connection:
        assert removed(connection) == {"language": 1}
        assert {answer for _, answer, _ in rows_of(connection)} == {ENGLISH, *unclear}
    with mined(tmp_path, rows, clean__languages=["de"]) as connection:
        assert ENGLISH not in {answer for _, answer, _ in rows_of(connection)}
    with mined(tmp_path, rows, clean__languages=["de", "en"]) as connection:
        assert removed(connection) == {}


# Near duplicates


def test_near_copies_of_an_answer_leave_and_the_one_with_most_votes_stays(tmp_path):
    near = [LONG, LONG + "!", LONG.replace("good deal", "good  DEAL")]
    rows = [vote("q", a, u=f"{a} {i}") for a, n in zip(near, (1, 3, 1), strict=True) for i in range(n)]
    rows += [
        vote("q", "Another answer altogether, of which no part is in the first one.", u="x"),
        vote("r", LONG, u="x"),
    ]
    with mined(tmp_path, rows, WHO) as connection:
        assert removed(connection) == {"near_duplicate": 2}
        assert {a for q, a, _ in rows_of(connection) if q == "q"} == {near[1], rows[-2]["a"]}
    with mined(tmp_path, rows, WHO, clean__near_duplicates=None) as connection:
        assert removed(connection) == {}
    with mined(tmp_path, rows, WHO, clean__near_duplicate_scope="log") as connection:
        assert removed(connection) == {"near_duplicate": 3}


def test_in_a_chain_of_near_copies_nothing_leaves_without_one_that_stays(tmp_path):
    words = [f"word{i:02}" for i in range(90)]
    chain = [" ".join([*(f"other{i:02}" for i in range(8 * k)), *words[8 * k :]]) for k in range(3)]
    one, two, three = map(shingles, chain)
    assert min(len(one & two) / len(one | two), len(two & three) / len(two | three)) > 0.8
    assert len(one & three) / len(one | three) < 0.72
    rows = [vote("q", text, u=f"{k} {i}") for k, text in enumerate(chain) for i in range(3 - k)]
    with mined(tmp_path, rows, WHO, clean__near_duplicates=0.8) as connection:
        assert {a for _, a, _ in rows_of(connection)} == {chain[0], chain[2]}


def shingles(text):
    data = text.encode() + bytes(7)
    return {data[i : i + 8] for i in range(len(text.encode()))}


def test_near_duplicates_are_those_of_the_exact_similarity(tmp_path):
    """All pairs well above the threshold are found, and none well below it is."""
    generator = random.Random(3)
    words = [f"word{i}" for i in range(300)]
    rows, similar = [], {}
    for prompt in range(150):
        base = generator.choices(words, k=40)
        edited = list(base)
        for place in generator.sample(range(40), generator.randrange(9)):
            edited[place] = generator.choice(words)
        one, other = " ".join(base), " ".join(edited) + " end"
        a, b = shingles(one), shingles(other)
        similar[str(prompt)] = len(a & b) / len(a | b)
        rows += [vote(str(prompt), one), vote(str(prompt), other)]
    with mined(tmp_path, rows, clean__near_duplicates=0.8) as connection:
        kept = connection.execute("SELECT prompt, count(*) FROM examples JOIN texts USING (vote) GROUP BY 1").fetchall()
    found = {json.loads(prompt)[0]["content"] for prompt, count in kept if count == 1}
    assert {p for p, s in similar.items() if s > 0.92} <= found <= {p for p, s in similar.items() if s > 0.68}
    assert 10 < len(found) < 140


# Users


def test_the_cap_leaves_each_user_so_many_votes(tmp_path):
    rows = [vote(f"q{i}", f"a{i}", u="busy") for i in range(20)] + [vote(f"r{i}", "a", u="calm") for i in range(3)]
    with mined(tmp_path, rows, WHO, users__max_votes=5) as connection:
        assert removed(connection) == {"user_cap": 15}
        first = rows_of(connection)
    random.Random(0).shuffle(rows)
    with mined(tmp_path, rows, WHO, users__max_votes=5) as connection:
        assert rows_of(connection) == first


def expected_weights(counts, *, volume, bias, prior, fair):
    """The formula of users.py, in plain Python: user -> (weight of ups, weight of downs)."""
    sizes = {user: min(1.0, fair / (up + down)) ** volume for user, (up, down) in counts.items()}
    total = sum(sizes[user] * (up + down) for user, (up, down) in counts.items())
    p = sum(sizes[user] * up for user, (up, _) in counts.items()) / total
    weights = {}
    for user, (up, down) in counts.items():
        own = (up + prior * p) / (up + down + prior)
        weights[user] = tuple(
            sizes[user] * min(1.0, everyone / theirs) ** bias for everyone, theirs in ((p, own), (1 - p, 1 - own))
        )
    return weights


@pytest.mark.parametrize(
    ("volume", "bias", "prior", "fair"),
    [(0.5, 1.0, 10.0, None), (1.0, 0.5, 2.5, None), (0.0, 1.0, 10.0, None), (0.0, 0.0, 1.0, None), (0.5, 1.0, 10.0, 7)],
)
def test_weights_are_those_of_the_formula(tmp_path, volume, bias, prior, fair):
    counts = {"a": (8, 2), "b": (1, 29), "c": (3, 2), "d": (50, 10), "e": (1, 0)}
    rows = [
        vote(f"{user} {f} {i}", "a", f, u=user)
        for user, both in counts.items()
        for f, n in zip(("up", "down"), both, strict=True)
        for i in range(n)
    ]
    options = {"users__volume": volume, "users__bias": bias, "users__prior_votes": prior, "users__hash_ids": False}
    with mined(tmp_path, rows, WHO, **options, users__fair_votes=fair) as connection:
        found = connection.execute("SELECT DISTINCT user_key, label, weight FROM votes").fetchall()
        assert connection.execute("SELECT count(*), count(DISTINCT vote) FROM votes").fetchone() == (len(rows),) * 2
        assert connection.execute("SELECT sum(votes_up + votes_down) FROM examples").fetchone() == (len(rows),)
    # the median user has 10 votes
    wanted = expected_weights(counts, volume=volume, bias=bias, prior=prior, fair=fair or 10)
    assert len(found) == 9
    for user, label, weight in found:
        assert weight == pytest.approx(wanted[user][0 if label else 1], rel=1e-6)


# Conflicts


@pytest.mark.parametrize(
    ("conflicts", "cases"),
    [
        ("majority", [(3, 0, True, 1.0), (2, 1, True, 1.0), (1, 4, False, 1.0), (1, 1, None, None), (0, 1, False, 1.0),
                      (3, 2, None, None)]),  # the margin
        ("drop", [(4, 1, None, None), (4, 0, True, 1.0)]),
        ("keep", [(4, 1, True, 0.6), (1, 3, False, 0.5), (2, 2, None, None)]),
    ],
)  # fmt: skip
def test_conflicts_end_as_the_config_says(tmp_path, conflicts, cases):
    rows = [
        vote(f"{up} {down}", f=f, u=f"{up} {down} {f} {i}")
        for up, down, _, _ in cases
        for f, count in (("up", up), ("down", down))
        for i in range(count)
    ]
    losers = sum(down if label else up if label is not None else up + down for up, down, label, _ in cases)
    with mined(tmp_path, rows, WHO, agreement__conflicts=conflicts, users__bias=0) as connection:
        found = connection.execute("SELECT votes_up, votes_down, label, weight FROM examples").fetchall()
        assert removed(connection) == {"conflict": losers}
    assert sorted(found) == sorted(
        (up, down, label, pytest.approx(weight)) for up, down, label, weight in cases if label is not None
    )


# Splits and balance


def split_of(connection):
    return dict(connection.execute("SELECT prompt_key::VARCHAR, split FROM examples").fetchall())


def test_no_prompt_is_in_both_splits_and_none_moves_as_the_log_grows(tmp_path):
    generator = random.Random(0)
    rows = [
        vote(f"prompt {generator.randrange(900)}", f"a{i}", generator.choice(["up", "down", "down"]))
        for i in range(3000)
    ]
    options = {"split__heldout": 0.2, "clean__near_duplicates": None}
    with mined(tmp_path, rows[:900], **options) as connection:
        before = split_of(connection)
    with mined(tmp_path, rows, **options) as connection:
        after = split_of(connection)
        both = "SELECT count(*) FROM (SELECT prompt_key FROM examples GROUP BY 1 HAVING count(DISTINCT split) > 1)"
        assert connection.execute(both).fetchone() == (0,)
        shares = connection.execute("SELECT label, avg((split = 'heldout')::INT) FROM examples GROUP BY 1").fetchall()
    # held-out rows may be left away (stratify), but nothing changes sides
    moved = {prompt for prompt, split in before.items() if after.get(prompt, split) != split}
    assert not moved and len(after) > len(before)
    trained = {prompt for prompt, split in before.items() if split == "train"}
    assert trained <= after.keys()
    # 900 prompts: three standard deviations are 0.04
    assert len(shares) == 2 and all(abs(share - 0.2) < 0.04 for _, share in shares)
    with mined(tmp_path, rows, **options, split__seed=1) as connection:
        assert split_of(connection) != after


def by_split(connection):
    found = connection.execute(
        "SELECT split, count(*) FILTER (label), count(*) FILTER (NOT label) FROM examples GROUP BY 1"
    ).fetchall()
    return {split: (up, down) for split, up, down in found}


@pytest.mark.parametrize("up_share", [0.1, 0.5, 0.9])
def test_the_held_out_classes_stand_as_in_training(tmp_path, up_share):
    generator = random.Random(1)
    rows = [vote(f"q{i}", "a", "up" if generator.random() < up_share else "down") for i in range(600)]
    options = {"split__heldout": 0.2, "split__seed": 3}
    with mined(tmp_path, rows, **options, split__stratify=False) as connection:
        plain, everything = by_split(connection), rows_of(connection)
    with mined(tmp_path, rows, **options) as connection:
        found = by_split(connection)
        took = connection.execute("SELECT label, removed FROM steps WHERE step = 'stratify'").fetchall()
    assert len(everything) == 600 and found["train"] == plain["train"]
    (up, down), (all_up, all_down), (train_up, train_down) = found["heldout"], plain["heldout"], plain["train"]
    # as near as whole rows come to it, and one class is whole
    assert abs(up - down * train_up / train_down) <= 0.5 or abs(down - up * train_down / train_up) <= 0.5
    assert (up, down) != (all_up, all_down) and (up == all_up or down == all_down)
    assert dict(took) == {True: all_up - up, False: all_down - down}


def test_a_class_that_is_held_out_nowhere_takes_no_other_along(tmp_path):
    rows = [vote(f"q{i}", "a", "up") for i in range(100)] + [vote("q0", "b", "down")]
    for seed in range(3):
        with mined(tmp_path, rows, split__heldout=0.3, split__seed=seed) as connection:
            assert sum(map(sum, by_split(connection).values())) == 101


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_sampling_reaches_the_stated_ratio_and_takes_one_class_alone(tmp_path, target):
    rows = [vote(f"q{i}", "a", "up" if i % 2 else "down") for i in range(200)]
    with mined(tmp_path, rows, balance__target_up_share=target) as connection:
        ups, n = connection.execute("SELECT count(*) FILTER (label), count(*) FROM examples").fetchone()
        assert ups / n == pytest.approx(target, abs=0.005)
        assert max(ups, n - ups) == 100
        assert connection.execute("SELECT count(*) FROM votes WHERE removed = 'balance'").fetchone() == (200 - n,)


# Output

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

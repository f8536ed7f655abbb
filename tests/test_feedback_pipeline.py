"""Every step of the cleaning does what it says, to whom it says, and nothing when it is turned off."""

import json
import random

import pytest
from mining import COLUMNS, mined, removed, rows_of, vote

from kto_dist.base.errors import UserError

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
        ("soft", [(4, 1, 0.8, 1.0), (1, 3, 0.25, 1.0), (2, 2, 0.5, 1.0), (2, 0, 1.0, 1.0), (0, 1, 0.0, 1.0)]),
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
    wanted = {"conflict": losers}
    if conflicts == "soft":  # all votes count
        wanted = {}
    with mined(tmp_path, rows, WHO, agreement__conflicts=conflicts, users__bias=0) as connection:
        found = connection.execute("SELECT votes_up, votes_down, probability, weight FROM examples").fetchall()
        assert removed(connection) == wanted
        # what the steps after it count by
        assert connection.execute("SELECT bool_and(label = (probability >= 0.5)) FROM examples").fetchone() == (True,)
    assert sorted(found) == sorted(
        (up, down, label, pytest.approx(weight)) for up, down, label, weight in cases if label is not None
    )

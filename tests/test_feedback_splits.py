"""No prompt is in both splits, and balance and stratify take of them what they say."""

import random

import pytest
from mining import mined, removed, rows_of, vote

from kto_dist.base.errors import UserError


def by_split(connection):
    found = connection.execute(
        "SELECT split, count(*) FILTER (label), count(*) FILTER (NOT label) FROM examples GROUP BY 1"
    ).fetchall()
    return {split: (up, down) for split, up, down in found}


@pytest.mark.parametrize("up", [True, False])
def test_a_target_ratio_on_rows_of_one_class_is_an_error_and_takes_nothing(tmp_path, up):
    rows = [vote(f"q{number}", "a", "up" if up else "down") for number in range(50)]
    stated = rf"balance.target_up_share \(0.4\) needs .* 50 to train on are all thumbs {'up' if up else 'down'}: leave"
    with pytest.raises(UserError, match=stated), mined(tmp_path, rows, balance__target_up_share=0.4):
        pass


def test_a_target_ratio_on_a_held_out_class_alone_is_an_error_that_names_the_split(tmp_path):
    rows = [vote(f"q{number}", "a", "up") for number in range(100)] + [vote("more", "b", "down")]
    options = {"split__heldout": 0.2, "balance__target_up_share": 0.5}
    with (
        pytest.raises(UserError, match="held out are all thumbs up: leave it out .*split.heldout"),
        mined(tmp_path, rows, **options),
    ):
        pass


def test_a_ratio_that_no_whole_row_reaches_leaves_one_of_the_rarer_class(tmp_path):
    rows = [vote(f"q{number}", "a", "up" if number == 0 else "down") for number in range(20)]
    with mined(tmp_path, rows, balance__target_up_share=0.001) as connection:
        assert by_split(connection) == {"train": (1, 19)}


@pytest.mark.parametrize("common", ["up", "down"])
def test_stratify_leaves_at_least_half_of_the_held_out_rows(tmp_path, common):
    rare = {"up": "down", "down": "up"}[common]
    rows = [vote(f"q{number}", "a", common) for number in range(400)]
    rows += [vote(f"rare {number}", "a", rare) for number in range(12)]
    options = {"split__heldout": 0.2, "clean__near_duplicates": None}
    seen = set()
    for seed in range(6):
        with mined(tmp_path, rows, **options, split__seed=seed, split__stratify=False) as connection:
            plain = by_split(connection)
        with mined(tmp_path, rows, **options, split__seed=seed) as connection:
            found = by_split(connection)
            taken = removed(connection).get("stratify", 0)
        held, trained = sum(plain["heldout"]), plain["train"]
        left = sum(found["heldout"])
        assert left == held - taken and 2 * left >= held and found["train"] == trained
        few, many = sorted(plain["heldout"])
        wanted = round(few * max(trained) / min(trained))
        if few and few + wanted < held / 2:
            # as near as half of the rows allows
            assert sorted(found["heldout"]) == [few, (held + 1) // 2 - few]
            seen.add("stopped")
        elif few and wanted < many:
            assert sorted(found["heldout"]) == [few, wanted]
            seen.add("reached")
    assert "stopped" in seen


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

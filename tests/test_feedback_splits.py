"""Which answers the language step takes, and which rows balance and stratify take of a split."""

import random

import pytest
from mining import mined, removed, rows_of, vote

from kto_dist.base.errors import UserError
from kto_dist.feedback.language import check_languages

GERMAN = "Die Schleife läuft über alle Zahlen und gibt jede von ihnen aus."
CODE = """
def total(numbers):
    \"\"\"Add all of the numbers that are given to this function, and return what comes of it.\"\"\"
    result = 0
    for number in numbers:
        # skip the ones which are missing
        if number is not None:
            result += number
    return result
"""


def kept(folder, answers, languages):
    rows = [vote(f"q{number}", answer) for number, answer in enumerate(answers)]
    with mined(folder, rows, clean__languages=languages) as connection:
        return {answer for _, answer, _ in rows_of(connection)}


def test_numbers_and_digests_stay_whatever_language_is_wanted(tmp_path):
    numbers = ", ".join(str(number**3) for number in range(40, 90))
    digests = " ".join(f"{random.Random(number).getrandbits(128):032x}" for number in range(8))
    assert kept(tmp_path, [GERMAN, numbers, digests], ["de"]) == {GERMAN, numbers, digests}


@pytest.mark.parametrize("fenced", ["```python{}```", "  ```{}  ```\n", "```{}"])
def test_an_answer_is_of_the_language_of_its_prose_and_not_of_its_fenced_code(tmp_path, fenced):
    block = fenced.format(CODE * 3)
    prose, english = f"{GERMAN}\n\n{block}", f"This is how one adds them, which is quite simple.\n{block}"
    assert kept(tmp_path, [prose, block, english], ["de"]) == {prose, block}


def test_what_follows_a_closed_fence_counts_as_prose(tmp_path):
    english = "Here the loop goes over all of the numbers, and adds each one that is there to the result."
    answers = [f"```{CODE}```\n{text}" for text in (GERMAN, english)]
    assert kept(tmp_path, answers, ["de"]) == {answers[0]}


def test_backticks_within_a_line_are_no_fence(tmp_path):
    english = "Use ``` before and after the code, and it will be shown as it is by every program that reads this."
    assert kept(tmp_path, [GERMAN, english], ["de"]) == {GERMAN}


def test_the_error_names_every_code_that_can_be_told_apart_and_no_pseudo_language(tmp_path):
    for code in ("klingon", "zxx"):
        with pytest.raises(UserError, match=f"clean.languages \\({code}\\)") as raised:
            check_languages((code,))
        codes = str(raised.value).split("some of ")[1].split(", ")
        assert {"de", "zh", "yue", "wuu", "ar", "arz", "ary"} <= set(codes) and "zxx" not in codes
    check_languages(("zh", "yue"))


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

"""Which answers the language step takes."""

import random

import pytest
from mining import mined, rows_of, vote

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

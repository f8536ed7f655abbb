"""One vocabulary: what a word means, training and mining say alike."""

import json

import pytest

from kto_dist.base.vocabulary import DOWN, ROLES, UP, plain, role_of, thumb_of
from kto_dist.data.formats import BadRows, read_rows
from kto_dist.data.sources import find_sources
from kto_dist.feedback.config import ColumnsConfig, InputConfig, MiningConfig
from kto_dist.feedback.labels import meaning_of


def test_training_and_mining_give_every_word_the_same_meaning(tmp_path):
    words = [*UP, *DOWN, "Liked", "thumbsUp", ":thumbs_up:", ":+1::skin-tone-3:", "👎🏿", " Not-Helpful ", "accepted"]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"prompt": "q", "completion": "a", "label": word}) + "\n" for word in words))
    rows = read_rows(find_sources([str(log)]), on_bad_row="error", bad=BadRows())
    columns = ColumnsConfig(prompt="prompt", response="completion", feedback="label")
    mined = meaning_of(MiningConfig(input=InputConfig(files=(str(log),)), columns=columns))
    expected = [*[True] * len(UP), *[False] * len(DOWN), True, True, True, True, False, False, True]
    assert [row.desirable for row in rows] == [mined(word) for word in words] == expected


def test_no_word_is_both():
    assert not {*map(plain, UP)} & {*map(plain, DOWN)}


@pytest.mark.parametrize("word", ["", "meh", "2", "up down", "+", "::", "thumbs"])
def test_a_word_of_no_table_means_nothing(word):
    assert thumb_of(word) is None


def test_roles_are_known_in_any_case():
    assert {role_of(f" {name.upper()} ") for name in ROLES} == {"system", "developer", "user", "assistant", "tool"}
    assert role_of("wizard") is None

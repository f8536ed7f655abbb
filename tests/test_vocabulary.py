"""One vocabulary: what a word means, training and mining say alike."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_dist.base.vocabulary import DOWN, MINED, ROLES, UP, plain, role_of, thumb_of
from kto_dist.data.formats import BadRows, read_rows
from kto_dist.data.records import unread
from kto_dist.data.sources import find_sources
from kto_dist.feedback.config import ColumnsConfig, InputConfig, MiningConfig
from kto_dist.feedback.labels import meaning_of


def test_training_and_mining_give_every_word_the_same_meaning(tmp_path):
    words = [*UP, *DOWN, "Liked", "thumbsUp", ":thumbs_up:", ":+1::skin-tone-3:", "👎🏿", " Not-Helpful ", "accepted"]
    log, rows = tmp_path / "log.jsonl", []
    for word in words:  # a log each: a column with 0 beside -1 is refused
        log.write_text(json.dumps({"prompt": "q", "completion": "a", "label": word}) + "\n")
        rows += read_rows(find_sources([str(log)]), on_bad_row="error", bad=BadRows())
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


def test_the_columns_that_mining_writes_beside_its_rows_are_no_strangers_to_training(tmp_path):
    rows = {"prompt": ["a"], "completion": ["b"], "label": [True], "odd": [1], **{name: [1] for name in MINED}}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    (source,) = find_sources([str(tmp_path / "train.parquet")])
    assert unread(source, ["prompt", "completion", "label"]) == {"odd": 1}

"""A tokenised row knows its file and line, whether another one contradicts it, and what figures are told apart by."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer, write_jsonl

from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import Examples, load
from kto_dist.data.processes import Chunking
from kto_dist.data.sources import places_of
from kto_dist.data.tokenise import prepare
from kto_dist.evaluation.slices import NOTHING, languages, slices_of


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"ask {number}", "completion": f"say {number}", "label": number % 2 == 0, **more}


def tokenised(folder: Path, train: Any, **settings: Any) -> tuple[DataConfig, Examples, Examples | None]:
    data = DataConfig(train=train, cache=str(folder / "cache"), workers=1, **settings)
    rows, apart = prepare(data, tiny_tokenizer(), chunking=Chunking(rows=3, alone=1))
    return data, load(rows), None if apart is None else load(apart)


def test_every_row_is_found_again_in_its_file(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [row(0), row(1)])
    first.write_text("\n" + first.read_text())  # a blank line counts
    table = tmp_path / "second.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([row(2), row(3)]), table)
    packed = tmp_path / "third.jsonl.gz"
    packed.write_bytes(gzip.compress(b"".join(json.dumps(row(number)).encode() + b"\n" for number in (4, 5))))
    pair = write_jsonl(tmp_path / "pair.jsonl", [{"prompt": "ask 6", "chosen": "good", "rejected": "bad"}])
    data, rows, _ = tokenised(tmp_path, {"a": [str(first), str(table)], "b": [str(packed), str(pair)]})
    found = places_of(data.train_sources, [rows.place(number) for number in range(len(rows))])
    assert dict(zip([rows.prompt_text(number) for number in range(6)], found, strict=False)) == {
        "ask 0": f"{first}:2",
        "ask 1": f"{first}:3",
        "ask 2": f"{table}:row 1",
        "ask 3": f"{table}:row 2",
        "ask 4": f"{packed}:1",
        "ask 5": f"{packed}:2",
    }
    assert found[6:] == [f"{pair}:1"] * 2


def test_rows_that_were_held_out_keep_their_places(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [row(number) for number in range(40)])
    data, train, heldout = tokenised(tmp_path, str(log), heldout=0.3)
    assert heldout is not None
    for rows in (train, heldout):
        found = places_of(data.train_sources, [rows.place(number) for number in range(len(rows))])
        asked = [int(rows.prompt_text(number).split()[1]) for number in range(len(rows))]
        assert found == [f"{log}:{number + 1}" for number in asked]


def test_the_same_rows_of_a_copy_are_found_in_the_copy(tmp_path: Path) -> None:
    """They are tokenised once, by content."""
    log = write_jsonl(tmp_path / "log.jsonl", [row(0), row(1)])
    tokenised(tmp_path, str(log))
    copy = tmp_path / "copy.jsonl"
    log.rename(copy)
    data, rows, _ = tokenised(tmp_path, str(copy))
    assert places_of(data.train_sources, [rows.place(1)]) == [f"{copy}:2"]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_rows_with_a_twin_of_the_other_label_are_known_whatever_their_weights(tmp_path: Path) -> None:
    twins = [row(0), {**row(0), "label": False, "weight": 0.5}, row(1), row(1), row(2)]
    _, rows, _ = tokenised(tmp_path, str(write_jsonl(tmp_path / "log.jsonl", twins)))
    assert rows.contradicted.tolist() == [True, True, False, False, False]
    assert rows.report.contradictions == rows.contradicted.sum()


def test_held_out_rows_keep_language_model_and_the_columns_that_are_named(tmp_path: Path) -> None:
    more = {"lang": "de", "models": ["b", "a"], "meta": {"team": 7}, "topic": "x" * 90, "unread": "z"}
    rows = [row(0, **more), row(1, lang="en", topic=None)]
    apart = write_jsonl(tmp_path / "apart.jsonl", rows)
    log = write_jsonl(tmp_path / "log.jsonl", [row(2, **more), row(3)])
    _, train, heldout = tokenised(tmp_path, str(log), heldout=str(apart), slices=["topic", "/meta/team"])
    assert heldout is not None
    assert {name: values.tolist() for name, values in heldout.cuts().items()} == {
        "topic": ["x" * 57 + "...", ""],
        "/meta/team": ["7", ""],
        "language": ["de", "en"],
        "model": ["a, b", ""],
    }
    assert list(heldout.report.unused) == ["unread"]
    # nothing is told of training rows
    assert train.cuts() == {} and set(train.report.unused) == {"lang", "models", "meta", "topic", "unread"}


def test_a_parquet_file_gives_the_same_slices(tmp_path: Path) -> None:
    table = tmp_path / "rows.parquet"
    rows = [row(number, models=["v1" if number < 2 else "v2"], topic=number) for number in range(4)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), table)
    _, found, _ = tokenised(tmp_path, str(table), slices=["topic"])
    assert slices_of(found, ["rows"])["model"].tolist() == ["v1", "v1", "v2", "v2"]
    assert slices_of(found, ["rows"])["topic"].tolist() == ["0", "1", "2", "3"]


def test_a_column_that_no_row_has_is_a_mistake(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [row(0), row(1)])
    with pytest.raises(UserError, match=r"data.slices \(topik\): no held-out row has a value there"):
        tokenised(tmp_path, str(log), slices=["topik"])


def test_a_column_with_one_value_is_no_slice_and_a_row_without_one_is_named_so(tmp_path: Path) -> None:
    rows = [row(0, lang="en", model="m"), row(1, model="m"), row(2, lang="de", model="m")]
    _, found, _ = tokenised(tmp_path, str(write_jsonl(tmp_path / "log.jsonl", rows)))
    slices = slices_of(found, ["log"])
    assert set(slices) == {"prompt", "language"} and slices["language"].tolist() == ["en", NOTHING, "de"]


ENGLISH = "The weather was cold this morning, so we stayed at home and read the newspaper together."
GERMAN = "Das Wetter war heute Morgen kalt, deshalb blieben wir zu Hause und lasen gemeinsam die Zeitung."


def test_where_no_column_has_the_language_the_answers_tell_it(tmp_path: Path) -> None:
    said = [ENGLISH, GERMAN, ENGLISH, "```\nprint(1)\n```", "42"]
    rows = [{**row(number), "completion": text} for number, text in enumerate(said)]
    _, found, _ = tokenised(tmp_path, str(write_jsonl(tmp_path / "log.jsonl", rows)))
    assert languages(found).tolist() == ["en", "de", "en", "", ""]
    assert slices_of(found, ["log"])["language"].tolist() == ["en", "de", "en", NOTHING, NOTHING]


def test_one_language_and_what_is_none_are_not_told_apart(tmp_path: Path) -> None:
    rows = [{**row(number), "completion": text} for number, text in enumerate([ENGLISH, ENGLISH, "42"])]
    _, found, _ = tokenised(tmp_path, str(write_jsonl(tmp_path / "log.jsonl", rows)))
    assert not np.char.str_len(languages(found)).any() and "language" not in slices_of(found, ["log"])

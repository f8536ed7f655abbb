"""Files, folders, globs, saved datasets and hub names lead to their records, or to an error that names them."""

import gzip
import json

import datasets
import pytest
from thumbs_logs import ANSWER, CHAT_ROW, GOOD, TEXT_ROW, USER, content, read, write

from kto_dist.base.errors import UserError
from kto_dist.data.sources import find_sources


def test_a_json_array_has_the_rows_and_lines_of_its_elements(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "prompt": "there"}], indent=2))
    rows = read(path)
    assert [(row.prompt, row.source) for row in rows] == [("hi", f"{path}:2"), ("there", f"{path}:7")]


def test_a_cut_json_array_is_an_error_at_its_line(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=2)[:-2])
    with pytest.raises(UserError, match=r"log\.json:11: the JSON array is broken"):
        read(path)


def test_compressed_and_marked_files_read_like_plain_ones(tmp_path):
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    names = ("log.jsonl.gz", "marked.jsonl", "marked.json")
    assert content(read(*(tmp_path / name for name in names))) == [TEXT_ROW] * 3


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-9])
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and nothing else")
    for name in ("log.jsonl.gz", "log.parquet"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read(tmp_path / name, on_bad_row="skip")


def test_a_folder_and_a_pattern_have_the_rows_of_their_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", {**GOOD, "prompt": "2"})
    write(tmp_path / "a.jsonl", {**GOOD, "prompt": "1"})
    write(tmp_path / "notes.json", {"no": "log"})
    assert [row.prompt for row in read(tmp_path)] == ["1", "2"]
    assert [row.prompt for row in read(tmp_path / "*.jsonl")] == ["1", "2"]


def test_a_saved_dataset_reads_like_its_records(tmp_path):
    datasets.Dataset.from_list([{"prompt": [USER], "completion": [ANSWER], "label": True}]).save_to_disk(tmp_path / "d")
    [row] = read(tmp_path / "d")
    assert content([row]) == [CHAT_ROW]
    assert row.source == f"{tmp_path / 'd'}:row 1"


def test_a_saved_dataset_of_splits_gives_the_one_that_is_named(tmp_path):
    splits = {name: datasets.Dataset.from_list([{**GOOD, "prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert [row.prompt for row in read(tmp_path / "d", f"{tmp_path / 'd'}:test")] == ["train", "test"]
    with pytest.raises(UserError, match=r"no split 'dev'.*train, test"):
        read(f"{tmp_path / 'd'}:dev")


def test_a_hub_name_is_loaded_with_its_split(tmp_path, monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("owner/thumbs", "owner/thumbs:test[:10]")
    assert asked == [("owner/thumbs", "train"), ("owner/thumbs", "test[:10]")]
    assert content(rows) == [TEXT_ROW] * 2


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(monkeypatch):
    def load(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"neither a file nor a folder here.*hub dataset 'owner/thumbs'.*no network"):
        find_sources(["owner/thumbs"])


@pytest.mark.parametrize("name", ["data/log.jsonl", "./data/log", "../data", "log.parquet", "log", "data/*.jsonl"])
def test_a_missing_file_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"does not exist|no file matches"):
        find_sources([str(tmp_path / name) if name == "../data" else name])


@pytest.mark.parametrize(
    "name, text, match",
    [("log.txt", "a,b", "type of the file"), ("log.jsonl", "\n", "no rows"), ("log.csv", "prompt,label\n", "no rows")],
)
def test_a_file_that_cannot_hold_rows_is_an_error(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        read(tmp_path / name, on_bad_row="skip")


def test_a_folder_without_logs_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.parquet"):
        find_sources([str(tmp_path)])


def test_a_digest_is_of_the_content_and_not_of_the_name(tmp_path):
    paths = [write(tmp_path / name, GOOD) for name in ("a.jsonl", "b.jsonl")]
    longer = write(tmp_path / "c.jsonl", GOOD, GOOD)
    first, copy, other = (source.digest() for source in find_sources([*paths, longer]))
    assert first == copy != other


def test_slices_of_one_split_have_different_digests(tmp_path, monkeypatch):
    datasets.Dataset.from_list([GOOD, GOOD]).save_to_disk(tmp_path / "d")
    whole = datasets.load_from_disk(tmp_path / "d")
    splits = {"train": whole, "train[:1]": whole.select([0])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    first, again, part = (s.digest() for s in find_sources(["a/b", "a/b:train", "a/b:train[:1]"]))
    assert first == again != part

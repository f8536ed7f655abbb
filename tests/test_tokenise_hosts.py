"""Hosts that see one cache share a log's files out, and leave what one host alone would have made."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from ranks import run_ranks
from tiny import thumbs, tiny_tokenizer, write_jsonl
from tiny_runs import tiny_config

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data import tokenise
from kto_dist.data.config import DataConfig
from kto_dist.data.pieces import Hosts, share_out
from kto_dist.data.tokenise import ahead, prepare, tokenizer_fingerprint
from kto_dist.training import prepare as training

TOKENIZER = tiny_tokenizer()
FINGERPRINT = tokenizer_fingerprint(TOKENIZER)


def log_of(folder: Path, files: int = 4) -> str:
    """Rows, pairs, rows that cannot be read and columns that nothing reads, in files of several lengths."""
    for number in range(files):
        rows: list[dict[str, object]] = [*thumbs(10 + 7 * number, 4, seed=number)]
        rows += [{"prompt": "a b", "completion": "c", "label": "perhaps"}, {**rows[0], "mood": "good"}]
        write_jsonl(folder / f"{number}.jsonl", rows)
    pairs = [{"prompt": f"a {word}", "chosen": f"{word} b", "rejected": f"{word} e"} for word in "cdgh"]
    for name in ("0-pairs", "3-pairs"):
        write_jsonl(folder / f"{name}.jsonl", pairs)
    return str(folder)


def data_of(folder: Path, cache: str, **changes: object) -> DataConfig:
    given = {"train": str(folder / "log"), "cache": str(folder / cache), "workers": 1, "on_bad_row": "skip"}
    return DataConfig(**{**given, **changes})


def made(folders: tuple[Path, Path | None]) -> list[tuple[pa.Table, dict[str, object]]]:
    found = []
    for folder in folders:
        if folder is not None:
            table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all().combine_chunks()
            about = json.loads((folder / "about.json").read_text())
            found.append((table, {key: about[key] for key in ("fingerprint", "report")}))
    return found


def read_nothing(*_: object, **__: object) -> None:
    raise AssertionError("a file was read again")


@pytest.mark.parametrize("heldout", [None, 0.3])
def test_what_hosts_have_made_ahead_is_put_together_and_no_file_is_read_again(tmp_path, monkeypatch, heldout):
    log_of(tmp_path / "log")
    alone = made(prepare(data_of(tmp_path, "alone", heldout=heldout), TOKENIZER))
    shared = data_of(tmp_path, "shared", heldout=heldout)
    for number in range(3):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3))
    assert len(list(Path(shared.cache).iterdir())) == 3
    monkeypatch.setattr(tokenise, "read_some", read_nothing)
    together = made(prepare(shared, TOKENIZER, hosts=3))
    for (expected, about), (found, own) in zip(alone, together, strict=True):
        assert found.equals(expected) and own == about
    assert len(alone) == (1 if heldout is None else 2) and alone[0][1]["report"]["skipped"]["unknown label"] == 4
    # the pieces are gone, and a host that comes later finds the whole
    assert [folder.name for folder in Path(shared.cache).iterdir() if folder.name.startswith(".")] == []
    ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=0, count=3))
    assert len(list(Path(shared.cache).iterdir())) == 1


@pytest.mark.parametrize("there", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_files_of_pieces_that_are_not_seen_are_read(tmp_path, there):
    """As where hosts have caches of their own, or a host has died."""
    log_of(tmp_path / "log")
    ((expected, about),) = made(prepare(data_of(tmp_path, "alone"), TOKENIZER))
    shared = data_of(tmp_path, "shared")
    for number in there:
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3))
    ((found, own),) = made(prepare(shared, TOKENIZER, hosts=3))
    assert found.equals(expected) and own == about


@pytest.mark.parametrize("name", ["rows.arrow", "digests", "contents", "../piece.json"])
def test_a_damaged_piece_is_not_believed(tmp_path, name):
    log_of(tmp_path / "log")
    ((expected, about),) = made(prepare(data_of(tmp_path, "alone"), TOKENIZER))
    shared = data_of(tmp_path, "shared")
    for number in range(2):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=2))
    for piece in Path(shared.cache).iterdir():
        file = piece / "rows" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    ((found, own),) = made(prepare(shared, TOKENIZER, hosts=2))
    assert found.equals(expected) and own == about


def test_a_column_that_one_hosts_files_lack_is_no_mistake_and_one_that_all_lack_is(tmp_path):
    log_of(tmp_path / "log")
    for columns, wrong in (({"weight": "mood"}, None), ({"system": "nowhere"}, "no row has such a column")):
        data = data_of(tmp_path, f"cache-{wrong}", columns=columns)
        for number in range(2):
            ahead(data, TOKENIZER, FINGERPRINT, Hosts(number=number, count=2))
        if wrong is None:
            prepare(data, TOKENIZER, hosts=2)
            continue
        with pytest.raises(UserError, match=wrong):
            prepare(data, TOKENIZER, hosts=2)


def test_files_are_shared_out_as_neighbours_of_about_equal_weight():
    assert share_out([5, 1, 1, 5], 2) == [range(2), range(2, 4)]
    assert share_out([10, 10, 10], 3) == [range(1), range(1, 2), range(2, 3)]
    assert share_out([100, 1], 3) == [range(0), range(1), range(1, 2)]
    for sizes in ([1], [0, 0], [3, 9, 1, 1, 1, 30, 2]):
        for count in (1, 2, 5):
            shares = share_out(sizes, count)
            assert len(shares) == count and [place for share in shares for place in share] == [*range(len(sizes))]


def _rows_read(config) -> int:
    """On each of two ranks that stand for two hosts: rows that it has made tokens of itself."""
    os.environ.update(LOCAL_RANK="0", KTO_DIST_HOST=f"node-{comm.rank()}")
    rows, plain = 0, tokenise.over_chunks

    def counted(work, items, **more):
        nonlocal rows
        for parts, bad in plain(work, items, **more):
            rows += sum(part.batch.num_rows for part in parts)
            yield parts, bad

    tokenise.over_chunks = counted
    prepared = training.prepare(config, Console())
    assert comm.world_size() == 2
    return rows if len(prepared.train) else -1


@pytest.mark.parametrize("cache", ["one", "own"])
def test_two_hosts_tokenise_side_by_side(tmp_path, tiny_model, cache):
    for number in range(4):
        write_jsonl(tmp_path / "log" / f"{number}.jsonl", thumbs(30, 6, seed=number))
    config = tiny_config(tmp_path, tiny_model, tmp_path / "log")
    if cache == "one":
        assert run_ranks(_rows_read, 2, config) == [60, 60]
    else:  # each makes its part ahead, and then the rest
        assert run_ranks(_rows_read_in_own_caches, 2, tmp_path, config) == [120, 120]


def _rows_read_in_own_caches(folder: Path, config) -> int:
    own = config.model_copy(
        update={"data": config.data.model_copy(update={"cache": str(folder / f"cache-{comm.rank()}")})}
    )
    return _rows_read(own)

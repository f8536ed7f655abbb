"""Hosts that see one cache share a log out, and leave byte for byte what one host alone would have made."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import CHAT_TEMPLATE, thumbs, tiny_tokenizer, write_jsonl
from tiny_runs import tiny_config
from transformers import PreTrainedTokenizerFast

from kto_dist.base import comm
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data import tokenise
from kto_dist.data.config import DataConfig
from kto_dist.data.formats import Chunk, LogReader
from kto_dist.data.pieces import Hosts
from kto_dist.data.processes import Chunking, ProcessLost
from kto_dist.data.stretches import Stretch
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


def made(folders: tuple[Path, Path | None]) -> list[dict[str, bytes]]:
    """The files of each folder."""
    return [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders if folder is not None]


def report(files: dict[str, bytes]) -> dict[str, object]:
    return json.loads(files["about.json"])["report"]


def read_nothing(_: LogReader, stretches: Sequence[Stretch], rows: int) -> Iterator[Chunk]:
    assert not stretches, "a file was read again"
    return iter(())


@pytest.mark.parametrize("heldout", [None, 0.3])
def test_what_hosts_have_made_ahead_is_put_together_and_no_file_is_read_again(tmp_path, monkeypatch, heldout):
    log_of(tmp_path / "log")
    alone = made(prepare(data_of(tmp_path, "alone", heldout=heldout), TOKENIZER))
    shared = data_of(tmp_path, "shared", heldout=heldout)
    for number in range(3):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3))
    assert len(list(Path(shared.cache).iterdir())) == 3
    with monkeypatch.context() as patched:
        patched.setattr(LogReader, "chunks", read_nothing)
        together = made(prepare(shared, TOKENIZER, hosts=3))
    assert together == alone
    assert len(alone) == (1 if heldout is None else 2) and report(alone[0])["skipped"] == {"unknown label": 4}
    # the pieces are gone, and a host that comes later finds the whole
    assert [folder.name for folder in Path(shared.cache).iterdir() if folder.name.startswith(".")] == []
    ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=0, count=3))
    assert len(list(Path(shared.cache).iterdir())) == 1


@pytest.mark.parametrize("there", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_files_of_pieces_that_are_not_seen_are_read(tmp_path, there):
    """As where hosts have caches of their own, or a host has died."""
    log_of(tmp_path / "log")
    alone = made(prepare(data_of(tmp_path, "alone"), TOKENIZER))
    shared = data_of(tmp_path, "shared")
    for number in there:
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3))
    assert made(prepare(shared, TOKENIZER, hosts=3)) == alone


@pytest.mark.parametrize("name", ["rows.arrow", "digests", "contents", "../piece.json"])
def test_a_damaged_piece_is_not_believed(tmp_path, name):
    log_of(tmp_path / "log")
    alone = made(prepare(data_of(tmp_path, "alone"), TOKENIZER))
    shared = data_of(tmp_path, "shared")
    for number in range(2):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=2))
    for piece in Path(shared.cache).iterdir():
        file = piece / "rows" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert made(prepare(shared, TOKENIZER, hosts=2)) == alone


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


WORD = st.sampled_from(["a", "é b", "日本", "\U0001f44d c", "long " * 60])
RECORD = st.one_of(
    st.builds(lambda ask, say, up: {"prompt": ask, "completion": say, "label": up}, WORD, WORD, st.booleans()),
    st.builds(lambda ask, good, bad: {"prompt": ask, "chosen": good, "rejected": bad}, WORD, WORD, WORD),
    st.builds(
        lambda ask, up: {"prompt": ask, "completion": "c", "label": up, "mood": 1}, WORD, st.sampled_from([1, 3])
    ),
    # refused by the chat template, which comes after reading
    st.just({"prompt": [{"role": "user", "content": "no"}], "completion": "d", "label": True}),
    st.just({"prompt": [{"role": "user", "content": "yes"}], "completion": "d", "label": False}),
)
LINE = st.one_of(RECORD.map(json.dumps), RECORD.map(json.dumps), st.sampled_from(["", " \t", "{oops", "[1]", '"é"']))
LOG = st.builds(
    lambda mark, lines, end, ends: (mark + end.join(lines) + end * ends).encode(),
    st.sampled_from(["", "\ufeff"]),
    st.lists(LINE, min_size=1, max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)


def picky() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this one') }}{% endif %}" + CHAT_TEMPLATE
    )
    return tokenizer


PICKY = picky()
PICKY_FINGERPRINT = tokenizer_fingerprint(PICKY)


def outcome(data: DataConfig, **more: object) -> object:
    try:
        return made(prepare(data, PICKY, PICKY_FINGERPRINT, **more))
    except UserError as error:
        return str(error)


@given(
    log=LOG,
    count=st.integers(2, 15),
    there=st.sets(st.integers(0, 14)),
    rows=st.sampled_from([1, 3, 1000]),
    on_bad_row=st.sampled_from(["skip", "error"]),
)
def test_parts_of_any_file_make_what_the_whole_makes_or_say_the_same_mistake(
    tmp_path_factory, log, count, there, rows, on_bad_row
):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "log").mkdir()
    (folder / "log" / "log.jsonl").write_bytes(log)
    alone = outcome(data_of(folder, "alone", on_bad_row=on_bad_row))
    shared, chunking = data_of(folder, "shared", on_bad_row=on_bad_row), Chunking(rows=rows, least=1)
    for number in there & {*range(count)}:
        ahead(shared, PICKY, PICKY_FINGERPRINT, Hosts(number=number, count=count), chunking)
    assert outcome(shared, chunking=chunking, hosts=count) == alone


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("heldout", [None, 0.3])
def test_hosts_share_one_file_and_nobody_reads_it_again(tmp_path, monkeypatch, kind, heldout):
    rows = thumbs(60, 9)
    rows[20]["label"] = rows[45]["label"] = "perhaps" if kind == "jsonl" else None
    (tmp_path / "log").mkdir()
    if kind == "jsonl":
        write_jsonl(tmp_path / "log" / "log.jsonl", rows)
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "log" / "log.parquet", row_group_size=11)
    alone = made(prepare(data_of(tmp_path, "alone", heldout=heldout), TOKENIZER))
    shared, chunking = data_of(tmp_path, "shared", heldout=heldout), Chunking(rows=7, least=100)
    for number in range(3):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3), chunking)
    assert len([*Path(shared.cache).iterdir()]) == 3
    with monkeypatch.context() as patched:
        patched.setattr(LogReader, "chunks", read_nothing)
        assert made(prepare(shared, TOKENIZER, chunking=chunking, hosts=3)) == alone
    assert sum(report(alone[0])["skipped"].values()) == 2
    # a short file is one host's, and `prepare`'s: no piece is made of it
    short = data_of(tmp_path, "short", heldout=heldout)
    ahead(short, TOKENIZER, FINGERPRINT, Hosts(number=0, count=3))
    assert not Path(short.cache).exists()


def test_numbers_that_are_a_rating_only_together_are_refused_as_alone(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": 1 if number < 20 else 3} for number in range(40)]
    write_jsonl(tmp_path / "log" / "log.jsonl", rows)
    shared, chunking = data_of(tmp_path, "shared"), Chunking(least=1)
    for number in range(2):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=2), chunking)
    for data, hosts in ((data_of(tmp_path, "alone"), 1), (shared, 2)):
        with pytest.raises(UserError, match=r"log\.jsonl:21: label has 1 and 3: a rating"):
            prepare(data, TOKENIZER, chunking=chunking, hosts=hosts)


def test_a_process_that_is_lost_ends_the_job_on_its_host_and_leaves_no_piece(tmp_path, monkeypatch):
    def lost(*_: object, **__: object) -> None:
        raise ProcessLost("memory ran out")

    log_of(tmp_path / "log")
    shared = data_of(tmp_path, "shared")
    monkeypatch.setattr(tokenise, "over_chunks", lost)
    with pytest.raises(UserError, match="memory ran out"):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=0, count=2))
    assert [*Path(shared.cache).iterdir()] == []


def test_hosts_stop_where_a_row_before_theirs_is_wrong_and_those_before_it_go_on(tmp_path, monkeypatch):
    rows = thumbs(90, 9)
    rows[45]["label"] = rows[80]["label"] = "perhaps"
    write_jsonl(tmp_path / "log" / "log.jsonl", rows)
    shared, chunking = data_of(tmp_path, "shared", on_bad_row="error"), Chunking(rows=4, least=1, look=0)
    made_by = dict.fromkeys(range(3), 0)
    plain = tokenise.over_chunks

    def counted(work, chunks, **more):
        for chunk, done in plain(work, chunks, **more):
            made_by[host] += 1
            if host == 2 and made_by[host] == 2:  # the second host meets its row meanwhile
                go_ahead(1)
            yield chunk, done

    def go_ahead(number: int) -> None:
        nonlocal host
        before, host = host, number
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=3), chunking)
        host = before

    host = -1
    monkeypatch.setattr(tokenise, "over_chunks", counted)
    go_ahead(2)
    assert made_by[2] == 2 and made_by[1] > 2
    go_ahead(0)
    assert made_by[0] >= 7
    host = 0
    with pytest.raises(UserError, match=r"log\.jsonl:46: "):
        prepare(shared, TOKENIZER, chunking=chunking, hosts=3)
    # the first host's piece is left; that a row was wrong is not
    assert [path.name.rpartition(".")[2] for path in Path(shared.cache).iterdir()] == ["piece-0-of-3"]


def test_a_piece_of_other_cuts_is_not_believed(tmp_path):
    write_jsonl(tmp_path / "log" / "log.jsonl", thumbs(60, 9))
    alone = made(prepare(data_of(tmp_path, "alone"), TOKENIZER))
    shared = data_of(tmp_path, "shared")
    size = (tmp_path / "log" / "log.jsonl").stat().st_size
    # where parts have to be large, the second of four hosts has the first half, and else the second quarter
    for number, least in ((0, 1), (1, size * 3 // 10), (2, 1), (3, 1)):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=4), Chunking(least=least))
    assert len([*Path(shared.cache).iterdir()]) == 4
    assert made(prepare(shared, TOKENIZER, chunking=Chunking(least=1), hosts=4)) == alone


def test_a_file_without_one_usable_row_is_refused_as_alone(tmp_path):
    write_jsonl(tmp_path / "log" / "log.jsonl", [{"prompt": "a", "completion": "b", "label": "perhaps"}] * 20)
    shared, chunking = data_of(tmp_path, "shared"), Chunking(least=1)
    for number in range(2):
        ahead(shared, TOKENIZER, FINGERPRINT, Hosts(number=number, count=2), chunking)
    for data, hosts in ((data_of(tmp_path, "alone"), 1), (shared, 2)):
        with pytest.raises(UserError, match=r"not one of its 20 rows could be read; the first: .*log\.jsonl:1: "):
            prepare(data, TOKENIZER, chunking=chunking, hosts=hosts)


@pytest.mark.parametrize("rows", [1, 9, 2000])
def test_what_is_made_does_not_depend_on_how_rows_are_handed_out(tmp_path, rows):
    """A chunk is read before it becomes tokens: rows that fail here and there mix in another order."""
    log = [*thumbs(1300, 9), *thumbs(3, 3)]
    no = {"prompt": [{"role": "user", "content": "no"}], "completion": "d", "label": True}
    # noticed as tokens are made, and as the next row is read
    log[0] = {**no, "prompt": [{"role": "user", "content": "yes", "with": 1}], "completion": "d<|im_end|>"}
    log[1] = {"prompt": "ab", "completion": "ab c", "label": False, "mood": 1}
    for number in range(2, 30, 3):
        log[number] = no if number % 2 else {**log[number], "label": "perhaps"}
    write_jsonl(tmp_path / "log" / "log.jsonl", log)
    first, second = (
        outcome(data_of(tmp_path, name), chunking=Chunking(rows=count)) for name, count in (("a", rows), ("b", 250))
    )
    assert first == second
    said = [example.partition(": ")[0].rpartition(":")[2] for example in report(first[0])["skipped_examples"]]
    assert said == ["3", "6", "9", "12", "15"]
    assert len(report(first[0])["unused"]) == len(report(first[0])["notes"]) == 2
    wrong = outcome(data_of(tmp_path, "c", on_bad_row="error"), chunking=Chunking(rows=rows))
    assert "log.jsonl:3: " in wrong


def _rows_read(config, least: int = Chunking().least) -> int:
    """On each of two ranks that stand for two hosts: rows that it has made tokens of itself."""
    os.environ.update(LOCAL_RANK="0", KTO_DIST_HOST=f"node-{comm.rank()}")
    rows, plain = 0, tokenise.over_chunks

    def counted(work, chunks, **more):
        nonlocal rows
        for chunk, made in plain(work, chunks, **more):
            rows += sum(part.batch.num_rows for part in made.parts)
            yield chunk, made

    tokenise.over_chunks = counted
    for name in ("ahead", "prepare"):
        setattr(tokenise, name, partial(getattr(tokenise, name), chunking=Chunking(least=least)))
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


def test_two_hosts_tokenise_one_file_side_by_side(tmp_path, tiny_model):
    rows = [{"prompt": f"{number:02} a", "completion": "b", "label": number % 2 > 0} for number in range(40)]
    write_jsonl(tmp_path / "log" / "log.jsonl", rows)
    config = tiny_config(tmp_path, tiny_model, tmp_path / "log")
    found = run_ranks(_rows_read, 2, config, 100)
    assert sum(found) == 40 and abs(found[0] - found[1]) < 3


def _rows_read_in_own_caches(folder: Path, config) -> int:
    own = config.model_copy(
        update={"data": config.data.model_copy(update={"cache": str(folder / f"cache-{comm.rank()}")})}
    )
    return _rows_read(own)

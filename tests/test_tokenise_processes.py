"""A host's processes make of a log, byte for byte, what one process makes of it, and end together."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny import thumbs, tiny_tokenizer, write_jsonl

from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.formats import LogReader
from kto_dist.data.processes import Chunking
from kto_dist.data.records import BadRecord, Block, read_blocks
from kto_dist.data.sources import find_sources
from kto_dist.data.stretches import Stretch, share_out
from kto_dist.data.tokenise import prepare

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": f"a {word}", "chosen": f"{word} b", "rejected": f"{word} e"} for word in "cdghijkl"]
BAD = [{"prompt": "a b", "completion": "c", "label": "perhaps"}, {"prompt": None, "completion": "d", "label": True}]


def made(folders: tuple[Path, Path | None]) -> list[dict[str, bytes]]:
    return [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders if folder is not None]


def every_format(folder: Path) -> list[str]:
    """Logs of several layouts with rows that cannot be read, columns that nothing reads and labels that are numbers."""
    rows = [{"mood": "good" if number % 5 else None, **row} for number, row in enumerate(thumbs(40, 9))]
    rows[17:17] = rows[30:30] = BAD
    lines = [json.dumps(row) for row in rows]
    folder.mkdir()
    (folder / "a.jsonl").write_text("\ufeff\n \n" + "\n{oops\n".join(lines))
    (folder / "array.json").write_text(f"[\n{', '.join(lines)}]")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, PAIRS)).encode()))
    cells = [[row["prompt"], row["completion"], "true" if row["label"] is True else "0"] for row in thumbs(30, 7)]
    (folder / "cells.csv").write_text("prompt,completion,label\n" + "".join(f'{a},"{b}\n.",{c}\n' for a, b, c in cells))
    features = datasets.Features(
        prompt=datasets.Value("string"),
        completion=datasets.Value("string"),
        label=datasets.ClassLabel(names=["up", "down"]),
    )
    numbers = [{**row, "label": number % 2} for number, row in enumerate(thumbs(30, 7, seed=3))]
    labelled = datasets.Dataset.from_list(numbers, features=features)
    labelled.to_parquet(folder / "labelled.parquet", batch_size=11)
    labelled.select(range(4, 25)).save_to_disk(str(folder / "saved"))
    write_jsonl(folder / "later.jsonl", [*BAD, *PAIRS])
    names = ("a.jsonl", "array.json", "packed.jsonl.gz", "cells.csv", "labelled.parquet", "saved", "later.jsonl")
    return [str(folder / name) for name in names]


def test_processes_make_of_every_format_what_one_makes_and_read_what_they_make(tmp_path, monkeypatch):
    given = {"train": every_format(tmp_path / "log"), "heldout": 0.3, "on_bad_row": "skip"}
    alone = made(prepare(DataConfig(**given, cache=str(tmp_path / "alone"), workers=1), TOKENIZER))
    report = json.loads(alone[0]["about.json"])["report"]
    assert report["skipped"]["broken JSON"] == 43 and report["unused"]["mood"] > 50 and len(alone) == 2
    read = 0

    def counted(reader, chunk, plain=LogReader.rows):
        nonlocal read
        for row in plain(reader, chunk):
            read += 1
            yield row

    monkeypatch.setattr(LogReader, "rows", counted)
    shared = DataConfig(**given, cache=str(tmp_path / "shared"), workers=2)
    assert made(prepare(shared, TOKENIZER, chunking=Chunking(rows=3, alone=1))) == alone
    # the first chunk is made in this process, and of every file the layout is asked for
    assert 0 < read <= 3 + 2 * len(given["train"])


@pytest.mark.parametrize("kind", ["label", "template", "rating"])
def test_of_processes_the_first_row_that_is_wrong_is_said(tmp_path, kind):
    rows = thumbs(60, 9)
    rows[50]["label"] = "perhaps"
    if kind == "label":
        rows[31]["label"] = "perhaps"
    elif kind == "template":  # noticed when the others have been read
        rows[31] = {"prompt": [{"role": "user", "content": "hi"}], "completion": "no template", "label": True}
    else:  # both are thumbs alone
        rows[7]["label"], rows[31]["label"] = 3, 1
    write_jsonl(tmp_path / "log.jsonl", rows)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    data = DataConfig(train=str(tmp_path / "log.jsonl"), cache=str(tmp_path / "cache"), workers=2, on_bad_row="skip")
    if kind == "rating":
        rows[50]["label"] = True
    else:
        data = data.model_copy(update={"on_bad_row": "error"})
    said = []
    for chunking in (Chunking(), Chunking(rows=4, alone=2)):
        with pytest.raises(UserError, match=r"log\.jsonl:32\b") as caught:
            prepare(data, tokenizer, chunking=chunking)
        said.append(str(caught.value))
    assert said[0] == said[1] and [*(tmp_path / "cache").iterdir()] == []


def test_what_stands_before_a_files_damage_is_said_first(tmp_path):
    rows = [json.dumps(row) for row in thumbs(3000, 900)]
    rows[40] = "{oops"
    packed = gzip.compress("\n".join(rows).encode())
    (tmp_path / "log.jsonl.gz").write_bytes(packed[: len(packed) * 9 // 10])
    data = DataConfig(train=str(tmp_path / "log.jsonl.gz"), cache=str(tmp_path / "cache"), workers=1)
    with pytest.raises(UserError, match=r"log\.jsonl\.gz:41: the line '\{oops"):
        prepare(data, TOKENIZER, chunking=Chunking(rows=10_000))
    with pytest.raises(UserError, match="is damaged or not what its name says"):
        prepare(data.model_copy(update={"on_bad_row": "skip", "workers": 2}), TOKENIZER, chunking=Chunking(alone=1))
    assert [*(tmp_path / "cache").iterdir()] == []


def blocks_of(path: Path, rows: int) -> list[Block]:
    (source,) = find_sources([str(path)])
    return [*read_blocks(source, {"prompt"}, Stretch(file=0), rows)]


def test_a_block_has_few_rows_and_fewer_long_ones(tmp_path):
    lines = [b'{"prompt": "%d"}\n' % number for number in range(2500)]
    (tmp_path / "short.jsonl").write_bytes(b"".join(lines))
    found = blocks_of(tmp_path / "short.jsonl", 1000)
    assert [block.first for block in found] == [1, 1001, 2001]
    assert b"".join(block.content for block in found) == b"".join(lines)
    line = b'{"prompt": "' + b"x" * 300_000 + b'"}\n'
    (tmp_path / "long.jsonl").write_bytes(line * 20)
    found = blocks_of(tmp_path / "long.jsonl", 1000)
    assert [block.first for block in found] == [1, 5, 9, 13, 17] and all(block.content == line * 4 for block in found)
    pa.parquet.write_table(pa.table({"prompt": [f"{number}" for number in range(25)]}), tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path / "a.parquet")])
    found = blocks_of(tmp_path / "a.parquet", 10)
    assert [len([*block.records(source)]) for block in found] == [10, 10, 5]


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_blocks_of_stretches_are_those_of_the_whole_file(tmp_path, rows):
    content = b"\xef\xbb\xbf" + b'{"a": 1}\r\n\n{"b": 2}\n\n{oops\n{"c": 3}'
    (tmp_path / "log.jsonl").write_bytes(content)
    (source,) = find_sources([str(tmp_path / "log.jsonl")])
    whole = [str(placed) for block in blocks_of(tmp_path / "log.jsonl", rows) for placed in block.records(source)]
    assert len(whole) == 4 and whole[-1].startswith(f"('{source.name}:6'")
    for count in range(2, 12):
        stretches = [stretch for share in share_out([source], count, 1) for stretch in share]
        found = [block for stretch in stretches for block in read_blocks(source, set(), stretch, rows)]
        assert [str(placed) for block in found for placed in block.records(source)] == whole


def test_a_bad_record_keeps_its_reason_on_the_way_to_another_process():
    again = pickle.loads(pickle.dumps(BadRecord("broken CSV", "the line is not CSV")))
    assert (again.reason, str(again)) == ("broken CSV", "the line is not CSV")


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


def wait_for(there: Callable[[], object]) -> None:
    while True:
        try:
            if there():
                return
        except psutil.Error:  # one ends while it is looked at
            pass
        time.sleep(0.02)


def test_a_process_that_is_killed_ends_all_of_them_and_leaves_nothing(tmp_path):
    write_jsonl(tmp_path / "log.jsonl", thumbs(400, 9))
    data = DataConfig(train=str(tmp_path / "log.jsonl"), cache=str(tmp_path / "cache"), workers=2)
    found: list[psutil.Process] = []

    def kill_one() -> None:
        wait_for(lambda: len(workers_of(os.getpid())) == 2)
        found.extend(workers_of(os.getpid()))
        found[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"a process that tokenises ended early.*lower data\.workers \(2\)"):
        prepare(data, TOKENIZER, chunking=Chunking(rows=5, alone=1))
    killer.join()
    assert [*(tmp_path / "cache").iterdir()] == []
    psutil.wait_procs(found)


SCRIPT = """
from kto_dist.data import config, processes, tokenise
from tests.tiny import tiny_tokenizer
settings = config.DataConfig(train='log.jsonl', cache='cache', workers=2)
tokenise.prepare(settings, tiny_tokenizer(), chunking=processes.Chunking(rows=1, alone=1))
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    write_jsonl(tmp_path / "log.jsonl", thumbs(3000, 9))
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [path or "." for path in sys.path]))}
    job = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=paths)
    workers: list[psutil.Process] = []
    try:
        wait_for(lambda: job.poll() is not None or len(workers_of(job.pid)) == 2)
        workers += workers_of(job.pid)
        assert len(workers) == 2
        job.kill()
        psutil.wait_procs(workers)
    finally:
        for process in (job, *workers):
            with suppress(psutil.Error):
                process.kill()
        job.wait()
    # what was begun has no final name
    assert all(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())

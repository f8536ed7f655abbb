"""`train` knows whether its data was audited, says what the audit or its own look found, and keeps it with the run."""

import hashlib
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from tiny_runs import tiny_config

from kto_dist.base import comm
from kto_dist.base.errors import UserError
from kto_dist.base.files import sha256_of
from kto_dist.data.audited import audit_files, audit_tags, describes_all, desirable_share, find_audits, line_of
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import DataReport, load
from kto_dist.data.tokenise import prepare
from kto_dist.feedback import audit as auditing
from kto_dist.training import loop
from kto_dist.training.agreement import begin_together
from kto_dist.training.config import Config
from tests.tiny import thumbs, tiny_tokenizer, write_jsonl

FAILED = {
    "status": "warn",
    "message": "users agree with an alpha of 0.12 (wanted: 0.4)",
    "remedy": "collect more votes",
}
PASSED = {"status": "pass", "message": "all is well", "remedy": ""}


def dataset(folder: Path, name: str = "train.parquet", rows: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"prompt": ["p"] * rows, "completion": ["c"] * rows, "label": [True] * rows}), folder / name
    )
    return folder / name


def describe(*files: Path, checks: tuple[dict[str, str], ...] = (FAILED, PASSED), **changes: Any) -> Path:
    entries = [{"name": file.name, "sha256": sha256_of(file)} for file in files]
    path = files[0].with_name("audit.json")
    path.write_text(json.dumps({"version": 1, "files": entries, "checks": checks, **changes}))
    path.with_name("report.html").write_text("<!doctype html>")
    return path


def test_each_failed_check_is_a_warning_with_its_number_and_remedy(tmp_path):
    file, said = dataset(tmp_path), []
    path = describe(file)
    (found,) = find_audits([str(file)], said.append)
    assert said == [f"audit of {file}: users agree with an alpha of 0.12 (wanted: 0.4); collect more votes"]
    assert (found.path, found.files) == (path, {"train.parquet": sha256_of(file)})
    assert [(path.name, folder) for path, folder in audit_files([found])] == [
        ("audit.json", "audit"),
        ("report.html", "audit"),
    ]
    assert audit_tags([found]) == {
        "audit.sha256": sha256_of(path),
        "audit.files": sha256_of(file),
        "audit.failed": "1",
    }


def test_an_audit_of_other_content_is_not_believed(tmp_path):
    file, said = dataset(tmp_path), []
    describe(file)
    dataset(tmp_path, rows=4)
    assert find_audits([str(file)], said.append) == []
    assert len(said) == 1 and "describes other data than train.parquet" in said[0] and "kto-dist mine" in said[0]


def test_a_renamed_file_keeps_its_audit(tmp_path):
    file, said = dataset(tmp_path), []
    describe(file, checks=(PASSED,))
    assert find_audits([str(file.rename(tmp_path / "other.parquet"))], said.append) and not said


def test_files_of_one_folder_share_its_audit_and_warn_once(tmp_path):
    files, said = [dataset(tmp_path), dataset(tmp_path, "more.parquet", rows=5)], []
    describe(*files)
    (found,) = find_audits([str(tmp_path)], said.append)
    assert set(found.files) == {"train.parquet", "more.parquet"} and len(said) == 1
    assert len(find_audits([str(tmp_path / "*.parquet")], said.append)) == 1


def test_the_class_mix_is_that_of_the_audited_rows_that_are_trained_on(tmp_path):
    counts = {"train": {"up": 60, "down": 40}, "dataset": {"up": 90, "down": 110}}
    files = [dataset(tmp_path / "a"), dataset(tmp_path / "b"), dataset(tmp_path / "c")]
    describe(files[0], balance=counts)
    describe(files[1], balance={"train": {"up": 0, "down": 100}})
    describe(files[2])  # of an older version
    found = find_audits([str(file) for file in files], lambda line: None)
    assert desirable_share(found[:1]) == 0.6 and desirable_share(found) == 60 / 200
    assert desirable_share(found[2:]) is None and desirable_share([]) is None
    apart = dataset(tmp_path / "a", "heldout.parquet", rows=2)
    describe(files[0], apart, balance=counts)
    assert desirable_share(find_audits([str(tmp_path / "a")], lambda line: None)) == 90 / 200


def test_audits_of_several_folders_are_kept_apart(tmp_path):
    files = [dataset(tmp_path / name) for name in ("a", "b")]
    for file in files:
        describe(file)
    found = find_audits([str(file) for file in files], lambda line: None)
    assert [folder for _, folder in audit_files(found)] == ["audit/1", "audit/1", "audit/2", "audit/2"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": [{}], "checks": [], "version": 1}', "null"])
def test_a_damaged_audit_is_a_warning_and_no_audit(tmp_path, content):
    file, said = dataset(tmp_path), []
    (tmp_path / "audit.json").write_text(content)
    assert find_audits([str(file)], said.append) == []
    assert len(said) == 1 and "not readable as an audit" in said[0]


def test_a_newer_layout_is_not_guessed_at(tmp_path):
    file, said = dataset(tmp_path), []
    describe(file, version=2)
    assert find_audits([str(file)], said.append) == [] and "layout 2" in said[0]


def test_a_newer_layout_is_named_even_if_it_has_no_key_in_common(tmp_path):
    file, said = dataset(tmp_path), []
    (tmp_path / "audit.json").write_text('{"version": 7}')
    assert find_audits([str(file)], said.append) == []
    assert len(said) == 1 and "layout 7" in said[0] and "update it" in said[0]


def test_an_audit_that_may_not_be_read_is_a_warning_and_training_goes_on(tmp_path, monkeypatch):
    file, said = dataset(tmp_path), []
    audit, read = describe(file), Path.read_text

    # by hand, since root may read everything
    def refused(path: Path, **how: Any) -> str:
        if path == audit:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", refused)
    assert find_audits([str(file)], said.append) == []
    assert len(said) == 1 and "Permission denied" in said[0] and "make it readable" in said[0]


def bytes_read() -> int:
    """By this process, from files and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
def test_audited_data_is_read_once_for_its_digest_and_once_for_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file, draw = tmp_path / "train.parquet", random.Random(0)
    rows = [{"prompt": f"p{n}", "completion": draw.randbytes(50_000).hex(), "label": n % 2 > 0} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none")
    describe(file, checks=(PASSED,))
    config = DataConfig(train=str(file), cache=str(tmp_path / "cache"), workers=1, max_length=96)
    tokenizer, before = tiny_tokenizer(), bytes_read()
    assert find_audits([str(file)], warnings.warn)
    prepare(config, tokenizer)
    # what was made of it is read as well, for its checksum
    tokens = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert bytes_read() - before < 2.5 * file.stat().st_size + tokens


def test_ranks_wait_for_the_digests_longer_than_the_process_group_would(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    assert run_ranks(_slowly_audited, 2, config) == ["as found by rank 0"] * 2


def _slowly_audited(config: Config) -> str:
    def slow(*_: Any) -> list[Any]:
        time.sleep(14)
        raise UserError(f"as found by rank {comm.rank()}")

    def briefly(*job: Any) -> None:
        begin_together(*job)
        comm.set_timeout(11)  # not before all are there: a busy machine starts one well after another

    loop.begin_together, loop.find_audits = briefly, slow
    with pytest.raises(UserError) as caught:
        loop.train(config)
    return str(caught.value)


def test_data_without_an_audit_and_names_of_a_hub_say_nothing(tmp_path):
    said = []
    assert find_audits([str(dataset(tmp_path)), "someone/dataset:train", str(tmp_path / "none")], said.append) == []
    assert not said and audit_tags([]) == {}


def test_data_is_described_only_where_each_of_its_files_is(tmp_path):
    files = [dataset(tmp_path / name) for name in ("a", "b")]
    for file in files:
        describe(file)
    bare, raw = dataset(tmp_path / "c"), write_jsonl(tmp_path / "raw.jsonl", thumbs(4, 2))

    def described(*paths: Path | str) -> bool:
        given = [str(path) for path in paths]
        return describes_all(find_audits(given, lambda line: None), given)

    assert described(files[0]) and described(*files) and described(tmp_path / "a", files[1])
    assert described(tmp_path / "[ab]" / "*.parquet") and described(tmp_path / "a", tmp_path / "a")
    for other in (bare, raw, tmp_path, tmp_path / "none", "someone/dataset:train"):
        assert not described(files[0], other), other
    dataset(tmp_path / "b", rows=4)
    assert not described(*files)
    # a folder is read with its JSONL
    raw.rename(tmp_path / "a" / "raw.jsonl")
    assert not described(tmp_path / "a")


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_the_tags_of_many_files_fit_and_tell_one_list_from_another(tmp_path, count):
    files = [dataset(tmp_path / str(number), rows=number + 1) for number in range(count)]
    for file in files:
        describe(file)
    tags = audit_tags(find_audits([str(file) for file in files], lambda line: None))
    again = audit_tags(find_audits([str(file) for file in reversed(files)], lambda line: None))
    digests = [sha256_of(file) for file in files]
    assert all(len(value) <= 500 for value in tags.values())
    if count < 8:
        assert tags["audit.files"].split(",") == digests
    else:
        assert tags == again and tags["audit.files"].startswith(f"{count} in a list of sha256 ")
        assert hashlib.sha256(",".join(sorted(digests)).encode()).hexdigest() in tags["audit.files"]


def test_a_check_is_one_line_with_its_remedy_where_it_has_one():
    assert line_of(FAILED) == "users agree with an alpha of 0.12 (wanted: 0.4); collect more votes"
    assert line_of(PASSED) == "all is well"


def test_train_reads_the_layout_that_the_audit_writes():
    from kto_dist.data import audited

    assert audited.VERSION == auditing.VERSION


def report_of(folder: Path, rows: list[dict[str, Any]]) -> DataReport:
    log = write_jsonl(folder / "log.jsonl", rows)
    config = DataConfig(train=str(log), cache=str(folder / "cache"), workers=1, max_length=96)
    return load(prepare(config, tiny_tokenizer())[0]).report


def test_repeated_and_contradictory_rows_are_counted(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": True}] * 3 + [
        {"prompt": "p", "completion": "c", "label": False}
    ]
    rows += [{"prompt": "q", "completion": "c", "label": False}] * 2 + [
        {"prompt": "q", "completion": "d", "label": True}
    ]
    # where the prompt ends matters: the same letters are another row
    rows += [{"prompt": "pc", "completion": "d", "label": True}, {"prompt": "p", "completion": "cd", "label": False}]
    report = report_of(tmp_path, rows)
    assert report.contradictions == 4
    assert report.duplicates == 3  # two of the first three, one of the next two
    lines = "\n".join(report.doubts())
    assert "4 of 9 rows (44.4%) have a twin with the other label" in lines
    assert "3 of 9 rows (33.3%) repeat another one" in lines and lines.count("kto-dist mine") == 2
    assert "3 rows repeat another one, 4 have a twin" in "\n".join(report.lines())


def test_clean_rows_raise_no_doubt(tmp_path):
    rows = list({(row["prompt"], row["completion"]): row for row in thumbs(80, 24)}.values())
    report = report_of(tmp_path, rows)
    assert (report.duplicates, report.contradictions, report.doubts()) == (0, 0, [])
    assert "repeat" not in "\n".join(report.lines())


def test_a_rare_class_raises_a_doubt(tmp_path):
    rows = [{"prompt": f"p{number}", "completion": "c", "label": number > 0} for number in range(40)]
    assert "1 of 40 rows (2.5%) are thumbs down" in report_of(tmp_path, rows).doubts()[0]

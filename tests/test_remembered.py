"""A large file is read once for its digest, and again only when it is no longer the same file."""

import hashlib
from pathlib import Path

import pytest

from kto_dist.base.remembered import cache_folder, sha256_once


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_digest_is_the_contents_also_after_a_change_of_the_same_size(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"one", b"two", b"x" * 3_000_000):
        path.write_bytes(content)
        assert sha256_once(path) == sha256(path)


def test_a_settled_file_is_remembered_beyond_the_process(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest = sha256_once(path, settled=-1)
    (entry,) = cache_folder("sha256").iterdir()
    assert digest in entry.read_text()


def test_a_young_file_is_not_remembered_beyond_the_process(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sha256_once(path, settled=3600.0)
    assert not cache_folder("sha256").exists()


def test_a_damaged_entry_is_not_believed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    digest = sha256_once(path, settled=-1)
    (entry,) = cache_folder("sha256").iterdir()
    entry.write_text(entry.read_text().replace(digest, "f" * 64))
    # other settings, so that what this process knows is not asked
    assert sha256_once(path, settled=-2) == digest


def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_once(tmp_path / "none")

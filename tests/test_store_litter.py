"""What killed writers leave in a store goes once it is old, whatever time this machine thinks it is."""

import os
import time
from pathlib import Path

import pytest
from fake_scorer import IDENTITY

from kto_dist.store.gc import Removal, collect, plan_gc
from kto_dist.store.store import Store


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path]:
    """A file that is being written, by a job that may not have said so yet, and one whose writer was killed."""
    folder = Store(tmp_path, IDENTITY).folder.path
    young, old = folder / f".a.parquet.{'0' * 32}", folder / f".b.parquet.{'1' * 32}"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    return young, old


def litter(root: Path) -> list[Removal]:
    return [removal for removal in plan_gc(root) if "killed" in removal.why]


def test_gc_removes_what_killed_writers_left_once_it_is_old(tmp_path, written):
    young, old = written
    assert [done for _, done in collect(tmp_path, litter(tmp_path))] == [True]
    assert young.exists() and not old.exists() and not litter(tmp_path)


def test_gc_where_the_clock_is_ahead_leaves_alone_what_is_being_written(tmp_path, written, monkeypatch):
    young, old = written
    ahead = time.time() + 5000
    monkeypatch.setattr(time, "time", lambda: ahead)
    (removal,) = litter(tmp_path)
    assert {*removal.files} == {young.name, old.name}
    assert [done for _, done in collect(tmp_path, [removal])] == [False]
    assert young.exists() and not old.exists()
    assert {path.name for path in young.parent.iterdir()} == {young.name, "manifest.json", "used.json"}

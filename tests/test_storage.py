"""A store behind a URL: the same promises on an object store, against a real S3 server on this machine."""

import contextlib
import errno
import os
import re
import stat
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_scorer import FILL, IDENTITY, OTHER, fill, keys_of, value_of

from kto_dist.base.errors import UserError
from kto_dist.store.gc import collect, plan_gc
from kto_dist.store.shards import NAME
from kto_dist.store.storage import LocalStorage, open_storage, write_whole
from kto_dist.store.store import Store
from kto_dist.store.tools import export, summarise, verify


@pytest.fixture(params=("s3", "memory", "file", "folder"))
def root(request, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4().hex}/reference"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/reference"
    return f"file://{tmp_path}/reference" if request.param == "file" else f"{tmp_path}/reference"


def shards(store: Store) -> list[str]:
    return [file.name for file in store.folder.files() if NAME.fullmatch(file.name)]


def test_what_was_added_is_found_by_others_and_nothing_else(root):
    store, watcher = Store(root, IDENTITY), Store(root, IDENTITY)
    assert not watcher.lookup(keys_of(range(10)))[1].any()
    with store:
        store.begin(150)
        for start in (0, 50, 100):
            fill(store, range(start, start + 50), IDENTITY)
    logps, found = Store(root, IDENTITY).lookup(keys_of(range(200)))
    assert found.tolist() == [True] * 150 + [False] * 50
    assert (logps[:150] == value_of(IDENTITY, range(150))).all()
    assert not Store(root, OTHER).lookup(keys_of(range(200)))[1].any()
    assert [file.name for file in store.folder.files() if not NAME.fullmatch(file.name)] == [
        "manifest.json",
        "used.json",
    ]


@pytest.mark.parametrize("damage", ("truncated", "flipped", "deleted", "foreign"))
def test_damage_costs_the_damaged_shards_pairs_alone(root, damage):
    store = Store(root, IDENTITY)
    fill(store, range(40), IDENTITY)
    (first,) = shards(store)
    fill(store, range(40, 80), IDENTITY)
    data = store.folder.read(first)
    if damage == "deleted":
        store.folder.remove(first)
    elif damage == "truncated":
        store.folder.write(first, data[:-20])
    elif damage == "flipped":
        store.folder.write(first, data[:200] + bytes([data[200] ^ 1]) + data[201:])
    else:
        other = Store(root, OTHER)
        fill(other, range(80), OTHER)
        store.folder.write(shards(other)[0], other.folder.read(shards(other)[0]))
        store.folder.remove(first)
    said = []
    logps, found = Store(root, IDENTITY, warn=said.append).lookup(keys_of(range(80)))
    assert found.tolist() == [False] * 40 + [True] * 40
    assert (logps[40:] == value_of(IDENTITY, range(40, 80))).all()
    assert len(said) == (damage != "deleted")
    assert len(shards(store)) == 1


def test_the_tools_work_on_it(root, tmp_path):
    store = Store(root, IDENTITY, model="some/model")
    for start in range(0, 160, 10):
        fill(store, range(start, start + 10), IDENTITY)
    fill(store, range(15), IDENTITY, noise=0.5)
    with Store(root, OTHER) as other:
        other.begin()
        fill(other, range(5), OTHER)
        by_model = {row.fingerprint: row for row in summarise(root)}
        assert by_model[IDENTITY.digest].pairs == 175 and by_model[IDENTITY.digest].facts["model"] == "some/model"
        assert len(by_model[OTHER.digest].users) == 1
        assert sorted(verdict.pairs for verdict in verify(root)) == [5, 160]
        assert all(verdict.good for verdict in verify(root))
        assert not plan_gc(root, prefix=OTHER.digest[:9])
    assert all(done for _, done in collect(root, plan_gc(root)))
    assert len(shards(store)) == 1 and Store(root, IDENTITY).lookup(keys_of(range(160)))[1].all()
    assert export(root, tmp_path / "pairs.parquet", IDENTITY.digest[:6]) == 160
    assert all(done for _, done in collect(root, plan_gc(root, prefix=OTHER.digest[:9])))
    assert [row.fingerprint for row in summarise(root)] == [IDENTITY.digest]


def test_jobs_on_an_object_store_lose_and_corrupt_nothing(s3):
    root = f"s3://bucket/{uuid.uuid4().hex}"
    jobs = [
        subprocess.Popen([*FILL, root, str(first), str(first + 200), "shard=20"], stdout=subprocess.DEVNULL)
        for first in (0, 100)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    logps, found = Store(root, IDENTITY).lookup(keys_of(range(300)))
    assert found.all() and (logps == value_of(IDENTITY, range(300))).all()


def test_an_object_is_there_as_a_whole_or_not_at_all_when_its_writer_is_killed(s3):
    for attempt in range(2):
        root = f"s3://bucket/{uuid.uuid4().hex}"
        job = subprocess.Popen([*FILL, root, "0", "100000", "shard=2000"], stdout=subprocess.PIPE, text=True)
        acknowledged = [int(job.stdout.readline()) for _ in range(2 + attempt)][-1]
        job.kill()
        acknowledged = max([acknowledged, *map(int, job.stdout.read().split("\n")[:-1])])
        job.wait()
        job.stdout.close()
        said = []
        found = Store(root, IDENTITY, warn=said.append).lookup(keys_of(range(acknowledged + 4000)))[1]
        assert found[:acknowledged].all() and found.sum() - acknowledged in (0, 2000) and not said


def test_what_another_job_adds_is_seen_in_spite_of_earlier_listings(s3):
    # s3fs keeps listings unless it is told not to
    root = f"s3://bucket/{uuid.uuid4().hex}"
    store = Store(root, IDENTITY)
    assert store.folder.files() and not shards(store)
    subprocess.run([*FILL, root, "0", "20"], check=True, stdout=subprocess.DEVNULL)
    assert len(shards(store)) == 1


def test_a_bucket_that_is_not_there_is_refused_with_its_name(s3):
    with pytest.raises(UserError, match=r"reference.store \(s3://no-such-bucket/x\) cannot be opened.*credentials"):
        Store("s3://no-such-bucket/x", IDENTITY)


def test_a_server_that_cannot_be_reached_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"cannot be opened or created: .*127.0.0.1:9.*check the connection"):
        Store("s3://bucket/x", IDENTITY)


@pytest.mark.parametrize("url", ("http://host/store", "sftp://host/store", "nonsense://x"))
def test_a_url_whose_files_appear_in_pieces_is_refused(url):
    with pytest.raises(UserError, match=rf"reference.store \({re.escape(url)}\) must be a folder or a URL of .*mount"):
        open_storage(url)


def test_a_url_whose_library_is_missing_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"reference.store \(gs://bucket/x\) needs a library: .*gcsfs"):
        open_storage("gs://bucket/x")


@pytest.mark.parametrize("call", ("fsync", "replace"))
def test_a_file_that_cannot_be_finished_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_readers_in_many_threads_agree(root):
    store = Store(root, IDENTITY)
    for start in range(0, 100, 10):
        fill(store, range(start, start + 10), IDENTITY)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: Store(root, IDENTITY).lookup(keys_of(range(100)))[0], range(4)))
    assert all((answer == value_of(IDENTITY, range(100))).all() for answer in answers)
    assert np.isfinite(answers[0]).all()


def test_a_file_system_that_syncs_no_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = LocalStorage(tmp_path)
    folder.write("a", b"1")
    assert folder.create("b", b"2") and [file.name for file in folder.files()] == ["a", "b"]


def test_a_file_that_an_nfs_server_removes_while_it_is_listed_is_gone(tmp_path, monkeypatch):
    class Entry:
        name = "gone"

        def is_file(self):
            return True

        def stat(self):
            raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext([Entry()]))
    assert LocalStorage(tmp_path).files() == []

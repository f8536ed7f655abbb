"""The store on disk: what was added is found, damage is found, and nobody ever gets a wrong number."""

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_scorer import IDENTITY, OTHER, fill, found_in, keys_of, run_fill, shards_of, value_of
from pair_key import keys_array, pair_key
from small_disk import remount

from kto_dist.base.errors import UserError
from kto_dist.store.shards import KEY, Wanted, distinct, encode
from kto_dist.store.storage import LocalStorage
from kto_dist.store.store import FORMAT, Store, read_manifest


@pytest.mark.parametrize("at_once", [1, 4])
def test_what_was_added_is_found_and_nothing_else(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(LocalStorage, "concurrency", at_once)
    rng = np.random.default_rng(0)
    keys = keys_array([pair_key(rng.integers(0, 9, 3), rng.integers(0, 9, 4)) for _ in range(1000)])
    keys = np.unique(keys)
    values = rng.normal(size=keys.size)
    writer = Store(tmp_path, IDENTITY)
    writer.add(keys[:300], values[:300], np.full(300, 4))
    writer.add(keys[300:500], values[300:500], np.full(200, 4))
    for reader in (writer, Store(tmp_path, IDENTITY)):
        logps, found = reader.lookup(keys)
        assert found[:500].all() and not found[500:].any()
        assert (logps[:500] == values[:500]).all() and not logps[500:].any()


def test_equal_keys_have_one_value_and_lists_are_told_together(tmp_path):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(20))
    fill(store, range(20, 30), noise=1.0)
    numbers = np.random.default_rng(0).integers(0, 40, 200)
    lists = [Wanted(keys_of(numbers)), Wanted(keys_of(range(0, 40, 3)))]
    store.tell(*lists)
    for wanted, asked in zip(lists, (numbers, np.arange(0, 40, 3)), strict=True):
        logps, found = wanted.values()
        expected = value_of(IDENTITY, asked) + (asked >= 20)
        assert (found == (asked < 30)).all() and (logps == np.where(found, expected, 0)).all()


def test_distinct_keys_stand_where_they_come_first():
    draw = np.random.default_rng(0)
    for high, low in ((3, 3), (1, 9), (50, 2), (2**63, 2)):
        keys = np.empty(200, KEY)
        keys["high"], keys["low"] = draw.integers(0, high, 200), draw.integers(0, low, 200)
        first, same_as = distinct(keys)
        assert (keys[first][same_as] == keys).all() and first.size == np.unique(keys).size
        assert all((keys[:place] != keys[place]).all() for place in first.tolist())


def test_of_a_store_far_larger_than_what_is_wanted_few_shards_wait_to_be_taken(tmp_path, monkeypatch):
    writer = Store(tmp_path, IDENTITY)
    for first in range(0, 300, 10):
        fill(writer, range(first, first + 10))
    events, read = [], LocalStorage.read
    monkeypatch.setattr(LocalStorage, "concurrency", 2)
    monkeypatch.setattr(LocalStorage, "read", lambda *given: (events.append(1), read(*given))[1])

    class Counted(Wanted):
        def take(self, *given: np.ndarray) -> None:
            events.append(-1)
            super().take(*given)

    store = Store(tmp_path, IDENTITY)
    events.clear()
    store.tell(wanted := Counted(keys_of(range(5))))
    assert wanted.values()[1].all() and events.count(-1) == 30
    assert max(np.cumsum(events)) == 2


def test_keys_that_agree_in_their_first_half_are_told_apart(tmp_path):
    keys = np.zeros(3, dtype=KEY)
    keys["high"], keys["low"] = 7, [5, 3, 9]
    store = Store(tmp_path, IDENTITY)
    store.add(keys[:2], np.array([0.5, 0.25]), np.array([1, 1]))
    logps, found = Store(tmp_path, IDENTITY).lookup(keys)
    assert logps.tolist() == [0.5, 0.25, 0.0] and found.tolist() == [True, True, False]


def test_a_shard_holds_what_its_columns_say(tmp_path):
    store = Store(tmp_path, IDENTITY)
    keys = keys_of(range(1))
    store.add(keys, np.array([-1.5]), np.array([2]))
    (shard,) = shards_of(store)
    assert pq.read_table(shard).to_pylist() == [{"key": keys.tobytes(), "logp": -1.5, "tokens": 2}]


@pytest.mark.parametrize("attempt", range(4))
def test_of_two_numbers_for_one_pair_the_same_counts_whatever_the_shards_are_called(tmp_path, attempt):
    """Two devices round differently; the names of their shards are chance, and so is who is first."""
    keys = keys_of(range(50))
    values = np.stack([value_of(IDENTITY, range(50)), value_of(IDENTITY, range(50)) + 1e-4])
    values[:, ::2] = values[::-1, ::2]  # none is the smaller one throughout
    store = Store(tmp_path, IDENTITY)
    for mine in values[:: 1 if attempt % 2 else -1]:
        store.add(keys, mine, np.ones(50))
    for reader in (store, Store(tmp_path, IDENTITY)):
        assert (reader.lookup(keys)[0] == values.min(axis=0)).all()


def test_a_value_that_is_no_number_is_refused(tmp_path):
    store = Store(tmp_path, IDENTITY)
    with pytest.raises(UserError, match="1 of 2 pairs a log-prob that is no finite number.*try fp32"):
        store.add(keys_of(range(2)), np.array([-1.0, np.nan]), np.ones(2))
    assert not shards_of(store)


def _damage(shard: Path, kind: str) -> None:
    content = bytearray(shard.read_bytes())
    if kind == "deleted":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif kind == "emptied":
        shard.write_bytes(b"")
    elif kind == "grown":
        shard.write_bytes(content + b"\0")
    elif kind == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)


@pytest.mark.parametrize("kind", ("deleted", "truncated", "emptied", "grown", "flipped"))
def test_a_damaged_shard_costs_its_own_pairs_and_no_others(tmp_path, kind):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(100))
    (first,) = shards_of(store)
    fill(store, range(100, 200))
    _damage(first, kind)
    said = []
    reader = Store(tmp_path, IDENTITY, warn=said.append)
    logps, found = reader.lookup(keys_of(range(200)))
    assert found.tolist() == [False] * 100 + [True] * 100
    assert (logps[100:] == value_of(IDENTITY, range(100, 200))).all()
    assert [f"{first.name} in the reference store is damaged" in text for text in said] == [True] * (kind != "deleted")
    # set aside, so it is told once; and scoring it again makes the store whole
    fill(reader, range(100))
    logps, found = Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(200)))
    assert found.all() and (logps == value_of(IDENTITY, range(200))).all() and len(said) <= 1


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_no_flipped_bit_goes_unnoticed(tmp_path, place):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(8))
    (shard,) = shards_of(store)
    content = bytearray(shard.read_bytes())
    content[place * len(content) // 400] ^= 1 << place % 8
    shard.write_bytes(content)
    assert not found_in(tmp_path, 8)[1].any()


def test_a_shard_of_another_model_is_set_aside_wherever_it_comes_from(tmp_path):
    mine, other = Store(tmp_path, IDENTITY), Store(tmp_path, OTHER)
    fill(mine, range(10))
    fill(other, range(20))
    (foreign,) = shards_of(other)
    shutil.copy(foreign, mine.folder.path)
    said = []
    logps, found = Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(20)))
    assert found.tolist() == [True] * 10 + [False] * 10 and (logps[:10] == value_of(IDENTITY, range(10))).all()
    assert len(said) == 1 and "belongs to another reference" in said[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no parquet", "is no Parquet file"),
        ({"key": pa.array([b"0" * 16], pa.binary(16)), "logp": [1.0]}, "is no shard of log-probs"),
        ({"key": pa.array([b"0" * 16], pa.binary(16)), "logp": [1.0], "tokens": pa.array([1], pa.int32())}, "another"),
    ],
)
def test_a_file_with_a_shards_name_and_other_content_is_set_aside(tmp_path, content, why):
    if isinstance(content, dict):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(content), sink)
        content = sink.getvalue().to_pybytes()
    store = Store(tmp_path, IDENTITY)
    fill(store, range(5))
    (store.folder.path / f"{hashlib.sha256(content).hexdigest()}.parquet").write_bytes(content)
    said = []
    assert Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(5)))[1].all()
    assert len(said) == 1 and why in said[0]


def test_a_value_that_is_no_number_in_a_shard_is_never_answered(tmp_path):
    store = Store(tmp_path, IDENTITY)
    name, data = encode(keys_of(range(3)), np.array([-1.0, np.inf, -2.0]), np.ones(3), IDENTITY.digest)
    (store.folder.path / name).write_bytes(data)
    assert not found_in(tmp_path, 3)[1].any()


def test_a_copy_of_a_shard_under_another_name_changes_nothing(tmp_path):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(30))
    (shard,) = shards_of(store)
    shutil.copy(shard, shard.with_name("0" * 64 + ".parquet"))
    shutil.copy(shard, shard.with_name("copy of a shard.parquet"))
    logps, found = found_in(tmp_path, 30)
    assert found.all() and (logps == value_of(IDENTITY, range(30))).all()


def test_a_manifest_of_another_reference_is_refused(tmp_path):
    ours, theirs = (Store(tmp_path, one).folder.path / "manifest.json" for one in (IDENTITY, OTHER))
    shutil.copy(theirs, ours)
    differ = f"fingerprint is {OTHER.digest} there and {IDENTITY.digest} here; dtype is bfloat16 there and float32 here"
    with pytest.raises(UserError, match=rf"belongs to another reference \({differ}\): remove its .*give another"):
        Store(tmp_path, IDENTITY)


@pytest.mark.parametrize("ahead", (-1, 1))
def test_a_store_of_another_format_is_refused_with_a_remedy_that_loses_nothing(tmp_path, ahead):
    store = Store(tmp_path, IDENTITY)
    manifest = store.folder.path / "manifest.json"
    # whatever else such a version says in another way
    manifest.write_text(json.dumps({"format": FORMAT + ahead, "fingerprint": "another"}))
    with pytest.raises(UserError) as refusal:
        Store(tmp_path, IDENTITY)
    text = str(refusal.value)
    assert f"is of format {FORMAT + ahead}, and this version of kto_dist knows format {FORMAT}: " in text
    assert "give another reference.store, or use the version of kto_dist that wrote it" in text
    assert "manifest" not in text
    # what a newer version wrote is nothing to clear out
    assert (f"kto-dist store gc {tmp_path} --fingerprint {IDENTITY.digest[:12]}" in text) == (ahead < 0)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe"])
def test_a_lost_or_damaged_manifest_is_written_again(tmp_path, content):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(5))
    manifest = store.folder.path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    said = []
    assert Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(5)))[1].all()
    assert json.loads(manifest.read_text())["weights"] == IDENTITY.weights
    assert len(said) == (content is not None)


FLIPPED = IDENTITY.digest[:-1] + chr(ord(IDENTITY.digest[-1]) ^ 1)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (f'"fingerprint": "{IDENTITY.digest}"', f'"fingerprint": "{FLIPPED}"'),
        ('"attention": "sdpa"', '"attention": "rdpa"'),
        ('"format": 2', '"format": 3'),
        ('"model": "mine"', '"model": "line"'),
    ],
)
def test_a_manifest_of_other_bytes_than_were_written_is_damage_and_no_other_reference(tmp_path, written, found):
    store = Store(tmp_path, IDENTITY, model="mine")
    fill(store, range(5))
    manifest = store.folder.path / "manifest.json"
    text = manifest.read_text()
    assert written in text
    manifest.write_text(text.replace(written, found))
    said = []
    assert Store(tmp_path, IDENTITY, warn=said.append, model="mine").lookup(keys_of(range(5)))[1].all()
    assert said == [f"manifest.json in the reference store ({store.folder}) is damaged: it is written again"]
    assert written in manifest.read_text()


def test_no_bit_of_a_manifest_can_be_another_one_and_change_what_it_says(tmp_path):
    folder = Store(tmp_path, IDENTITY).folder
    manifest, content = folder.path / "manifest.json", read_manifest(folder)
    whole = manifest.read_bytes()
    assert content["weights"] == IDENTITY.weights and "checksum" not in content
    for place in range(len(whole)):
        for bit in range(8):
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = read_manifest(folder)
            # of the checksum's own name nothing hangs
            assert not found or {name: found.get(name) for name in content} == content, (place, bit)


@pytest.mark.parametrize("damage", ({}, {"attention": "rdpa"}, {"format": 3}, {"format": 0}, {"format": None}))
def test_a_manifest_from_before_there_were_checksums_is_read_and_known_by_its_fingerprint(tmp_path, damage):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(5))
    manifest = store.folder.path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["checksum"]
    manifest.write_text(json.dumps(content | damage, indent=1))
    said, damaged = [], bool(damage)
    assert Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(5)))[1].all()
    assert [text for text in said if "is damaged: it is written again" in text] == said and len(said) == damaged
    assert ("checksum" in json.loads(manifest.read_text())) == damaged


def test_a_store_that_cannot_be_created_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reference.store \(.*file/store\) cannot be opened or created.*give a folder"):
        Store(tmp_path / "file" / "store", IDENTITY)


def test_a_full_disk_is_told_keeps_what_was_stored_and_can_go_on(small_disk):
    store = Store(small_disk, IDENTITY)
    with pytest.raises(UserError, match=r"cannot take 2,000 more pairs: .*No space left.*is full: make room"):
        for start in range(0, 20_000, 2000):
            fill(store, range(start, start + 2000))
    # whole or not at all: no temporary file is left either
    names = {path.name for path in store.folder.path.iterdir()}
    assert all(name.endswith((".parquet", ".json")) and not name.startswith(".") for name in names)
    logps, found = found_in(small_disk, 20_000)
    stored = int(found.sum())
    assert stored and found[:stored].all() and (logps[:stored] == value_of(IDENTITY, range(stored))).all()
    shards_of(store)[0].unlink()
    fill(store, range(stored, stored + 1000))
    assert found_in(small_disk, 20_000)[1].sum() == stored - 2000 + 1000


def test_too_little_room_is_told_before_any_work(small_disk):
    store = Store(small_disk, IDENTITY)
    store.begin(1000)
    with pytest.raises(UserError, match=r"has [\d,]+ bytes left, but lacks 1,000,000 pairs, which take .*make room"):
        store.begin(1_000_000)


def test_a_read_only_store_answers_and_refuses_to_grow(small_disk):
    store = Store(small_disk, IDENTITY)
    fill(store, range(100))
    remount(small_disk, "ro")
    reader = Store(small_disk, IDENTITY)
    logps, found = reader.lookup(keys_of(range(100)))
    assert found.all() and (logps == value_of(IDENTITY, range(100))).all()
    with pytest.raises(UserError, match=r"lacks pairs of this run, but cannot be written: .*Read-only.*give a folder"):
        reader.begin(1)
    with pytest.raises(UserError, match=r"cannot take 1 more pairs: .*Read-only"):
        fill(reader, range(1))
    with pytest.raises(UserError, match=r"cannot be opened or created: .*Read-only"):
        Store(small_disk, OTHER)


def test_damage_in_a_read_only_store_is_passed_over(small_disk):
    store = Store(small_disk, IDENTITY)
    fill(store, range(100))
    (shard,) = shards_of(store)
    _damage(shard, "flipped")
    remount(small_disk, "ro")
    for _ in range(2):
        assert not found_in(small_disk, 100)[1].any()


def test_a_file_that_may_not_grow_is_never_half_a_shard(tmp_path):
    job = run_fill(tmp_path, 0, 1000, shard=500, largest_file=4096)
    assert job.communicate() == ("", None) and job.returncode == 2
    assert run_fill(tmp_path, 0, 50, shard=50, largest_file=4096).communicate()[0] == "50\n"
    assert found_in(tmp_path, 1000)[1].sum() == 50
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.parquet"))) == 1 and not list(folder.glob(".*"))


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
def test_a_store_without_room_is_told_as_full_however_the_file_system_counts_room(tmp_path, number):
    class Full(LocalStorage):
        def write(self, name, data):
            if name.endswith(".parquet"):
                raise OSError(number, "no more of it", name)
            super().write(name, data)

    with pytest.raises(UserError, match=r"cannot take 5 more pairs: .*no more of it.*; is full: make room"):
        fill(Store(Full(tmp_path), IDENTITY), range(5), IDENTITY)


def test_jobs_that_fill_one_store_at_once_lose_and_corrupt_nothing(tmp_path):
    # each is a process; they overlap by a half, and the values of the overlap differ by rounding
    jobs = [run_fill(tmp_path, 200 * job, 200 * job + 400, shard=20, noise=job * 1e-6) for job in range(4)]
    said, seen = [], 0
    while any(job.poll() is None for job in jobs):
        logps, found = Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(1000)))
        assert found.sum() >= seen
        seen = int(found.sum())
        assert np.abs(logps - value_of(IDENTITY, range(1000)))[found].max(initial=0) < 1e-5
    assert [job.wait() for job in jobs] == [0] * 4
    assert all(job.stdout.close() is None for job in jobs)
    logps, found = Store(tmp_path, IDENTITY, warn=said.append).lookup(keys_of(range(1000)))
    lowest = np.maximum(0, (np.arange(1000) - 200) // 200)  # the first job that covers a pair adds least
    assert found.all() and np.allclose(logps, value_of(IDENTITY, range(1000)) + 1e-6 * lowest, rtol=0, atol=1e-9)
    assert not said


@pytest.mark.parametrize("attempts", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_any_moment_a_job_loses_at_most_the_shard_at_hand(tmp_path, attempts):
    rng = np.random.default_rng(attempts)
    for attempt in range(attempts):
        root = tmp_path / str(attempt)
        job = run_fill(root, 0, 100_000, shard=50)
        acknowledged = 0
        for _ in range(int(rng.integers(1, 40))):
            acknowledged = int(job.stdout.readline())
        time.sleep(rng.random() * 0.003)
        job.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, job.stdout.read().split("\n")[:-1])])
        job.wait()
        job.stdout.close()
        said = []
        logps, found = Store(root, IDENTITY, warn=said.append).lookup(keys_of(range(acknowledged + 200)))
        # the one shard that was in flight is there as a whole or not at all
        assert found[:acknowledged].all() and found.sum() - acknowledged in (0, 50)
        assert (logps[found] == value_of(IDENTITY, range(acknowledged + 200))[found]).all() and not said


def test_many_readers_of_one_damaged_shard_agree(tmp_path):
    store = Store(tmp_path, IDENTITY)
    for start in range(0, 500, 50):
        fill(store, range(start, start + 50))
    _damage(shards_of(store)[3], "flipped")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: found_in(tmp_path, 500)[1].sum(), range(8)))
    assert found == [450] * 8


@pytest.mark.parametrize(("number", "gone"), [(errno.ESTALE, True), (errno.EIO, False)])
def test_a_shard_that_an_nfs_server_removed_while_it_was_read_is_gone(tmp_path, number, gone):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(10))
    fill(store, range(10, 20))
    first, said = shards_of(store)[0].name, []

    class RemovedMeanwhile(LocalStorage):
        def read(self, name):
            if name == first:
                if gone:
                    self.remove(name)
                raise OSError(number, os.strerror(number), name)
            return super().read(name)

    reader = Store(RemovedMeanwhile(tmp_path), IDENTITY, warn=said.append)
    if gone:
        assert reader.lookup(keys_of(range(20)))[1].sum() == 10 and not said
    else:
        with pytest.raises(UserError, match=r"cannot be read: .*Input/output error"):
            reader.lookup(keys_of(range(20)))

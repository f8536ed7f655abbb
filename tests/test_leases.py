"""Leases: of all who want a piece one has it, for as long as it lives and says so."""

import errno
import json
import os
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_scorer import IDENTITY, fill
from lease_holders import Clock, held, leases_in, of_another_machine

from kto_dist.base.errors import UserError
from kto_dist.base.files import create_whole
from kto_dist.base.processes import whereabouts
from kto_dist.store.gc import collect, plan_gc
from kto_dist.store.leases import Leases, pieces_held
from kto_dist.store.shards import NAME
from kto_dist.store.storage import LocalStorage, Storage, open_storage
from kto_dist.store.store import Store


@pytest.fixture(params=("s3", "memory", "folder"))
def folder(request, tmp_path: Path) -> Storage:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_storage(f"s3://bucket/{uuid.uuid4().hex}")
    return open_storage(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else tmp_path / "store")


def test_a_piece_is_one_holders_until_it_is_given_back(folder):
    first, second = Leases(folder), Leases(folder)
    with first.take(["a"]) as lease:
        assert second.take(["a"]) is None
        with second.take(["a", "b"]) as other:
            assert (lease.piece, other.piece) == ("a", "b")
        assert leases_in(folder) == ["piece-a.0.json"]
    assert not leases_in(folder)
    with second.take(["a"]) as again:
        assert again.piece == "a"
    assert not folder.files()


def test_of_many_that_ask_at_once_each_piece_goes_to_one(tmp_path):
    desks = [Leases(LocalStorage(tmp_path)) for _ in range(8)]
    pieces = ["a", "b", "c"]
    with ThreadPoolExecutor(8) as pool:
        taken = [lease for lease in pool.map(lambda desk: desk.take(pieces), desks) if lease is not None]
    assert sorted(lease.piece for lease in taken) == pieces
    for lease in taken:
        lease.end()


def test_a_holder_elsewhere_keeps_its_piece_until_it_was_silent_for_its_time(folder):
    clock = Clock()
    name = of_another_machine(folder, "a", beat=1)
    desk = Leases(folder, clock=clock)
    assert desk.take(["a"]) is None
    clock.now = 9.0
    of_another_machine(folder, "a", beat=2)  # it has said something
    assert desk.take(["a"]) is None
    clock.now = 18.9
    assert desk.take(["a"]) is None
    clock.now = 19.1
    with desk.take(["a"]) as lease:
        assert lease.piece == "a" and name not in leases_in(folder)
    assert not leases_in(folder)


def test_of_two_that_see_a_lease_end_one_takes_the_piece(folder):
    clock = Clock()
    of_another_machine(folder, "a")
    first, second = Leases(folder, clock=clock), Leases(folder, clock=clock)
    assert first.take(["a"]) is None and second.take(["a"]) is None
    clock.now = 11.0
    stale = folder.read("piece-a.0.json")
    lease = first.take(["a"])
    assert lease is not None
    # the second one has listed the folder before the first one was done
    folder.write("piece-a.0.json", stale)
    assert second.take(["a"]) is None
    lease.end()


def test_a_listing_that_misses_a_piece_as_it_changes_hands_gives_it_to_nobody_else(tmp_path):
    class Blind(LocalStorage):
        """Its first listing shows nothing."""

        looks = 0

        def files(self):
            self.looks += 1
            return super().files() if self.looks > 1 else []

    name = "piece-a.1.json"
    LocalStorage(tmp_path).write(name, json.dumps({**whereabouts(), "seconds": 100.0}).encode())
    assert Leases(Blind(tmp_path)).take(["a"]) is None
    assert leases_in(LocalStorage(tmp_path)) == [name]


def test_a_process_of_this_machine_that_is_gone_holds_nothing(folder):
    with subprocess.Popen(["sleep", "60"]) as process:
        who = whereabouts(process.pid)
        folder.write("piece-a.0.json", json.dumps({**who, "seconds": 100.0}).encode())
        desk = Leases(folder)
        assert desk.take(["a"]) is None
        process.kill()
    with desk.take(["a"]) as lease:
        assert lease.piece == "a"


def test_a_holder_says_again_and_again_that_it_is_there(tmp_path):
    folder = LocalStorage(tmp_path)
    with held(folder, Clock(), seconds=0.2) as lease:
        first = folder.read("piece-a.0.json")
        while folder.read("piece-a.0.json") == first:
            time.sleep(0.01)
        assert not lease.lost


def test_what_is_left_of_pieces_that_are_done_is_swept_up_and_no_living_holders_lease(tmp_path):
    folder = LocalStorage(tmp_path)
    with subprocess.Popen(["true"]) as process:
        gone = json.dumps({**whereabouts(process.pid), "seconds": 100.0}).encode()
    for name in ("piece-a.0.json", "piece-a.1.json", "piece-b.0.json"):
        folder.write(name, gone)
    of_another_machine(folder, "c")
    Leases(folder).sweep({"a", "c"})
    assert leases_in(folder) == ["piece-b.0.json", "piece-c.0.json"]


def test_a_lease_that_may_not_be_removed_does_not_keep_others_from_its_piece(tmp_path):
    class Sticky(LocalStorage):
        """A folder in which only its writer removes a file."""

        def remove(self, name):
            if name == "piece-a.0.json":
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().remove(name)

    clock = Clock()
    of_another_machine(LocalStorage(tmp_path), "a")
    desk = Leases(Sticky(tmp_path), clock=clock)
    assert desk.take(["a"]) is None
    clock.now = 11.0
    with desk.take(["a"]) as lease:
        assert lease.piece == "a"


def test_a_holder_that_this_machine_does_not_show_keeps_its_piece_for_its_time(tmp_path, monkeypatch):
    def kill(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    clock = Clock()
    with subprocess.Popen(["sleep", "60"]) as process:
        who = whereabouts(process.pid)
        process.kill()
    # there is no such process in /proc, and it can be sent no signal: as where other users' are hidden
    monkeypatch.setattr(os, "kill", kill)
    LocalStorage(tmp_path).write("piece-a.0.json", json.dumps({**who, "seconds": 10.0}).encode())
    desk = Leases(LocalStorage(tmp_path), clock=clock)
    assert desk.take(["a"]) is None
    clock.now = 11.0
    with desk.take(["a"]) as lease:
        assert lease.piece == "a"


def test_who_waits_knows_for_whom(tmp_path):
    folder = LocalStorage(tmp_path)
    of_another_machine(folder, "a", pid=12)
    of_another_machine(folder, "b", pid=13)
    desk = Leases(folder)
    assert desk.take(["a", "b"]) is None
    assert desk.holders(["a"]) == ["process 12 on elsewhere"]
    folder.remove("piece-a.0.json")
    assert desk.take(["b"]) is None and not desk.holders(["a"])


def test_pieces_of_processes_of_this_machine_that_are_gone_are_held_by_nobody(tmp_path):
    folder = LocalStorage(tmp_path)
    of_another_machine(folder, "a")
    with subprocess.Popen(["true"]) as process:
        folder.write("piece-b.0.json", json.dumps(whereabouts(process.pid)).encode())
    folder.write("piece-c.0.json", b"{")
    assert pieces_held(folder) == {"a", "c"}


def test_a_lease_that_is_replaced_while_it_is_read_over_nfs_is_read_again(tmp_path, monkeypatch):
    folder, real, asked = LocalStorage(tmp_path), Path.read_bytes, []
    of_another_machine(folder, "a")

    def stale_at_first(path):
        asked.append(path)
        if len(asked) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    desk = Leases(folder)
    monkeypatch.setattr(Path, "read_bytes", stale_at_first)
    assert desk.take(["a"]) is None and len(asked) == 2


@pytest.mark.parametrize("content", (b"", b"[]", b"{"))
def test_a_lease_that_cannot_be_read_counts_for_its_time(tmp_path, content):
    folder, clock = LocalStorage(tmp_path), Clock()
    clock.now = 1000.0
    folder.write("piece-a.0.json", content)
    desk = Leases(folder, seconds=5.0, clock=clock)
    assert desk.take(["a"]) is None
    clock.now = 1005.1
    with desk.take(["a"]) as lease:
        assert lease.piece == "a"


def test_where_two_can_create_one_file_workers_are_refused(tmp_path):
    class Careless(LocalStorage):
        def create(self, name, data):
            self.write(name, data)
            return True

    with pytest.raises(UserError, match="two processes could create one file.*If-None-Match"):
        Leases(Careless(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError, match="creating files in .*store, and that fails.*without --worker"):
        Leases(LocalStorage(tmp_path / "store"))


def test_a_full_disk_is_told_as_one(tmp_path):
    class Full(LocalStorage):
        room = 2

        def create(self, name, data):
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().create(name, data)

    desk = Leases(Full(tmp_path))
    with pytest.raises(UserError, match="cannot be worked on.*it is full: make room"):
        desk.take(["a"])
    full = Full(tmp_path)
    full.room = 0
    with pytest.raises(UserError, match="that fails: .*No space left on device; make room"):
        Leases(full)


def test_a_file_is_created_by_one_alone_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    assert create_whole(tmp_path / "a", b"1") and not create_whole(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def test_a_link_whose_success_was_not_told_is_ours_all_the_same(tmp_path, monkeypatch):
    real = os.link

    def link(source, target):
        real(source, target)
        raise FileExistsError(target)  # what NFS answers when it is asked again

    monkeypatch.setattr(os, "link", link)
    assert create_whole(tmp_path / "a", b"1")


def test_gc_removes_leases_of_workers_that_have_ended(tmp_path):
    store = Store(tmp_path, IDENTITY)
    fill(store, range(10))
    of_another_machine(store.folder, "a")
    assert all(done for _, done in collect(tmp_path, plan_gc(tmp_path)))
    assert not leases_in(store.folder)


def test_news_of_a_store_are_told_once_whoever_stored_them(folder):
    store, other = Store(folder, IDENTITY), Store(folder, IDENTITY)
    fill(store, range(10), IDENTITY)
    fill(other, range(10, 30), IDENTITY)
    assert sorted(len(shard) for shard in store.news()) == [10, 20]
    assert not list(store.news())
    fill(other, range(30, 33), IDENTITY)
    assert [len(shard) for shard in store.news()] == [3]


def test_a_shard_of_ones_own_that_is_gone_before_it_was_listed_is_missed(folder):
    store = Store(folder, IDENTITY)
    fill(store, range(10), IDENTITY)
    assert not store.has_lost()
    (shard,) = (file.name for file in store.folder.files() if NAME.fullmatch(file.name))
    store.folder.remove(shard)
    assert store.has_lost() and not store.has_lost()


def test_a_shard_that_a_listing_does_not_show_yet_is_not_lost(tmp_path):
    class Late(LocalStorage):
        def files(self):
            return []

    store = Store(Late(tmp_path), IDENTITY)
    fill(store, range(10), IDENTITY)
    assert not store.has_lost()

"""Holders that are stopped, hang, or find their piece taken: never do two go on with one, and none keeps it so."""

import json
import subprocess
import time

import pytest
from lease_holders import Clock, held, leases_in, of_another_machine, taken_over

from kto_dist.base.processes import whereabouts
from kto_dist.store.leases import TIMES_FIRST, TIMES_SLOWEST, LeaseLost, Leases, Patience
from kto_dist.store.storage import LocalStorage, Storage


def test_a_holder_whose_piece_was_taken_learns_it_and_leaves_the_new_ones_lease_alone(tmp_path):
    folder = LocalStorage(tmp_path)
    lease = held(folder, Clock(), seconds=0.2)
    lease.keep()
    other = {**whereabouts(), "token": "other", "seconds": 100.0}
    while not lease.lost:  # it may just be about to write its own
        folder.write("piece-a.0.json", json.dumps(other).encode())
        time.sleep(0.01)
    with pytest.raises(LeaseLost):
        lease.keep()
    lease.end()
    assert json.loads(folder.read("piece-a.0.json")) == other


def test_a_holder_that_was_stopped_asks_whether_it_still_has_its_piece_before_it_goes_on(tmp_path):
    folder, clock = LocalStorage(tmp_path), Clock()
    lease = held(folder, clock)
    before = folder.read("piece-a.0.json")
    lease.keep()
    assert folder.read("piece-a.0.json") == before  # it has just said so
    clock.now = 300.0  # longer than its lease, which nobody has missed
    lease.keep()
    assert folder.read("piece-a.0.json") != before
    clock.now = 600.0
    taken_over(folder)
    with pytest.raises(LeaseLost):
        lease.keep()
    lease.end()
    assert leases_in(folder) == ["piece-a.1.json"]


def test_a_holder_whose_piece_is_taken_while_it_renews_its_lease_gives_way(tmp_path):
    class Slow(LocalStorage):
        """Between the look and the write another process takes over."""

        def write(self, name, data):
            taken_over(self)
            super().write(name, data)

    clock = Clock()
    lease = held(Slow(tmp_path), clock)
    clock.now = 60.0
    with pytest.raises(LeaseLost):
        lease.keep()
    assert leases_in(LocalStorage(tmp_path)) == ["piece-a.1.json"]
    lease.end()


def test_a_holder_that_is_stopped_while_it_renews_its_lease_gives_it_up(tmp_path):
    class Stopped(LocalStorage):
        """Between the look and the write its process is stopped; the next term is over when it goes on."""

        def write(self, name, data):
            clock.now += 500.0
            super().write(name, data)

    clock = Clock()
    lease = held(Stopped(tmp_path), clock)
    clock.now = 60.0
    with pytest.raises(LeaseLost):
        lease.keep()
    assert not leases_in(LocalStorage(tmp_path))
    lease.end()


def test_who_takes_a_piece_leaves_no_earlier_holders_lease_to_go_on_with(tmp_path):
    folder, clock = LocalStorage(tmp_path), Clock()
    stopped = held(folder, Clock())
    # who took it over was killed before it removed that lease
    with subprocess.Popen(["true"]) as process:
        folder.write("piece-a.1.json", json.dumps({**whereabouts(process.pid), "seconds": 100.0}).encode())
    with Leases(folder, clock=clock).take(["a"]):
        assert leases_in(folder) == ["piece-a.2.json"]
    assert not leases_in(folder)
    stopped.end()


def _renewals(folder: Storage, count: int) -> None:
    """Waits for so many."""
    first = json.loads(folder.read("piece-a.0.json"))["beat"]
    while json.loads(folder.read("piece-a.0.json"))["beat"] < first + count:
        time.sleep(0.01)


def test_a_holder_that_shows_no_sign_of_work_leaves_its_piece_to_others_and_says_so(tmp_path):
    folder, said = LocalStorage(tmp_path), []
    lease = held(folder, Clock(), seconds=0.2, patience=Patience(least=0.05, warn=said.append))
    while not lease.lost or not said:
        time.sleep(0.01)
    assert not leases_in(folder) and len(said) == 1 and "the piece at hand is left to others" in said[0]
    with Leases(folder).take(["a"]) as other:
        with pytest.raises(LeaseLost):
            lease.keep()
        lease.end()
        assert other.piece == "a" and len(leases_in(folder)) == 1


def test_patience_is_for_as_long_as_work_takes_and_longer_until_the_first_sign(tmp_path):
    folder, patience = LocalStorage(tmp_path), Patience(least=1000.0)
    assert patience.seconds == TIMES_FIRST * 1000.0
    with held(folder, Clock(), seconds=0.2, patience=patience) as lease:
        _renewals(folder, 4)
        lease.keep()  # the first one: what came before was loading
        assert patience.slowest == 0.0 and patience.seconds == 1000.0
        _renewals(folder, 4)
        lease.keep()
        lease.keep()
    assert patience.slowest is not None and patience.slowest >= 0.15
    patience.learn(300.0)
    patience.learn(2.0)
    assert patience.seconds == TIMES_SLOWEST * 300.0


def test_a_sign_of_work_counts_from_the_one_before(tmp_path):
    learned: list[float] = []

    class Noting(Patience):
        def learn(self, seconds: float) -> None:
            learned.append(seconds)

    folder = LocalStorage(tmp_path)
    with held(folder, Clock(), seconds=0.04, patience=Noting(least=1000.0)) as lease:
        _renewals(folder, 20)
        lease.keep()
        lease.keep()
    assert learned[1] < learned[0]


def test_whose_work_takes_longer_than_it_has_patience_has_more_for_the_next_piece(tmp_path):
    folder, patience = LocalStorage(tmp_path), Patience(least=0.05, slowest=0.0)
    with held(folder, Clock(), seconds=0.2, patience=patience) as lease:
        while not lease.lost:
            time.sleep(0.01)
        with pytest.raises(LeaseLost):
            lease.keep()
    assert patience.seconds >= TIMES_SLOWEST * 0.1


def test_a_holder_that_goes_on_just_as_its_lease_is_taken_keeps_its_piece(tmp_path):
    class Awake(LocalStorage):
        """Its holder goes on as soon as somebody creates the next term."""

        def create(self, name, data):
            if name == "piece-a.1.json":
                of_another_machine(self, "a", beat=2)
            return super().create(name, data)

    clock = Clock()
    of_another_machine(LocalStorage(tmp_path), "a", beat=1)
    desk = Leases(Awake(tmp_path), clock=clock)
    assert desk.take(["a"]) is None
    clock.now = 11.0
    assert desk.take(["a"]) is None
    assert leases_in(LocalStorage(tmp_path)) == ["piece-a.0.json"]

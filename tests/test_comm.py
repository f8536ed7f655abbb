"""Processes meet where a launcher says so, and a single one alone."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kto_dist.base import comm
from kto_dist.base.ports import free_port, held_port

PROGRAM = "from kto_dist.base import comm; comm.init(); print(comm.world_size(), comm.broadcast(7))"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a process group of this process; group and environment go with the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    comm.init()
    yield
    comm.shutdown()


def test_a_process_that_a_single_one_starts_is_alone_as_well(alone):
    """Both are in their process groups at once; what the first wrote into its environment is inherited."""
    assert os.environ["WORLD_SIZE"] == "1"
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 7\n"), done.stderr


def _meets(rank: int, size: int, port: int, seconds: float, **more: str) -> subprocess.Popen[str]:
    program = (
        "import sys; from datetime import timedelta; from kto_dist.base.meeting import meet; "
        "from kto_dist.base.errors import UserError\n"
        "try: meet(int(sys.argv[1]), int(sys.argv[2]), timedelta(seconds=float(sys.argv[3]))); print('met')\n"
        "except UserError as mistake: print(mistake)"
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "KTO_DIST_HOST": f"node-{rank}"}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(rank), str(size), str(seconds)],
        env={**os.environ, **environment, **more},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as found:
        yield found


def test_a_port_that_is_held_is_given_to_nobody_and_ranks_meet_there(port):
    ranks = [_meets(rank, 2, port, 240) for rank in range(2)]
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as other, pytest.raises(OSError):
            other.bind(("", port))
    assert [rank.communicate()[0] for rank in ranks] == ["met\n"] * 2


def test_a_port_for_later_is_free_and_none_that_the_system_gives_away():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10 and max(ports) < max(first, 32768)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("", port))


@pytest.mark.soak
def test_a_rank_that_does_not_come_is_named(port):
    ranks = [_meets(rank, 3, port, 20) for rank in (0, 2)]
    said = [rank.communicate()[0] for rank in ranks]
    for words in said:
        assert "1 of 3 ranks have not come within 20 s: 1." in words and "There are those of node-0, node-2" in words


def test_a_rank_that_an_earlier_start_has_left_does_not_join_a_later_one(port):
    ranks = [_meets(rank, 2, port, 5, KTO_DIST_START=start) for rank, start in ((0, "later"), (1, "earlier"))]
    said = ranks[0].communicate()[0]
    assert "1 of 2 ranks have not come within 5 s: 1. There are those of node-0" in said
    assert "met" not in ranks[1].communicate()[0]


def test_hosts_that_count_other_ranks_are_named(port):
    ranks = [_meets(0, 3, port, 60), _meets(1, 2, port, 60)]
    said = [rank.communicate()[0] for rank in ranks]
    for words in said:
        assert "the job has 3 ranks by rank 0 on node-0, and 2 by rank 1 on node-1 (WORLD_SIZE)" in words


def test_a_port_that_another_job_has_is_told_with_what_names_another():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        (said, _) = _meets(0, 2, taken, 20).communicate()
    assert said.startswith(f"MASTER_PORT {taken} is taken on node-0, where rank 0 is") and "--master-port" in said


def test_a_first_rank_that_cannot_be_reached_is_named(port):
    (said, _) = _meets(1, 2, port, 2).communicate()
    assert f"rank 1 on node-1 does not reach rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}" in said

"""Processes meet where a launcher says so, and a single one alone."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kto_dist.base import comm

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

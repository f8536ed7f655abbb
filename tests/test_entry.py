"""An error ends all ranks of a job, wherever they wait, with one status; and it is said once."""

import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from kto_dist.base import agree, comm, restart
from kto_dist.base.errors import UserError
from kto_dist.commands import entry

Errors = dict[int, Exception]


def _job(folder: Path, errors: Errors, agreed: bool) -> int:
    """Ranks with an error raise it while the others wait for them; the status of this one."""
    rank = comm.rank()
    # not file 2, where torch says at any moment what it thinks of connections that have closed
    sys.stderr = (folder / f"said-{rank}").open("w", buffering=1)
    if len(errors) == comm.world_size() or (agreed and {type(error) for error in errors.values()} == {UserError}):
        restart.SECONDS_TO_JOIN = 240.0  # all come with one mistake, on a busy machine one well after another

    def meet() -> None:
        if rank in errors:
            raise errors[rank]

    def work() -> None:
        with restart.before(lambda failed: (folder / f"last-words-{rank}").write_text(str(failed)) and None):
            if agreed:
                agree.side_by_side(meet)
            else:
                meet()
                time.sleep(100)  # in a collective, for ranks that are still there

    return entry.main(["train"], work_of=lambda job, words: work)


def said(folder: Path) -> str:
    return "".join((folder / f"said-{rank}").read_text() for rank in range(3))


@pytest.mark.parametrize(
    ("alone", "error", "status"),
    [(0, UserError("no room"), 2), (2, UserError("no room"), 2), (2, ValueError("a bug"), 1)],
)
def test_an_error_of_one_rank_ends_the_others_with_its_status_and_is_said_with_its_number(
    tmp_path, alone, error, status
):
    first = min({0, 1, 2} - {alone})
    with pytest.raises(RuntimeError, match=rf"rank {first} died without a result \(status {status}\)"):
        run_ranks(_job, 3, tmp_path, {alone: error}, False)
    words = said(tmp_path)
    assert words.count(str(error)) == 1 and words.startswith(f"rank {alone}: ")
    assert (words == f"rank {alone}: error: no room\n") == (status == 2)
    # what a run's record is told, on the ranks that waited
    told = {rank for rank in range(3) if (tmp_path / f"last-words-{rank}").exists()}
    assert told == {0, 1, 2} - {alone} and (tmp_path / f"last-words-{first}").read_text() == "True"


def test_an_error_that_all_ranks_have_met_is_said_once_and_without_a_number(tmp_path):
    assert run_ranks(_job, 3, tmp_path, {rank: UserError("no room") for rank in range(3)}, False) == [2, 2, 2]
    assert said(tmp_path) == "error: no room\n"


def test_a_mistake_that_ranks_have_agreed_on_is_said_once(tmp_path):
    assert run_ranks(_job, 3, tmp_path, {1: UserError("no room")}, True) == [2, 2, 2]
    assert said(tmp_path) == "error: no room\n"


def test_of_a_failure_that_ranks_have_agreed_on_the_one_that_failed_tells(tmp_path):
    with pytest.raises(RuntimeError, match=r"rank 0 died without a result \(status 1\)"):
        run_ranks(_job, 3, tmp_path, {1: ValueError("a bug")}, True)
    assert said(tmp_path).startswith("rank 1: Traceback") and "another rank failed" not in said(tmp_path)

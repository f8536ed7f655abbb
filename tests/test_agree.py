"""Ranks that agree: sums over a group, and one result or one error on all of them."""

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from kto_dist.base import agree, comm
from kto_dist.base.errors import UserError


def test_a_sum_runs_over_the_group_that_it_names():
    assert run_ranks(_sums, 2) == [
        {"WORLD": (0, 2, [1.0, 0.0]), "DATA": (0, 2, [1.0, 0.0]), "SEQUENCE": (0, 1, [0.0, 0.0])},
        {"WORLD": (1, 2, [1.0, 0.0]), "DATA": (1, 2, [1.0, 0.0]), "SEQUENCE": (0, 1, [1.0, 1.0])},
    ]


def _sums():
    found = {}
    for group in comm.Group:
        total, least = (reduce(torch.tensor([float(comm.rank())]), group) for reduce in (comm.sum_, comm.min_))
        found[group.name] = comm.rank(group), comm.size(group), [total.item(), least.item()]
    return found


@pytest.mark.parametrize("way", ("together", "on_main", "once_per_host"))
def test_what_one_rank_finds_wrong_is_the_same_error_on_all(way):
    assert run_ranks(_mistaken, 2, way) == ["no such file"] * 2


def _mistaken(way):
    def work():
        if comm.is_main():
            raise UserError("no such file")

    with pytest.raises(UserError) as caught:
        getattr(agree, way)(work)
    return str(caught.value)


def test_a_failure_of_the_rank_that_works_is_a_failure_everywhere_and_itself_where_it_happened():
    assert run_ranks(_failing, 2) == ["KeyError: 'gone'", "OthersFailed: another rank failed: 'gone'"]


def _failing():
    with pytest.raises((KeyError, RuntimeError)) as caught:
        agree.on_main(lambda: {}["gone"])
    return f"{type(caught.value).__name__}: {caught.value}"


def test_rank_0_works_alone_and_all_get_what_it_made(tmp_path):
    assert run_ranks(_works, 2, tmp_path) == [None, None]
    assert (tmp_path / "who").read_text() == "0\n"


def _works(folder):
    def work():
        with (folder / "who").open("a") as file:
            file.write(f"{comm.rank()}\n")

    return agree.on_main(work)


def test_once_per_host_runs_on_the_first_rank_of_each_host_and_a_host_gets_its_own_result():
    # four ranks, as two hosts of two
    assert run_ranks(_hosts, 4) == [("made by", 0), ("made by", 0), ("made by", 2), ("made by", 2)]


def _hosts():
    os.environ["LOCAL_RANK"] = str(comm.rank() % 2)
    return agree.once_per_host(lambda: ("made by", comm.rank()))


def test_ranks_that_differ_are_named_with_their_values_and_the_remedy():
    said = run_ranks(_differing, 3)
    told = "(ranks 0, 1: a, rank 2: b)"
    assert said == [f"the model differs between hosts {told}, and every host must have the same: copy"] * 3


def _differing():
    assert agree.same_everywhere(Path("x"), "the file", "copy it") == Path("x")
    with pytest.raises(UserError) as caught:
        agree.same_everywhere("aab"[comm.rank()], "the model", "copy")
    return str(caught.value)

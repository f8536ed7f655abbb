"""Hosts that differ are refused before anything is loaded, by name, with everything that differs.

Two ranks stand for two hosts: each is local rank 0, and is called as a host of its own.
"""

import os
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config

from kto_dist.base import agree, comm, hosts
from kto_dist.base.errors import UserError
from kto_dist.training import agreement
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.precompute import precompute


def as_two_hosts() -> None:
    os.environ["LOCAL_RANK"] = "0"
    os.environ["KTO_DIST_HOST"] = f"node-{'ab'[comm.rank()]}"


def _refused(job: str, configs: list[Config]) -> str:
    as_two_hosts()
    with pytest.raises(UserError) as caught:
        (train if job == "train" else precompute)(configs[comm.rank()])
    return str(caught.value)


@pytest.mark.parametrize("job", ["train", pytest.param("precompute", marks=pytest.mark.soak)])
def test_a_host_with_other_settings_is_refused_with_every_difference_and_nothing_is_made(
    tmp_path, tiny_model, tiny_log, job
):
    same = tiny_config(tmp_path, tiny_model, tiny_log)
    other = tiny_config(tmp_path, tiny_model, tiny_log, train__lr=2e-3, objective__beta=0.2, train__max_steps=4)
    rate = ["  train.lr: node-a (rank 0): 0.001, node-b (rank 1): 0.002"] if job == "train" else []
    said = run_ranks(_refused, 2, job, [same, other])
    assert said[0] == said[1]
    assert said[0].splitlines() == [
        "hosts disagree, and every host must have the same:",
        "  objective.beta: node-a (rank 0): 0.1, node-b (rank 1): 0.2",
        "  train.max_steps: node-a (rank 0): 5, node-b (rank 1): 4",
        *rate,
        "  -> start the same command with the same config file on each of them",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_host_with_another_options_file_of_the_same_name_is_refused(tmp_path, tiny_model, tiny_log, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "ds.json").write_text(f'{{"wall_clock_breakdown": {str(name == "a").lower()}}}')
    config = tiny_config(tmp_path, tiny_model, tiny_log, deepspeed__config="ds.json")
    said = run_ranks(_refused_in_folders, 2, tmp_path, config)[0]
    assert "the content of deepspeed.config: node-a (rank 0): " in said and "copy the same files to each" in said


def _refused_in_folders(folder: Path, config: Config) -> str:
    os.chdir(folder / "ab"[comm.rank()])
    return _refused("train", [config, config])


def test_a_host_may_have_its_own_cores_and_disks(tmp_path, tiny_model, tiny_log):
    configs = [
        tiny_config(
            tmp_path,
            tiny_model,
            tiny_log,
            data__workers=workers,
            data__cache=f"cache-{workers}",
            train__output=f"{workers}",
        )
        for workers in (1, 2)
    ]
    assert run_ranks(_agree, 2, configs) == [None, None]


def _agree(configs: list[Config]) -> None:
    as_two_hosts()
    agreement.begin_together("train", configs[comm.rank()])


def test_every_kind_of_fact_is_compared(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    software = agreement.software()
    for name in ("torch", "deepspeed", "transformers", "kto_dist", "python"):
        assert software[f"version of {name}"][0].isdigit(), name
    assert len(software["source of kto_dist"]) == 16
    assert agreement.device() == "cpu"
    assert agreement.settings_of("train", config)["train.lr"] == "0.001"
    assert "train.lr" not in agreement.settings_of("precompute", config)


def test_facts_that_only_one_host_has_differ_and_passwords_are_not_said():
    said = run_ranks(_facts, 3)
    assert (
        said
        == [
            "hosts disagree, and every host must have the same:\n"
            "  version of x: ranks 0, 1: 1.0, rank 2: none\n"
            "  -> install it"
        ]
        * 3
    )


def _facts() -> str:
    with pytest.raises(UserError) as caught:
        agree.facts({"install it": {"same": "same"} | ({"version of x": "1.0"} if comm.rank() < 2 else {})})
    return str(caught.value)


def test_a_fault_of_one_host_is_said_with_its_name_and_that_of_all_without():
    assert run_ranks(_fault, 2, [1]) == ["on node-b (rank 1): no such file"] * 2
    assert run_ranks(_fault, 2, [0, 1]) == ["no such file"] * 2


def _fault(ranks: list[int]) -> str:
    as_two_hosts()

    def work() -> None:
        if comm.rank() in ranks:
            raise UserError("no such file")

    with pytest.raises(UserError) as caught:
        agree.together(work)
    return str(caught.value)


def test_ranks_of_a_host_that_are_not_neighbours_are_refused():
    (said, _) = run_ranks(_layout, 2, ["0", "5"])
    assert said.startswith("rank 1 on ") and "has LOCAL_RANK 5" in said and "number the ranks host by host" in said
    assert run_ranks(_layout, 2, ["0", "1"]) == run_ranks(_layout, 2, ["0", "0"]) == ["", ""]


def _layout(local: list[str]) -> str:
    os.environ["LOCAL_RANK"] = local[comm.rank()]
    try:
        hosts.check_layout()
    except UserError as mistake:
        return str(mistake)
    return ""


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "b (rank 3)"),
        ([0, 1, 2, 3], "a (ranks 0, 1), b (ranks 2, 3)"),
        ([2, 4, 5, 6], "b (rank 2), c (ranks 4 to 6)"),
    ],
)
def test_ranks_are_named_by_their_hosts(ranks, words):
    by_rank = [hosts.Host(head, name) for head, name in [(0, "a")] * 2 + [(2, "b")] * 2 + [(4, "c")] * 4]
    assert hosts.named(ranks, by_rank) == words
    assert hosts.named([0, 1, 2], [hosts.Host(0, "a")] * 4) == "ranks 0 to 2"

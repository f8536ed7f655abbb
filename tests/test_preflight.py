"""The look at hosts before a job: all are asked at once, and what is said of them is so."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from two_hosts import facts, fake_ssh

from kto_dist.cluster import preflight
from kto_dist.cluster.hostfile import Node
from kto_dist.cluster.probe import Facts, Question, look
from kto_dist.cluster.remote import Answer, Reach
from kto_dist.training.config import Config

NODES = [Node(name="a", slots=8), Node(name="b", slots=8)]
WAITS = """
import json, sys, time
from pathlib import Path
own, other = json.loads(sys.stdin.readline())
Path(own).touch()
while not Path(other).exists():
    time.sleep(0.01)
print("both")
"""


def test_a_host_that_takes_its_time_keeps_no_other_from_being_asked(tmp_path, monkeypatch):
    """Each of them answers once the other has been asked: one after the other they would have to share the time."""
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reach = Reach((str(fake_ssh(tmp_path)),), str(tmp_path))
    nodes = [Node(name=f"127.0.0.{number}", slots=1) for number in (2, 3)]
    places = [str(tmp_path / name) for name in "ab"]
    answers = reach.ask(nodes, "waits", [json.dumps(places), json.dumps(places[::-1])], 60.0)
    assert [answer.said for answer in answers] == ["both\n"] * 2, answers


def test_a_host_that_says_nothing_is_given_up_whatever_stands_between(tmp_path):
    """As a script around ssh, or its ProxyCommand, which outlives it and holds the pipes."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text("#!/bin/sh\nsleep 600\necho late\n")
    wrapper.chmod(0o755)
    (answer,) = Reach((str(wrapper),), str(tmp_path)).ask(NODES[:1], "nothing", [""], 1.0)
    assert answer.said == "" and "no answer within 1 s" in answer.complaint


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"loopback": "127.0.1.1"}, "the name of b leads to 127.0.1.1"),
        # as where Debian writes a host's own name beside 127.0.1.1: rank 0's way to itself is no way to it
        ({"loopback": "127.0.1.1", "route": "lo"}, {}, "are set to eth0, where they are not set already"),
        (
            {"loopback": "127.0.1.1", "route": "lo"},
            {"route": ""},
            "on each host to the interface that leads",
        ),
        ({}, {"loopback": "127.0.1.1", "route": "ens5"}, "the others (a: eth0, b: ens5)"),
    ],
)
def test_an_interface_is_said_to_be_set_where_it_is(first, second, words):
    found: dict[str, Facts] = {"a": facts(**first), "b": facts(**second)}
    wrong, doubts = preflight.judge(NODES, found, 1.0, {"train.output"})
    assert wrong == [] and len(doubts) == 1 and words in doubts[0]


def test_a_first_host_by_a_name_that_every_host_has_for_itself_is_wrong():
    def wrong(*names: str) -> list[str]:
        nodes = [Node(name=name, slots=8) for name in names]
        return preflight.judge(nodes, {name: facts() for name in names}, 1.0, {"train.output"})[0]

    (said,) = wrong("localhost", "node-1", "node-2")
    assert said.startswith("localhost is the first host, where the others look for rank 0, and on node-1 this name")
    assert len(wrong("me@127.0.0.1", "node-1")) == 1
    assert wrong("localhost") == wrong("127.0.0.2", "127.0.0.3") == wrong("node-0", "localhost") == []


def test_a_host_that_does_not_find_the_first_one_says_why():
    found = look(Question(name="b", head="127.0.0.2"))
    assert (found.lost, found.route) == ("", "lo")
    unknown = look(Question(name="b", head="no..name"))  # which no resolver is asked for
    assert unknown.lost.startswith("the name is not known there: ") and unknown.route == ""
    # where nothing may be sent as if to one host
    away = look(Question(name="b", head="255.255.255.255"))
    assert away.lost.startswith("no way leads to 255.255.255.255: ") and away.route == ""


class Answering(Reach):
    """Hosts that are sound, and note what they were asked."""

    asked: list[Question]

    def ask(self, nodes: Sequence[Node], module: str, questions: Sequence[str], seconds: float) -> list[Answer]:
        type(self).asked = [Question(**json.loads(question)) for question in questions]
        found = facts(versions={"torch": "2", "kto_dist": "1"})
        return [Answer(0, json.dumps(asdict(found)), "") for _ in nodes]


def config_of(folder: Path, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(f"model: {{path: {folder}}}\ndata: {{train: {folder}/rows.jsonl}}\n")
    places = (f"train.output={folder}/run", f"reference.store={folder}/store", f"data.cache={folder}/cache")
    return Config.load(path, (*places, *overrides))


def test_a_fast_local_disk_is_tried_on_every_host_and_shared_by_none(tmp_path):
    """It was said to be not shared, which it is not to be."""
    disk = tmp_path / "fast"
    words = ["reference.zero_stage=3", "reference.offload=nvme", f"reference.nvme_path={disk}"]
    preflight.look(config_of(tmp_path, *words), NODES, Answering())
    for question in Answering.asked:
        assert question.written["reference.nvme_path"] == str(disk)
        assert sorted(question.marks) == ["data.cache", "reference.store", "train.output"]


def test_held_out_rows_are_looked_for_on_every_host(tmp_path):
    (tmp_path / "held.jsonl").write_text("")
    preflight.look(config_of(tmp_path, f"data.heldout={tmp_path}/held.jsonl"), NODES, Answering())
    assert all(str(tmp_path / "held.jsonl") in question.read.values() for question in Answering.asked)


def test_an_adapter_to_go_on_with_is_looked_for_on_every_host(tmp_path):
    words = ["adapter.type=lora", f"adapter.start={tmp_path}/adapter"]
    preflight.look(config_of(tmp_path, *words), NODES, Answering())
    assert [question.read["adapter.start"] for question in Answering.asked] == [f"{tmp_path}/adapter"] * 2


def test_a_place_into_which_nobody_may_look_is_a_problem_of_its_setting(tmp_path, monkeypatch):
    """As below another user's private folder: the look itself once ended there, with a traceback."""
    exists, private = Path.exists, tmp_path / "private"

    def refused(path: Path) -> bool:
        if private in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    written, read = {"train.output": str(private / "run")}, {"model.path": str(private / "model")}
    found = look(Question(name="a", written=written, read=read, marks={"train.output": str(private / "mark")}))
    assert found.sees == {"train.output": False} and "is not there" in found.problems["model.path"]
    assert preflight.look(config_of(tmp_path, f"train.output={private}/run"), NODES, Answering()).wrong == []

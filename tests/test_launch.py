"""One job on several hosts, which are all this machine here: started, stopped, watched, started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from two_hosts import environment, facts, fake_ssh, hostfile

from kto_dist.base.errors import UserError
from kto_dist.cluster import preflight
from kto_dist.cluster.agent import Job, environment_of, worst
from kto_dist.cluster.environment import forwarded, shown
from kto_dist.cluster.hostfile import Node, read
from kto_dist.cluster.launch import Ended, Plan, jobs_of, run
from kto_dist.cluster.launch import launch as supervise
from kto_dist.cluster.probe import Question, look
from kto_dist.cluster.remote import Reach, ssh_within
from kto_dist.commands.cli import main

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[2])
rank = os.environ["RANK"]
def stopped(*_):
    (folder / f"stopped-{rank}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "KTO_DIST_HOST",
         "HF_TOKEN", "OMP_NUM_THREADS")
words = json.loads(os.environ.get("KTO_DIST_WORDS", "null")) or sys.argv[1:]
found = {name: os.environ.get(name) for name in names}
(folder / f"rank-{rank}").write_text(json.dumps({**found, "argv": sys.argv[1:], "words": words, "pid": os.getpid()}))
todo = json.loads(words[2])
starts = len(list(folder.glob(f"start-{rank}-*")))
(folder / f"start-{rank}-{starts}").touch()
what = todo.get(rank, 0)
what = what[min(starts, len(what) - 1)] if isinstance(what, list) else what
if what == "wait":
    time.sleep(600)
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"deaf-{rank}").touch()
    time.sleep(600)
if what == "killed":
    while len(list(folder.glob("rank-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)  # a busy machine starts one well after another
    os.kill(os.getpid(), signal.SIGKILL)
if what == "down":
    (folder / "down-127.0.0.3").touch()
    sys.exit(1)
sys.exit(what)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ssh in it, and a module that ranks run in place of a training."""
    fake_ssh(tmp_path)
    (tmp_path / "rank_program.py").write_text(PROGRAM)
    path = [str(tmp_path), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return tmp_path


def plan_of(folder: Path, todo: dict[str, object], hosts: int = 2, slots: int = 1, **more: object) -> Plan:
    """What each rank does: its status, or wait, killed, stubborn; of several starts a list."""
    settings = {
        "nodes": tuple(Node(name=f"127.0.0.{number + 2}", slots=slots) for number in range(hosts)),
        "reach": Reach((str(folder / "ssh"),), str(folder)),
        "words": ("train", str(folder), json.dumps(todo)),
        "environment": {"HF_TOKEN": "hf_very_secret"},
        "folder": str(folder),
        "port": 1,
        "grace": 120.0,
        "timeout": 120.0,
        "module": "rank_program",
        **more,
    }
    return Plan(**settings)


def facts_of(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank-{rank}").read_text())


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(happened, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_every_rank_knows_its_place_and_its_environment(cluster):
    assert run(plan_of(cluster, {}, slots=2)) == Ended(0)
    found = [facts_of(cluster, rank) for rank in range(4)]
    assert [entry["RANK"] for entry in found] == ["0", "1", "2", "3"]
    assert [entry["LOCAL_RANK"] for entry in found] == ["0", "1", "0", "1"]
    assert {(entry["WORLD_SIZE"], entry["LOCAL_WORLD_SIZE"], entry["MASTER_ADDR"]) for entry in found} == {
        ("4", "2", "127.0.0.2")
    }
    assert [entry["KTO_DIST_HOST"] for entry in found] == ["127.0.0.2"] * 2 + ["127.0.0.3"] * 2
    assert {entry["HF_TOKEN"] for entry in found} == {"hf_very_secret"}
    assert all(entry["OMP_NUM_THREADS"] for entry in found)


def test_no_secret_stands_on_a_command_line(cluster):
    todo = json.dumps({})
    words = ("train", str(cluster), todo, "tracking.uri=https://me:pass_word@host")
    assert run(plan_of(cluster, {}, words=words)) == Ended(0)
    found = facts_of(cluster, 1)
    assert found["words"][-1] == words[-1] and found["argv"][-1] == "tracking.uri=https://***@host"
    asked = (cluster / "asked").read_text()
    assert "hf_very_secret" not in asked and "pass_word" not in asked and "kto_dist.cluster.agent" in asked


@pytest.mark.parametrize(
    ("todo", "status"), [({"1": 2, "0": 2}, 2), ({"1": 1}, 1), ({"0": 1, "1": 2}, 1), ({"0": 143, "1": 143}, 143)]
)
def test_the_status_is_that_of_the_ranks(cluster, todo, status):
    assert run(plan_of(cluster, todo)).status == status


def test_a_failure_on_one_host_ends_the_job_on_the_others(cluster, capfd):
    assert run(plan_of(cluster, {"0": "stubborn", "1": "killed"}, timeout=2.0)).status != 0
    assert "rank 1 on 127.0.0.3 was killed by signal 9 (SIGKILL)" in capfd.readouterr().err
    wait_for(lambda: ended(facts_of(cluster, 0)["pid"]))


def test_statuses_of_several_processes_are_one():
    assert worst([0, 0]) == 0
    assert worst([2, 2, 0]) == 2
    assert worst([-9, 1]) == 1
    assert worst([143, -9]) == 143
    assert worst([0, -9]) == 137


def _launcher(
    folder: Path, todo: dict[str, object], ignores: int | None = None, timeout: float = 120.0
) -> "subprocess.Popen[str]":
    """In a process of its own, to be signalled; it was started to ignore one of the signals."""
    code = (
        "import sys; sys.path[:0] = sys.argv[4:]; from test_launch import plan_of, run; from pathlib import Path; "
        "import json; plan = plan_of(Path(sys.argv[1]), json.loads(sys.argv[2]), timeout=float(sys.argv[3])); "
        "sys.exit(run(plan).status)"
    )
    command = [sys.executable, "-c", code, str(folder), json.dumps(todo), str(timeout), str(Path(__file__).parent)]
    ignore = None if ignores is None else lambda: signal.signal(ignores, signal.SIG_IGN)
    return subprocess.Popen(command, env=environment(), preexec_fn=ignore)


def test_sigterm_to_the_launcher_reaches_every_rank_and_is_its_status(cluster):
    job = _launcher(cluster, {"0": "wait", "1": "wait"})
    wait_for(lambda: all((cluster / f"start-{rank}-0").exists() for rank in range(2)))
    job.terminate()
    assert job.wait(240) == 143
    assert all((cluster / f"stopped-{rank}").exists() for rank in range(2))


def test_a_launcher_under_nohup_goes_on_when_its_terminal_goes(cluster):
    job = _launcher(cluster, {"0": "wait", "1": "wait"}, ignores=signal.SIGHUP)
    wait_for(lambda: all((cluster / f"start-{rank}-0").exists() for rank in range(2)))
    job.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert job.poll() is None and not list(cluster.glob("stopped-*"))
    job.terminate()
    assert job.wait(240) == 143 and len(list(cluster.glob("stopped-*"))) == 2


def test_a_launcher_that_is_killed_takes_its_ranks_along(cluster):
    job = _launcher(cluster, {"0": "wait", "1": "stubborn"})
    wait_for(lambda: (cluster / "start-0-0").exists() and (cluster / "deaf-1").exists())
    job.kill()
    job.wait(240)
    for rank in range(2):
        pid = facts_of(cluster, rank)["pid"]
        wait_for(lambda pid=pid: ended(pid))


def test_ranks_end_where_nothing_is_heard_of_the_launcher(cluster, capfd):
    """As of one whose host was switched off: no connection ends."""
    job = _launcher(cluster, {"0": "wait", "1": "stubborn"}, timeout=1.0)
    wait_for(lambda: (cluster / "start-0-0").exists() and (cluster / "deaf-1").exists())
    job.send_signal(signal.SIGSTOP)
    try:
        for rank in range(2):
            pid = facts_of(cluster, rank)["pid"]
            wait_for(lambda pid=pid: ended(pid))
    finally:
        job.kill()
        job.wait(240)
    assert "it was cut off, or stopped, as Ctrl-Z does. The ranks of this host are ended" in capfd.readouterr().err


def test_a_host_that_is_not_reached_is_named(cluster, capfd):
    (cluster / "down-127.0.0.3").write_text("rank-0")
    assert run(plan_of(cluster, {"0": "wait"}, timeout=1.0)) == Ended(1, ("127.0.0.3",))
    assert "127.0.0.3 is lost" in capfd.readouterr().err


def test_a_host_that_does_not_answer_when_it_is_to_end_is_given_up_and_named(cluster, capfd):
    (cluster / "mute-127.0.0.3").touch()
    assert run(plan_of(cluster, {"0": 1}, timeout=1.0)) == Ended(1, ("127.0.0.3",))
    assert "127.0.0.3 is lost: it does not answer" in capfd.readouterr().err


@pytest.mark.parametrize("timeout", [5, 30, 600, 1e6])
def test_ssh_takes_a_host_for_lost_before_the_ranks_have_waited_too_long(timeout):
    options = dict(word.split("=") for word in ssh_within(timeout) if "=" in word)
    seconds = int(options["ServerAliveInterval"]) * (int(options["ServerAliveCountMax"]) + 1)
    assert 0 < seconds <= timeout and seconds <= 60


def test_a_failure_starts_the_job_again_and_a_mistake_does_not(cluster):
    plan = plan_of(cluster, {"0": [1, 1, 0], "1": [1, 1, 0]})
    assert supervise(plan, restarts=2, again=lambda plan: plan, pause=0.01) == 0
    assert len(list(cluster.glob("start-0-*"))) == 3
    assert facts_of(cluster, 0)["words"][-1] == "checkpoint.resume=auto"


def test_starts_are_counted_and_mistakes_and_stops_end_the_job(cluster):
    for number, (status, starts) in enumerate([(1, 2), (2, 1), (143, 1)]):
        folder = cluster / f"trial-{number}"
        folder.mkdir()
        words = ("train", str(folder), json.dumps({"0": status, "1": status}))
        plan = plan_of(cluster, {}, words=words)
        assert supervise(plan, restarts=1, again=lambda plan: plan, pause=0.01) == status
        assert len(list(folder.glob("start-0-*"))) == starts


def test_hosts_that_are_away_are_asked_again_and_join_when_they_are_back(cluster):
    """The second start finds too few of them, the third one all but one, the fourth all."""
    plan, asked = plan_of(cluster, {"0": [1, 1, 0], "1": [1, 0]}), []

    def again(plan: Plan) -> Plan | None:
        asked.append(len(plan.nodes))
        return {1: None, 2: replace(plan, nodes=plan.nodes[:1])}.get(len(asked), plan)

    assert supervise(plan, restarts=3, again=again, pause=0.01) == 0
    assert asked == [2, 2, 2]
    assert len(list(cluster.glob("start-0-*"))) == 3 and len(list(cluster.glob("start-1-*"))) == 2
    assert supervise(plan_of(cluster, {"0": 1}), restarts=2, again=lambda plan: None, pause=0.01) == 1


CONFIG = """
model: {{path: {folder}}}
data: {{train: {folder}/rows.jsonl}}
reference: {{store: {folder}/store}}
train: {{output: {folder}/run}}
cluster: {{min_nodes: {least}}}
"""


@pytest.fixture
def config(cluster: Path) -> Path:
    (cluster / "rows.jsonl").write_text("")
    path = cluster / "config.yaml"
    path.write_text(CONFIG.format(folder=cluster, least=1))
    return path


def command(cluster: Path, config: Path, *words: str) -> list[str]:
    hosts = hostfile(cluster, "127.0.0.2", "127.0.0.3")
    return ["launch", str(config), "--hostfile", str(hosts), "--ssh", str(cluster / "ssh"), *words]


def test_a_dry_run_looks_at_the_hosts_and_shows_what_would_be_run_without_secrets(cluster, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    done = CliRunner().invoke(main, command(cluster, config, "--dry-run"))
    assert done.exit_code == 0, done.output
    assert "127.0.0.3: 1 ranks; " in done.output and "HF_TOKEN=***" in done.output and "NCCL_DEBUG=WARN" in done.output
    assert (
        "rank 1 of 2, rank 0 at 127.0.0.2:" in done.output and f"kto_dist.commands.entry train {config}" in done.output
    )
    assert "hf_very_secret" not in done.output and not (cluster / "run").exists()


def test_a_host_that_lacks_something_is_named_with_the_setting(cluster, config):
    (cluster / "down-127.0.0.3").touch()
    done = CliRunner().invoke(main, command(cluster, config, "--dry-run"))
    assert done.exit_code == 2
    assert "127.0.0.3 cannot be used (ssh: connect to host 127.0.0.3 port 22: Connection refused)" in done.output
    (cluster / "down-127.0.0.3").unlink()
    done = CliRunner().invoke(main, command(cluster, config, "--dry-run", f"model.path={cluster}/none"))
    assert done.exit_code == 2 and f"127.0.0.2: model.path: {cluster}/none is not there" in done.output


def _port(cluster, config, *words):
    done = CliRunner().invoke(main, command(cluster, config, "--dry-run", *words))
    assert done.exit_code == 0, done.output
    return int(re.search(r"rank 0 at 127\.0\.0\.2:(\d+)", done.output)[1])


def test_without_a_look_at_the_hosts_the_first_one_is_asked_for_a_free_port(cluster, config):
    with socket.socket() as probe:
        probe.bind(("", _port(cluster, config, "--no-preflight")))
    assert [line.split("\t")[0] for line in (cluster / "asked").read_text().splitlines()] == ["127.0.0.2"]
    assert _port(cluster, config, "--no-preflight") != 29500


def test_a_port_that_is_named_is_taken(cluster, config):
    assert _port(cluster, config, "--no-preflight", "--master-port", "4321") == 4321
    assert not (cluster / "asked").exists()
    assert _port(cluster, config, "--master_port=4321") == 4321


def test_an_ssh_that_is_not_there_is_named(cluster, config):
    done = CliRunner().invoke(main, command(cluster, config, "--dry-run", "--ssh", str(cluster / "no-ssh")))
    assert done.exit_code == 2 and "no-ssh, by which 127.0.0.2 is reached, cannot be started" in done.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "3.12.1"}, "b has another Python (3.12) than a (3.11)"),
        ({"versions": {"torch": "2.11.0"}}, "b has another torch (2.11.0) than a (2.13.0)"),
        ({"source": "def"}, "b has another this package's source (def) than a (abc)"),
        ({"gpus": ["A100, 40960"] * 8}, "b has other devices (8 x A100, 40960 MiB) than a (8 x H100, 81559 MiB)"),
        ({"gpus": ["H100, 81559"] * 4}, "b has 4 GPUs and slots=8 in the hostfile"),
        (
            {"lost": "the name is not known there: [Errno -2]", "route": ""},
            "b does not find a, the first host, where ranks meet (the name is not known there: [Errno -2]): make it kn",
        ),
        ({"clock": 1100.0}, "the clock of b differs from that of a by +100 s"),
        ({"problems": {"train.output": "/x cannot be written"}}, "b: train.output: /x cannot be written"),
    ],
)
def test_what_differs_between_hosts_is_wrong(change, words):
    nodes = [Node(name="a", slots=8), Node(name="b", slots=8)]
    wrong, doubts = preflight.judge(nodes, {"a": facts(), "b": facts(**change)}, 1.0, {"train.output"})
    assert len(wrong) == 1 and words in wrong[0] and doubts == []
    assert preflight.judge(nodes, {"a": facts(), "b": facts()}, 1.0, {"train.output"}) == ([], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disks": {"/dev/shm": 0.1}}, "b: /dev/shm has 0.10 GiB of free disk"),
        ({"open_files": 1024}, "b allows 1024 open files"),
        ({"loopback": "127.0.1.1"}, "the name of b leads to 127.0.1.1"),
        ({"sees": {"train.output": False}}, "train.output: not shared by all hosts"),
    ],
)
def test_what_may_go_wrong_is_said(change, words):
    nodes = [Node(name="a", slots=8), Node(name="b", slots=8)]
    wrong, doubts = preflight.judge(nodes, {"a": facts(), "b": facts(**change)}, 1.0, {"train.output"})
    assert wrong == [] and len(doubts) == 1 and words in doubts[0]


def test_a_host_leaves_nothing_behind_and_sees_the_mark_of_a_shared_folder(tmp_path):
    (tmp_path / "mark").touch()
    written = {"train.output": str(tmp_path / "not" / "yet"), "x": str(tmp_path)}
    marks = {"train.output": str(tmp_path / "away"), "x": str(tmp_path / "mark")}
    found = look(Question(name="a", written=written, marks=marks))
    assert found.problems == {} and found.sees == {"train.output": False, "x": True} and found.port > 0
    assert look(Question(name="a", written=written)).sees == {"train.output": False, "x": False}
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]
    assert look(Question(name="a", written={"x": "/proc/nowhere"})).problems["x"].startswith("/proc/nowhere cannot be")


def test_secrets_are_forwarded_and_not_shown():
    found = forwarded(
        {
            "HF_TOKEN": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "NCCL_DEBUG": "INFO",
            "HOME": "/root",
            "CUDA_VISIBLE_DEVICES": "0",
            "MLFLOW_TRACKING_URI": "http://me:pw@host",
            "MINE": "c",
        },
        ["MINE"],
    )
    assert set(found) == {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NCCL_DEBUG", "MLFLOW_TRACKING_URI", "MINE"}
    assert shown(found) == {
        "HF_TOKEN": "***",
        "AWS_SECRET_ACCESS_KEY": "***",
        "NCCL_DEBUG": "INFO",
        "MLFLOW_TRACKING_URI": "http://***@host",
        "MINE": "c",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("node-0\n", "line 1 (node-0): must read `node-0 slots=8`"),
        ("node-0 slots=0\n", "must read"),
        ("a slots=1\na slots=2\n", "names a twice"),
    ],
)
def test_a_hostfile_that_says_nothing_usable_is_refused(tmp_path, text, words):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert words in str(caught.value)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# comment\n\nme@node-0 slots=8  # eight\nnode-1 slots = 4\n")
    assert [(node.name, node.address, node.slots) for node in read(path)] == [
        ("me@node-0", "node-0", 8), ("node-1", "node-1", 4)
    ]  # fmt: skip


def test_ranks_are_numbered_host_by_host(tmp_path):
    jobs = jobs_of(plan_of(tmp_path, {}, hosts=3, slots=4))
    assert [(job.first, job.slots, job.size) for job in jobs] == [(0, 4, 12), (4, 4, 12), (8, 4, 12)]
    assert environment_of(jobs[1], 2, {})["RANK"] == "6"
    assert Job(**json.loads(jobs[1].text())) == jobs[1]


def test_a_lost_host_is_left_out_where_the_config_allows(cluster):
    """The first start loses a host; the second one is on what is left."""
    plan = plan_of(cluster, {"0": [1, 0], "1": "down"})

    def again(plan: Plan) -> Plan:
        return Plan(**{**{name: getattr(plan, name) for name in Plan.__slots__}, "nodes": plan.nodes[:1]})

    assert supervise(plan, restarts=1, again=again, pause=0.01) == 0
    assert facts_of(cluster, 0)["WORLD_SIZE"] == "1"

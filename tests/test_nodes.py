"""Two hosts with a network, an sshd and a disk each, under `kto-dist launch`: one trajectory, whatever happens to them.

The hosts are this machine's namespaces, which takes root, iproute2 and openssh-server; the tests are skipped without.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from nodes import NAMES, Job, Nodes, why_not
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, weights_of

from kto_dist.base.config import to_yaml
from kto_dist.record.run_folder import read_lines
from kto_dist.training.config import Config

STEPS, EVERY = 40, 4
LONG = {"train__max_steps": STEPS, "checkpoint__every_steps": EVERY, "cluster__timeout": 30}
_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path / "nodes") as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, tiny_log) -> Config:
    """A run of one host's two ranks that nobody disturbs."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), tiny_model, tiny_log, **LONG)
    run_ranks(train_all, 2, [config])
    return config


def test_a_host_that_ends_while_it_starts_is_not_waited_for(tmp_path):
    nodes = Nodes(tmp_path / "nodes")
    (nodes.folder / "ssh" / "sshd_config").write_text("Nonsense\n")
    with pytest.raises(RuntimeError, match="a host has ended by itself"), nodes:
        pass
    # nor does the switch stay
    assert "sleep" not in [child.name() for child in psutil.Process().children()]


class Hosts:
    """The config on every host's own disk, and starts of it."""

    def __init__(self, nodes: Nodes, config: Config):
        self.nodes, self.config, self.starts = nodes, config, 0
        self.path = nodes.disk / "config.yaml"
        for name in nodes.names:
            self.write(name, config)

    def write(self, name: str, config: Config) -> None:
        self.nodes.seen(name, self.path).write_text(to_yaml(config))

    def start(self, *words: str) -> Job:
        self.starts += 1
        return Job(self.nodes, self.path, self.nodes.folder / f"said-{self.starts}", words)

    def run(self, name: str) -> Path:
        """The run's folder on a host, from outside."""
        return self.nodes.seen(name, self.config.train.output)

    def steps(self) -> list[int]:
        return [line["step"] for line in read_lines(self.run("node-a") / "metrics.jsonl")]

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.run(name) / "checkpoints").glob("step-*"))

    def begun(self, steps: int = EVERY + 2, *words: str) -> Job:
        """A job that has made so many steps."""
        job = self.start("--no-preflight", *words)
        while len(self.steps()) < steps:
            assert job.runs(), job.words()
            time.sleep(0.01)
        return job

    def goes_on_to(self, whole: Config) -> str:
        """Starts it again, as its user would; it ends as the run that nobody disturbed. What it said."""
        job = self.start("--no-preflight")
        assert job.wait(240) == 0, job.words()
        self.is_as(whole)
        return job.words()

    def is_as(self, whole: Config) -> None:
        def untimed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
            return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]

        assert untimed(read_lines(self.run("node-a") / "metrics.jsonl")) == untimed(metrics_of(whole))
        found = load_file(self.run("node-a") / "export" / "model.safetensors")
        for name, tensor in weights_of(whole).items():
            assert torch.equal(found[name], tensor), name

    def is_tidy(self) -> None:
        """Ranks of a host that was cut off take as long as `cluster.timeout` to end."""
        deadline = time.monotonic() + 60
        while self.nodes.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.nodes.left() == []
        for name in self.nodes.names:
            assert [path.name for path in self.run(name).rglob(".*") if path.name != ".run.lock"] == []


@pytest.mark.parametrize("names", [NAMES, pytest.param((*NAMES, "node-c", "node-d"), marks=pytest.mark.soak)])
def test_hosts_without_a_shared_disk_train_to_the_losses_of_one(tmp_path, tiny_model, tiny_log, names):
    settings = {"checkpoint__every_steps": 2, "deepspeed__zero_stage": 2}
    one = tiny_config(tmp_path / "one", tiny_model, tiny_log, **settings)
    run_ranks(train_all, len(names), [one])
    with Nodes(tmp_path / "nodes", names) as nodes:
        _trains_as(one, nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **settings))


def _trains_as(one: Config, nodes: Nodes, config: Config) -> None:
    hosts = Hosts(nodes, config)
    job = hosts.start()
    assert job.wait(240) == 0, job.words()
    assert "node-b: 1 ranks; " in job.words() and f"all-reduce of {len(nodes.names)} ranks on cpu" in job.words()
    assert "train.output: not shared by all hosts" in job.words()
    found = [line["loss"] for line in read_lines(hosts.run("node-a") / "metrics.jsonl")]
    assert found == pytest.approx([line["loss"] for line in metrics_of(one)], abs=1e-7, rel=0) and len(found) == 5
    assert not (hosts.run("node-b") / "metrics.jsonl").exists()
    hosts.is_tidy()


@pytest.mark.soak
def test_a_host_with_another_rate_beta_or_clip_is_refused_by_name(nodes, tiny_model, tiny_log):
    config = tiny_config(nodes.disk, tiny_model, tiny_log)
    hosts = Hosts(nodes, config)
    other = tiny_config(nodes.disk, tiny_model, tiny_log, train__lr=2e-3, train__clip=0.5, objective__beta=0.2)
    hosts.write("node-b", other)
    job = hosts.start("--no-preflight")
    assert job.wait(240) == 2, job.words()
    for setting, own, others in (("train.lr", 0.001, 0.002), ("train.clip", 1.0, 0.5), ("objective.beta", 0.1, 0.2)):
        assert f"{setting}: node-a (rank 0): {own}, node-b (rank 1): {others}" in job.words(), job.words()
    assert hosts.steps() == []
    hosts.is_tidy()


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_job_starts_again_by_itself(nodes, whole, tiny_model, tiny_log, rank):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    job = hosts.begun(EVERY + 2, "--max-restarts", "1")
    os.kill(nodes.ranks()[rank], signal.SIGKILL)
    assert job.wait(300) == 0, job.words()
    said = job.words()
    name = nodes.names[rank]
    assert f"rank {rank} on {name} was killed by signal 9 (SIGKILL)" in said and "start 1 of 1" in said
    if rank == 1:
        assert "node-b (rank 1): nothing was heard for 5 s" in said and "last seen in phase " in said
    hosts.is_as(whole)
    hosts.is_tidy()


@pytest.mark.soak
def test_a_host_that_is_switched_off_ends_the_job_by_name_and_goes_on_when_it_is_back(
    nodes, whole, tiny_model, tiny_log
):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    job = hosts.begun()
    nodes.kill("node-b")
    assert job.wait(120) == 1, job.words()
    assert "node-b (rank 1): nothing was heard for" in job.words() and "last seen in phase " in job.words()
    assert "node-b is lost" in job.words()
    assert nodes.left() == []
    nodes.start("node-b")
    assert "going on from step-" in hosts.goes_on_to(whole)
    hosts.is_tidy()


@pytest.mark.soak
def test_a_host_that_is_cut_off_ends_the_job_by_name_on_both_sides(nodes, whole, tiny_model, tiny_log):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    job = hosts.begun(EVERY + 2, "--max-restarts", "3")
    nodes.cut("node-b")
    while "start 1 of 3" not in job.words():
        assert job.runs(), job.words()
        time.sleep(0.1)
    assert "node-b (rank 1): nothing was heard for" in job.words() and "node-b is lost" in job.words()
    nodes.mend("node-b")
    assert job.wait(300) == 0, job.words()
    hosts.is_as(whole)
    hosts.is_tidy()


@pytest.mark.soak
def test_a_job_goes_on_by_itself_on_the_hosts_that_are_left(nodes, whole, tiny_model, tiny_log):
    """The run's folder is shared here, so that who is left has the whole checkpoint."""
    shared = nodes.folder / "shared"
    config = tiny_config(shared, tiny_model, tiny_log, **LONG, cluster__min_nodes=1, deepspeed__zero_stage=2)
    hosts = Hosts(nodes, config)
    job = hosts.start("--no-preflight", "--max-restarts", "1")
    metrics = Path(config.train.output) / "metrics.jsonl"
    while len(read_lines(metrics)) < EVERY + 2:
        assert job.runs(), job.words()
        time.sleep(0.01)
    nodes.kill("node-b")
    assert job.wait(300) == 0, job.words()
    assert "(node-b lost): start 1 of 1" in job.words()
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in metrics_of(whole)], abs=1e-5)
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(config)[name], tensor, rtol=0, atol=1e-5)
    assert nodes.left() == []


@pytest.mark.soak
def test_sigterm_saves_on_every_host_within_its_time(nodes, whole, tiny_model, tiny_log):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG, cluster__grace=20))
    job = hosts.begun()
    job.signal(signal.SIGTERM)
    assert job.wait(120) == 143, job.words()
    step = hosts.steps()[-1]
    assert f"stopped by a signal after step {step}" in job.words()
    for name in nodes.names:
        assert hosts.checkpoints(name)[-1].name == f"step-{step:08d}", name
    hosts.is_tidy()
    assert f"going on from step-{step:08d}" in hosts.goes_on_to(whole)


@pytest.mark.soak
def test_a_launcher_that_is_killed_leaves_nothing_at_work_on_any_host(nodes, whole, tiny_model, tiny_log):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    job = hosts.begun()
    job.signal(signal.SIGKILL)
    assert job.wait(60) == 137
    deadline = time.monotonic() + 60
    while nodes.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert nodes.left() == []
    hosts.goes_on_to(whole)
    hosts.is_tidy()


def _everything_dies(hosts: Hosts) -> None:
    job = hosts.begun(2 * EVERY + 1)
    for name in hosts.nodes.names:
        hosts.nodes.kill(name)
    job.wait(60)
    for name in hosts.nodes.names:
        hosts.nodes.start(name)


@pytest.mark.soak
def test_a_damaged_checkpoint_on_one_host_is_passed_over_on_all(nodes, whole, tiny_model, tiny_log):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    _everything_dies(hosts)
    seen = [{path.name for path in hosts.checkpoints(name)} for name in nodes.names]
    newest = max(set.intersection(*seen))
    states = next((hosts.run("node-b") / "checkpoints" / newest).glob("*optim_states.pt"))
    content = bytearray(states.read_bytes())
    content[len(content) // 2] ^= 1
    states.write_bytes(content)
    said = hosts.goes_on_to(whole)
    assert f"{newest} is damaged: {states.name} has other bytes than were written" in said
    hosts.is_tidy()


@pytest.mark.soak
def test_a_host_whose_disk_is_lost_is_named_and_a_copy_of_it_goes_on(nodes, whole, tiny_model, tiny_log):
    hosts = Hosts(nodes, tiny_config(nodes.disk, tiny_model, tiny_log, **LONG))
    _everything_dies(hosts)
    kept = nodes.folder / "kept"
    hosts.run("node-b").rename(kept)
    before = hosts.steps()
    job = hosts.start("--no-preflight")
    assert job.wait(240) == 2, job.words()
    assert "node-b (rank 1) has none: bring back the folder" in job.words()
    assert hosts.steps() == before
    shutil.rmtree(hosts.run("node-b"), ignore_errors=True)
    kept.rename(hosts.run("node-b"))
    assert "going on from step-" in hosts.goes_on_to(whole)
    hosts.is_tidy()

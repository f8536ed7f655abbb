"""What starts a run under Slurm and Kubernetes, checked by tools and by running it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from kto_dist.base.errors import UserError
from kto_dist.cluster.agent import job_of
from kto_dist.commands.cli import EXAMPLES, main
from kto_dist.model.options import deepspeed_options
from kto_dist.training.config import Config

ROOT = Path(__file__).parent.parent
FILES = ROOT / "launch" / "configs"


@pytest.mark.parametrize("name", EXAMPLES)
def test_init_prints_what_lies_in_launch(name):
    shown = CliRunner().invoke(main, ["init", name])
    assert shown.exit_code == 0
    if (FILES / EXAMPLES[name]).exists():
        assert shown.output == (FILES / EXAMPLES[name]).read_text()
    else:
        assert name in ("demo", "compare", "mine")


def test_the_shell_script_passes_shellcheck():
    tool = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert tool is not None
    done = subprocess.run([tool, "--severity=style", str(FILES / "slurm.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


SRUN = """#!/usr/bin/env bash
# two nodes, one after the other's start
while [ "${1#--}" != "$1" ]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node SLURMD_NODENAME=node-$node "$@" &
  pids="${pids:-} $!"
done
trap 'kill -TERM $pids' TERM
touch ready-srun
status=0
for pid in $pids; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  [ "$code" -gt "$status" ] && status=$code
done
exit "$status"
"""
PYTHON = """#!/usr/bin/env bash
echo "$NODE_RANK $KTO_DIST_HOST $NNODES $SLOTS $MASTER_ADDR:$MASTER_PORT $*" >> ranks
trap 'echo saved >> ranks; exit 143' TERM
# no command substitution here: a trap that comes while bash reads one is lost
if [ -e wait ]; then touch "ready-$NODE_RANK"; for ((i = 0; i < 600; i++)); do sleep 0.1; done; fi
exit "$(cat status)"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ] && [ -e hold ]; then touch held; while [ -e hold ]; do sleep 0.01; done; fi
[ "$1" = show ] && printf 'node-0\\nnode-1\\n'
[ "$1" = requeue ] && echo "$2" >> requeued
exit 0
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("fake-python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def job(folder: Path, **more: str) -> "subprocess.Popen[str]":
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "fake-python"),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "77",
        **more,
    }
    return subprocess.Popen(["bash", str(FILES / "slurm.sh"), "train.lr=1e-6"], cwd=folder, env=environment, text=True)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_every_node_starts_its_ranks_and_a_preempted_run_queues_again(slurm, status, requeued):
    (slurm / "status").write_text(str(status))
    assert job(slurm).wait(60) == status
    lines = sorted((slurm / "ranks").read_text().splitlines())
    words = "-u -m kto_dist.cluster.agent train config.yaml train.lr=1e-6"
    assert lines == [f"{node} node-{node} 2 8 node-0:29500 {words}" for node in (0, 1)]
    assert (slurm / "requeued").exists() == requeued


def test_a_run_that_has_been_started_often_is_left_alone(slurm):
    (slurm / "status").write_text("143")
    assert job(slurm, SLURM_RESTART_COUNT="50").wait(60) == 143
    assert not (slurm / "requeued").exists()


def test_sigterm_reaches_the_ranks_and_the_job_waits_until_they_have_saved(slurm):
    (slurm / "wait").touch()
    running = job(slurm)
    while not all((slurm / f"ready-{each}").exists() for each in (0, 1, "srun")):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    assert running.wait(60) == 143
    assert (slurm / "ranks").read_text().count("saved") == 2 and (slurm / "requeued").read_text() == "77\n"


def of_workers(language: str) -> str:
    """The example in docs/store.md."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "store.md").read_text(), re.M | re.S)
    return str(block)


def test_the_example_of_workers_under_slurm_runs_one_on_each_task(slurm):
    (slurm / "kto-dist").write_text('#!/usr/bin/env bash\necho "$*" >> words\n')
    (slurm / "kto-dist").chmod(0o755)
    environment = {"PATH": f"{slurm}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", of_workers("bash")], cwd=slurm, env=environment, check=True)
    assert (slurm / "words").read_text() == 2 * "precompute config.yaml --worker\n"


def test_the_example_of_workers_under_kubernetes_is_what_it_takes():
    manifest = yaml.safe_load(of_workers("yaml"))
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    # with a number of completions no more workers than that would start
    assert "completions" not in manifest["spec"] and manifest["spec"]["parallelism"] == 50


def test_sigterm_before_there_are_ranks_is_no_failure_and_queues_again(slurm):
    (slurm / "hold").touch()
    running = job(slurm)
    while not (slurm / "held").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()
    (slurm / "hold").unlink()
    assert running.wait(120) == 143 and (slurm / "requeued").read_text() == "77\n"


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / "kubernetes.yaml").read_text()))


def job_set() -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests() if manifest["kind"] == "JobSet")
    return found


def test_core_objects_are_what_kubernetes_takes():
    kinds = []
    for manifest in manifests():
        if "jobset" not in manifest["apiVersion"]:
            kubernetes_validate.validate(manifest, "1.31", strict=True)
            kinds.append(manifest["kind"])
    assert kinds == ["PersistentVolumeClaim", "ConfigMap"]


def test_the_jobs_of_the_set_are_what_kubernetes_takes():
    (replicated,) = job_set()["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated["template"]["spec"]}
    kubernetes_validate.validate(whole, "1.31", strict=True)


# the fields of jobset.x-k8s.io/v1alpha2 that can be here: api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset
JOB_SET: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "maxItems": 20,
                            "items": {
                                "type": "object",
                                "required": ["name", "action"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_,:]*[A-Za-z0-9_]$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 0},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def test_the_set_has_the_fields_of_its_kind():
    jsonschema.validate(job_set(), JOB_SET)


def test_the_pods_agree_with_each_other_and_with_the_config(tmp_path):
    (replicated,) = job_set()["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(environment["NNODES"])
    assert environment["SLOTS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job_set()["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    (policy,) = spec["podFailurePolicy"]["rules"]
    assert policy["onExitCodes"]["values"] == [2] and policy["onExitCodes"]["containerName"] == container["name"]
    (config,) = (manifest["data"]["config.yaml"] for manifest in manifests() if manifest["kind"] == "ConfigMap")
    (tmp_path / "config.yaml").write_text(config)
    settings = Config.load(tmp_path / "config.yaml")
    assert settings.cluster.grace < pod["terminationGracePeriodSeconds"]
    job = job_of([container["command"][4], str(tmp_path / "config.yaml")], {**environment, "NODE_RANK": "2"})
    assert (job.first, job.size, job.module, job.grace) == (16, 32, "kto_dist.commands.entry", 300)


def test_a_host_without_its_number_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="needs NODE_RANK, NNODES, SLOTS"):
        job_of(["train", "config.yaml"], {"NNODES": "2"})


def test_the_options_of_several_nodes_go_into_deepspeeds(tmp_path, monkeypatch):
    monkeypatch.chdir(FILES)
    for name in ("8b-4-nodes.yaml", "70b.yaml"):
        import torch

        section = Config.load(FILES / name).deepspeed
        options = deepspeed_options(section, torch.bfloat16, 1.0)
        assert options["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert json.loads((FILES / "hpz.json").read_text())

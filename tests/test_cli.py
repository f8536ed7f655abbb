"""The commands as a user types them: runs under the launcher, exit statuses, messages, and what is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM

from kto_dist.base.config import to_yaml
from kto_dist.base.ports import held_port
from kto_dist.commands.cli import main

ROOT = Path(__file__).parents[1]
KTO_DIST = [sys.executable, "-m", "kto_dist.commands.cli"]


def write_config(folder: Path, model: Path, log: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(to_yaml(tiny_config(folder, model, log, **changes)))
    return path


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, **options)


def with_shared_memory_of_its_own(folder: Path) -> list[str]:
    """Words before a command; it gets a /dev/shm that it alone uses, and `folder/shm` lists what it left there.

    Without the permission to mount one (root) the command runs as it is, and the list says nothing.
    """
    listed = f'"$@"; status=$?; ls -A /dev/shm > {folder}/shm; exit $status'
    own = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs /dev/shm && {{ {listed}; }}", "sh"]
    possible = shutil.which("unshare") and not subprocess.run([*own, "true"], capture_output=True).returncode
    return own if possible else []


def ranks_of(config: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(config) in (process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_for(what: Callable[[], bool], while_: subprocess.Popen | None = None) -> None:
    """Until it is so; pytest's own time-out is the bound."""
    while not what():
        assert while_ is None or while_.poll() is None, while_.stdout and while_.stdout.read()
        time.sleep(0.2)


def test_every_command_explains_itself():
    overview = run(*KTO_DIST, "--help")
    assert overview.returncode == 0
    for command in ("train", "precompute", "config"):
        assert command in overview.stdout
        page = run(*KTO_DIST, command, "--help")
        assert page.returncode == 0 and "CONFIG" in page.stdout


def test_config_shows_each_value_with_its_origin(tmp_path, tiny_model, tiny_log):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model": {"path": str(tiny_model)}, "data": {"train": str(tiny_log)}}))
    shown = run(*KTO_DIST, "config", config, "train.lr=1e-6")
    assert shown.returncode == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line}
    assert "1e-06" in lines["train.lr"] and "override" in lines["train.lr"]
    assert "default" in lines["train.seed"]
    assert str(config)[-20:] in shown.stdout


def test_through_a_pipe_a_table_has_a_line_a_row_without_blanks_at_its_end(tmp_path, tiny_model, tiny_log):
    config = write_config(tmp_path, tiny_model, tiny_log)
    lines = CliRunner().invoke(main, ["config", str(config)]).output.splitlines()
    assert [line for line in lines if not line or line != line.rstrip()] == []
    assert {len(line.split(".")[0].split()) for line in lines[1:]} == {1} and max(map(len, lines)) > 150


def test_a_config_that_is_not_there_is_told_before_seconds_of_imports(tmp_path):
    jobs = ("train", "train --check", "precompute", "precompute --worker", "compare", "pairs", "plan", "launch")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from kto_dist.commands.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    done = CliRunner().invoke(main, [*words.split(), 'nowhere.yaml'])\n"
        "    assert done.exit_code == 2 and 'nowhere.yaml does not exist' in done.output, (words, done.output)\n"
        "    heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'duckdb'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = run(sys.executable, "-c", code, *jobs, "mine", "audit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ("config", "mine"))
def test_what_computes_nothing_loads_nothing_that_does(tmp_path, tiny_model, tiny_log, command):
    """Each of these takes seconds to import."""
    code = (
        "import sys\n"
        "from kto_dist.commands.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('heavy:', {'torch', 'transformers', 'deepspeed', 'mlflow', 'duckdb'} & set(sys.modules))"
    )
    words = ("config", write_config(tmp_path, tiny_model, tiny_log)) if command == "config" else ("mine", "--help")
    assert "heavy: set()" in run(sys.executable, "-c", code, *words).stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], "unknown key train.lrr: did you mean train.lr?"),
        (["train.global_batch=1"], "train.global_batch (1) must be at least 2"),
        (["train"], "override 'train' must read section.key=value"),
    ],
)
def test_a_mistake_in_the_config_is_told_before_anything_starts(tmp_path, tiny_model, tiny_log, overrides, message):
    done = run(*KTO_DIST, "train", write_config(tmp_path, tiny_model, tiny_log), *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_missing_config_is_a_mistake(tmp_path):
    done = run(*KTO_DIST, "train", tmp_path / "nowhere.yaml")
    assert done.returncode == 2 and "does not exist: give the path of a YAML file" in done.stderr


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({}, '{"prompt": "a", "completion": "b", "label": "maybe"}', "label"),
        pytest.param(
            {"data__max_length": 512, "reference__tokens_per_batch": 512, "train__tokens_per_microbatch": 512},
            None,
            "data.max_length (512) must be at most the model's context of 256 tokens",
            marks=pytest.mark.soak,
        ),
        ({"model__path": "/nowhere/model"}, None, "model.path (/nowhere/model) does not exist: check the path"),
        pytest.param({"data__train": "/nowhere/log.jsonl"}, None, "/nowhere/log.jsonl", marks=pytest.mark.soak),
        ({}, '{"prompt": "a", "completion": "b", "label": true}', "not one undesirable among them"),
        pytest.param(
            {},
            '{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}',
            "one and the same prompt",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_what_the_ranks_find_wrong_ends_as_one_message_and_status_2(
    tmp_path, tiny_model, tiny_log, changes, rows, message
):
    log = tiny_log
    if rows is not None:
        log = tmp_path / "bad.jsonl"
        log.write_text(rows + "\n")
    config = write_config(tmp_path, tiny_model, log, **changes)
    done = run(sys.executable, "-m", "kto_dist.commands.entry", "train", config)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_under_the_launcher_leaves_everything_that_it_promises_and_nothing_else(tmp_path, tiny_model, tiny_log):
    config = write_config(
        tmp_path,
        tiny_model,
        tiny_log,
        tracking__enabled=True,
        tracking__report=True,
        tracking__register="tiny",
        data__heldout=0.3,
    )
    done = run(*with_shared_memory_of_its_own(tmp_path), *KTO_DIST, "train", config, "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "run"
    expected = {
        "config.yaml", "metrics.jsonl", "heldout.jsonl", "heldout-rows.npz", "export", "summary.json", "report.html",
        "plots", ".mlflow",
    }  # fmt: skip
    assert {path.name for path in output.iterdir()} == expected
    AutoModelForCausalLM.from_pretrained(output / "export")
    left = tmp_path / "shm"
    assert not left.exists() or not left.read_text()
    assert not ranks_of(config)

    import mlflow

    summary = json.loads((output / "summary.json").read_text())
    assert summary["mlflow"]["uri"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(summary["mlflow"]["uri"])
    logged = client.get_run(summary["mlflow"]["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.global_batch"] == "16"
    assert logged.data.tags["reference_fingerprint"] == summary["reference"]["fingerprint"]
    assert logged.data.metrics["reference/scored"] == summary["reference"]["scored"] > 0
    assert logged.data.metrics["reference/rows_per_second"] > 0
    assert logged.data.metrics["reference/share_done"] == 1 and logged.data.metrics["reference/seconds_left"] == 0
    losses = client.get_metric_history(logged.info.run_id, "loss")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {(point.step, point.value) for point in losses} == {(line["step"], line["loss"]) for line in lines}
    assert {dataset.dataset.name for dataset in logged.inputs.dataset_inputs} == {"training", "heldout"}
    artifacts = {item.path for item in client.list_artifacts(logged.info.run_id)}
    assert {"config.yaml", "summary.json", "report.html", "plots"} <= artifacts
    assert client.get_model_version("tiny", "1").run_id == logged.info.run_id


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as found:
        yield found


def test_the_clusters_command_runs_and_reports_like_ours(tmp_path, tiny_model, tiny_log, port):
    config = write_config(tmp_path, tiny_model, tiny_log)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port", port]
    script = ROOT / "launch" / "train.py"
    done = run(*launcher, script, config, "train.max_steps=2", env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    asked = ["--module", "kto_dist.commands.evaluate", tmp_path / "run", "--data", f"seen={tiny_log}"]
    done = run(*launcher, *asked, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"loading the model ({tmp_path / 'run' / 'export'}, float32)" in done.stdout
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["data"]["rows"] == len(tiny_log.read_text().splitlines()) and found["heldout"]["rewards/all"] != 0
    done = run(*launcher, script, config, "train.clip=-1", env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "train.clip" in done.stderr


def test_sigterm_saves_leaves_no_rank_behind_and_the_same_command_goes_on(tmp_path, tiny_model, tiny_log):
    config = write_config(tmp_path, tiny_model, tiny_log, train__max_steps=400)
    command = [*KTO_DIST, "train", str(config), "--ranks", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, while_=process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 143, said
    assert "the same command goes on from there" in said
    assert not ranks_of(config)

    steps = metrics.read_text().count("\n")
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert saved.name == f"step-{steps:08d}"
    done = run(*KTO_DIST, "train", config, f"train.max_steps={steps + 2}", "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {saved.name}" in done.stdout
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 3))


def test_a_killed_command_takes_its_ranks_along_and_the_next_start_trains_alone(tmp_path, tiny_model, tiny_log):
    config = write_config(tmp_path, tiny_model, tiny_log, train__max_steps=400, checkpoint__every_steps=1)
    process = subprocess.Popen([*KTO_DIST, "train", str(config), "--ranks", "2"], stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, while_=process)
    process.kill()
    process.wait()
    wait_for(lambda: not ranks_of(config))
    steps = len(metrics.read_text().splitlines())
    done = run(*KTO_DIST, "train", config, f"train.max_steps={steps + 2}", "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 3))


def test_precompute_fills_the_store_and_train_then_scores_nothing(tmp_path, tiny_model, tiny_log):
    config = write_config(tmp_path, tiny_model, tiny_log)
    done = run(*KTO_DIST, "precompute", config, "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "store").glob("*/*.parquet")) and not (tmp_path / "run").exists()
    done = run(sys.executable, "-m", "kto_dist.commands.entry", "train", config)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reference"]["scored"] == 0


@pytest.mark.parametrize(("outcome", "status"), [("return 0", 0), ("return 143", 143), ("raise ValueError", 1)])
def test_a_ranks_exit_status_does_not_depend_on_how_the_interpreter_goes_down(outcome, status):
    code = (
        "import atexit, os, sys\n"
        "from kto_dist.commands import entry\n"
        "class Bomb:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "sys.kept = Bomb()\n"
        "atexit.register(print, 'exit hooks ran')\n"
        f"def work(arguments): {outcome}\n"
        "entry.run_and_leave([], work)\n"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == status, done.stderr
    assert done.stdout == "exit hooks ran\n"
    assert ("ValueError" in done.stderr) == (status == 1)


def test_the_public_function_trains_in_the_callers_own_process(tmp_path, tiny_model, tiny_log):
    config = write_config(tmp_path, tiny_model, tiny_log)
    code = (
        "import sys, kto_dist.training.loop, kto_dist\n"
        "config = kto_dist.Config.load(sys.argv[1])\n"
        "print(kto_dist.train(config)['steps'])\n"
    )
    done = run(sys.executable, "-c", code, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "5"


def run_launcher(folder: Path, job: str, ranks_do: str, ranks: int | None = None) -> tuple[list[str], int]:
    """The command and the status of `launcher.run`, with a line of Python in place of DeepSpeed and its ranks."""
    from kto_dist.commands import launcher

    seen = []

    def spy(command, **options):
        seen.append(command)
        return subprocess.Popen([sys.executable, "-c", ranks_do], **options)

    status = launcher.run(job, ["x.yaml"], ranks, folder=folder, start=spy)
    return seen[0], status


FINISH = "import os, pathlib; pathlib.Path(os.environ['KTO_DIST_DONE_MARK']).touch()"


@pytest.mark.parametrize("job", ["train", "precompute"])
@pytest.mark.parametrize(("ranks_do", "status"), [(FINISH, 0), ("pass", 1), (f"{FINISH}; exit(3)", 3)])
def test_a_launcher_that_reports_success_is_believed_when_rank_0_has_finished(tmp_path, capfd, job, ranks_do, status):
    assert run_launcher(tmp_path, job, ranks_do)[1] == status
    assert not any(tmp_path.iterdir())
    assert (f"the ranks ended without finishing {job}" in capfd.readouterr().err) == (ranks_do == "pass")


def test_without_a_device_the_default_is_two_ranks_at_most(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command, _ = run_launcher(tmp_path, "train", FINISH)
    assert int(command[command.index("--num_gpus") + 1]) == min(2, os.cpu_count() or 1)


def test_a_single_rank_starts_without_deepspeeds_launcher(tmp_path):
    command, status = run_launcher(tmp_path, "train", FINISH, ranks=1)
    assert status == 0
    assert command[-3:] == ["kto_dist.commands.entry", "train", "x.yaml"]
    assert not any(word.startswith("deepspeed") for word in command)

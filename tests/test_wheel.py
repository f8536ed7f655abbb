"""What a user installs, without a checkout: the wheel mines and trains from an empty folder; the sdist tests itself."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from tiny import thumbs, write_jsonl

from kto_dist.base.ports import held_port

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.soak


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Output of a command that sees no checkout and must succeed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    unwanted = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "tree", ignore=unwanted)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and sees the packages of this one but not its checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    # a line of a .pth file is a folder to look in, whose own .pth files (such as an editable install's) do not count
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


def test_both_distributions_are_described_as_the_index_wants_it(built):
    assert len(list(built.iterdir())) == 2
    told = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert told.count("PASSED") == 2


def test_the_wheel_mines_a_log_and_trains_from_an_empty_folder(installed, tiny_model, tmp_path):
    where = run(
        installed, "-c", "import kto_dist, kto_kernels; print(kto_dist.__file__, kto_kernels.__file__)", cwd=tmp_path
    )
    assert all(str(installed.parents[1]) in file for file in where.split())
    command = installed.parent / "kto-dist"

    rows = [
        {"question": row["prompt"], "answer": row["completion"], "thumb": "up" if row["label"] else "down"}
        for row in thumbs(80, 24)
    ]
    write_jsonl(tmp_path / "logs" / "2026-01.jsonl", rows)
    (tmp_path / "mine.yaml").write_text(run(command, "init", "mine", cwd=tmp_path))
    overrides = ["input.files=logs/*.jsonl", "columns.user=null", "columns.time=null", "columns.model=null"]
    run(command, "mine", "mine.yaml", *overrides, "split.heldout=0.3", cwd=tmp_path)
    assert (tmp_path / "runs" / "mined" / "report.html").exists()

    (tmp_path / "config.yaml").write_text(run(command, "init", "demo", cwd=tmp_path))
    overrides = [
        f"model.path={tiny_model}", "data.train=runs/mined/train.parquet", "data.heldout=runs/mined/heldout.parquet",
        "train.max_steps=2", "data.max_length=128", "train.dtype=fp32",
    ]  # fmt: skip
    run(command, "train", "config.yaml", *overrides, "--ranks", "1", cwd=tmp_path, OMP_NUM_THREADS="1")
    run_folder = tmp_path / "runs" / "demo"
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run_folder / "report.html").exists() and (run_folder / "export" / "model.safetensors").exists()

    # the cluster's line, which needs no checkout either
    launcher = [installed, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
    again = ["--module", "kto_dist.commands.train", "config.yaml", *overrides, "train.output=runs/again"]
    with held_port() as port:
        run(*launcher, port, *again, cwd=tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    assert len((tmp_path / "runs" / "again" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_tests_of_the_sdist_run_from_it(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    found = run(*pytest_, "--collect-only", cwd=tree)
    assert {line.partition("::")[0] for line in found.splitlines() if "::" in line} == {
        f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
    }
    run(
        *pytest_,
        "tests/test_setup.py",
        "tests/test_settings.py",
        "tests/test_readme.py",
        "tests/test_layout.py",
        cwd=tree,
    )

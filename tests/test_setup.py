"""Set-up: what a machine lacks is said before anything is installed, and the package holds what it needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check_machine(path: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("sh"), str(ROOT / "launch" / "check_machine.sh"), python]
    environment = {**os.environ, "PATH": str(path)}
    environment.pop("CXX", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ("c++", "g++", "clang++"))
def test_any_common_compiler_will_do(tmp_path, compiler):
    (tmp_path / compiler).write_text("#!/bin/sh\n")
    (tmp_path / compiler).chmod(0o755)
    assert check_machine(tmp_path, sys.executable).returncode == 0


def test_without_a_compiler_the_message_says_what_to_install(tmp_path):
    done = check_machine(tmp_path, sys.executable)
    assert done.returncode == 2
    assert "no C++ compiler" in done.stderr and "apt install g++" in done.stderr


def test_without_a_new_enough_python_the_message_says_how_to_name_one(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = check_machine(tmp_path, str(old))
    assert done.returncode == 2
    assert "3.10 or newer (Python 3.9.1)" in done.stderr and "make PYTHON=" in done.stderr


def test_every_dependency_of_setup_py_is_pinned():
    pins = {
        re.split(r"[=;]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = re.findall(r'^\s+"([A-Za-z0-9_-]+)[<>=]', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
    assert len(wanted) > 10
    assert {name.lower() for name in wanted} <= pins


@pytest.fixture(scope="module")
def kernels_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but kto_kernels, as pip installs it from `kernels/`."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(ROOT / "kernels", folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*command, folder / "site", folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.parametrize("without", ("kto_dist", "triton"))
def test_the_kernels_install_and_work_alone_with_and_without_triton(kernels_alone, without):
    code = (
        f"import sys; sys.path.insert(0, {str(kernels_alone)!r}); sys.modules[{without!r}] = None\n"
        "import torch, kto_kernels\n"
        "hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)\n"
        "given = dict(ref_logps=torch.zeros(2), sign=torch.tensor([1., -1.]), row_weight=torch.ones(2))\n"
        "head = kto_kernels.kto_head(hidden, weight, torch.tensor([1, 2, 3]), torch.tensor([2, 1]), **given,\n"
        "                            z0=torch.tensor(0.), beta=0.1)\n"
        "head.loss.backward()\n"
        "print(kto_kernels.__file__, weight.grad.shape, sorted(m for m in sys.modules if m.startswith('kto_dist')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=kernels_alone)
    assert done.returncode == 0, done.stderr
    loaded = " ['kto_dist']" if without == "kto_dist" else " []"
    assert done.stdout.strip() == f"{kernels_alone / 'kto_kernels' / '__init__.py'} torch.Size([9, 4]){loaded}"

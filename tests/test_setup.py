"""Set-up: what a machine lacks is said before anything is installed, and the package holds what it needs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import kto_dist

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_dependency_is_pinned_for_the_tests():
    pins = {
        re.split(r"[=;]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = metadata()
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert len(wanted) > 20
    assert {re.split(r"[^A-Za-z0-9_-]", name)[0].lower() for name in wanted} <= pins


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What `pip install .` installs, built from a copy: a build leaves folders in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("kto_dist", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder / "out"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / "out" / done.stdout.splitlines()[-1])


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel):
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "kto_dist"), (ROOT / "kernels", "kto_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == wanted


def test_the_version_stands_in_one_place_and_is_told_everywhere(wheel):
    (named,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    told = wheel.read(named).decode()
    assert f"\nVersion: {kto_dist.__version__}\n" in told and "\nLicense-Expression: Apache-2.0\n" in told
    assert f"\nversion: {kto_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("without", ("kto_dist", "triton"))
def test_the_kernels_work_alone_with_and_without_triton(tmp_path, without):
    shutil.copytree(ROOT / "kernels" / "kto_kernels", tmp_path / "kto_kernels")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules[{without!r}] = None\n"
        "import torch, kto_kernels\n"
        "hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)\n"
        "given = dict(ref_logps=torch.zeros(2), sign=torch.tensor([1., -1.]), row_weight=torch.ones(2))\n"
        "head = kto_kernels.kto_head(hidden, weight, torch.tensor([1, 2, 3]), torch.tensor([2, 1]), **given,\n"
        "                            z0=torch.tensor(0.), beta=0.1)\n"
        "head.loss.backward()\n"
        "print(kto_kernels.__file__, weight.grad.shape, sorted(m for m in sys.modules if m.startswith('kto_dist')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = " ['kto_dist']" if without == "kto_dist" else " []"
    assert done.stdout.strip() == f"{tmp_path / 'kto_kernels' / '__init__.py'} torch.Size([9, 4]){loaded}"

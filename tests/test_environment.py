"""A result's commit and versions, found without importing what they belong to."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kto_dist.record import environment


def test_importing_and_tagging_load_neither_mlflow_nor_deepspeed() -> None:
    code = (
        "import sys; from kto_dist.record import environment, tracking; tags = environment.environment_tags();"
        "print(tags['version.mlflow'], [name for name in ('mlflow', 'deepspeed', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, loaded = done.stdout.split(maxsplit=1)
    assert version[0].isdigit() and loaded.strip() == "[]"


def installed_in(folder: Path) -> Callable[[], dict[str, str]]:
    """`environment_tags` of a copy of its module in another folder."""
    folder.mkdir(exist_ok=True)
    copy = shutil.copy(environment.__file__, folder / "environment.py")
    spec = importlib.util.spec_from_file_location("environment", copy)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.environment_tags


def test_the_commit_is_that_of_a_checkout_and_absent_outside_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    tags_of = installed_in(tmp_path / "site-packages")
    assert "git_commit" not in tags_of()

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        done = subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    Path("config.yaml").write_text("a: 1")
    git("add", ".")
    git("commit", "-qm", "first")
    tags = tags_of()
    assert (tags["git_commit"], tags["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    Path("config.yaml").write_text("a: 2")
    assert tags_of()["git_dirty"] == "true"

    # installed into an environment inside that checkout, which says nothing about the package
    inside = installed_in(project / "venv")
    monkeypatch.chdir(tmp_path)
    assert "git_commit" not in inside()

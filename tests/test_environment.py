"""A result's commit and versions, found without importing what they belong to."""

import subprocess
import sys
from pathlib import Path

import pytest

from kto_dist.record import environment
from kto_dist.record.environment import environment_tags


def test_importing_and_tagging_load_neither_mlflow_nor_deepspeed() -> None:
    code = (
        "import sys; from kto_dist import environment, tracking; tags = environment.environment_tags();"
        "print(tags['version.mlflow'], [name for name in ('mlflow', 'deepspeed', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, loaded = done.stdout.split(maxsplit=1)
    assert version[0].isdigit() and loaded.strip() == "[]"


def test_the_commit_is_that_of_a_checkout_and_absent_outside_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "environment.py"))
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    assert "git_commit" not in environment_tags()

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        done = subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    Path("config.yaml").write_text("a: 1")
    git("add", ".")
    git("commit", "-qm", "first")
    tags = environment_tags()
    assert (tags["git_commit"], tags["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    Path("config.yaml").write_text("a: 2")
    assert environment_tags()["git_dirty"] == "true"

    # installed into an environment inside that checkout, which says nothing about the package
    monkeypatch.setattr(environment, "__file__", str(project / "environment.py"))
    monkeypatch.chdir(tmp_path)
    (project / "environment.py").touch()
    assert "git_commit" not in environment_tags()

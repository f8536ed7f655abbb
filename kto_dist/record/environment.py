"""What a result depends on beside its config: commit and versions, as tags."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path


def environment_tags() -> dict[str, str]:
    """Commit and versions that a result depends on, read from package metadata: nothing heavy is imported."""
    tags = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("kto_dist", "torch", "deepspeed", "transformers", "mlflow", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    # The package's own checkout first: the working directory may belong to another project. An environment
    # inside some repository is not tracked by it.
    for folder, file in ((Path(__file__).resolve().parent, Path(__file__).name), (Path.cwd(), ".")):
        commit = _git(folder, "rev-parse", "HEAD")
        if commit and _git(folder, "ls-files", "--error-unmatch", file):
            dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return tags | {"git_commit": commit, "git_dirty": str(bool(dirty)).lower()}
    return tags


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""A model's name that nobody can resolve is told at once, and what is in the cache needs no hub."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

LOAD = """
import sys
from kto_dist.base.errors import UserError
from kto_dist.model.loading import load_config, load_tokenizer
try:
    print(load_config("some/model").hidden_size, len(load_tokenizer("some/model")))
except UserError as error:
    print("refused:", error)
"""


DATA = """
from kto_dist.base.errors import UserError
from kto_dist.data.sources import find_sources
try:
    find_sources(["some/data:train"])
except UserError as error:
    print("refused:", error)
"""


def load(cache: Path, code: str = LOAD) -> subprocess.CompletedProcess[str]:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
        environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_a_name_that_cannot_be_reached_is_refused_without_retries(tmp_path):
    done = load(tmp_path)
    assert (
        "refused: model.path (some/model) is no folder here and not in the cache, and the hub (http://" in done.stdout
    )
    assert "Retry" not in done.stderr


@pytest.mark.parametrize("name", ("runs/my model", "model-", "a" * 200))
def test_a_name_that_no_hub_could_have_is_refused_likewise(tmp_path, name):
    done = load(tmp_path, LOAD.replace('load_config("some/model")', f"load_config({name!r})"))
    assert f"refused: model.path ({name}) is no folder here and not in the cache" in done.stdout


def test_data_that_is_no_file_and_on_no_hub_is_refused_without_retries(tmp_path):
    done = load(tmp_path, DATA)
    assert "refused: some/data:train is neither a file nor a folder here (" in done.stdout
    assert "and the hub (http://127.0.0.1:" in done.stdout and "cannot be reached: " in done.stdout
    assert "Retry" not in done.stderr


def test_a_model_in_the_cache_needs_no_hub(tmp_path):
    repository = tmp_path / "hub" / "models--some--model"
    save_tiny(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    done = load(tmp_path)
    assert done.stdout.split() == ["48", "258"]
    assert "Retry" not in done.stderr

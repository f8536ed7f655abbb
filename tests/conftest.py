"""Fixtures that several files share."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before the first import of triton: without a GPU its kernels run in Python, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from tiny import save_tiny, thumbs, write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows, 24 prompts."""
    return write_jsonl(tmp_path_factory.mktemp("log") / "thumbs.jsonl", thumbs(80, 24))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("soak") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))

"""Fixtures that several files share."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny, thumbs, write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows, 24 prompts."""
    return write_jsonl(tmp_path_factory.mktemp("log") / "thumbs.jsonl", thumbs(80, 24))

"""Fixtures that several files share."""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from _pytest.assertion.rewrite import AssertionRewritingHook
from devices import GPUS, gpus_hidden, wants_gpu
from hypothesis import HealthCheck, settings

if not GPUS:
    # before the first import of triton: without a GPU its kernels run in Python, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

# before DeepSpeed is imported: within this process it runs on the CPU, whatever there is
os.environ["DS_ACCELERATOR"] = "cpu"

# before MLflow is imported, by whichever test: it sends nothing about its use to anybody
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import process_state
import s3_server
from small_disk import mounted
from tiny import save_tiny, thumbs, write_jsonl

torch.set_num_threads(1)
# how fast a machine draws examples says nothing of what is tested
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# and a change does not fail for what an example finds that another drew: `make soak` draws new ones
settings.register_profile("same", settings.get_profile("new"), derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="module", autouse=True)
def each_file_alone() -> Iterator[None]:
    """No file of tests depends on those before it."""
    with process_state.put_back():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows, 24 prompts."""
    return write_jsonl(tmp_path_factory.mktemp("log") / "thumbs.jsonl", thumbs(80, 24))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "256k") as disk:
        yield disk


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with s3_server.serving():
        yield


@pytest.fixture(scope="module")
def fresh_memory_is_nan() -> Iterator[None]:
    """What `torch.empty` and its like give out holds NaN, so that whoever reads what nobody wrote shows it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills it for these alone
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPUS:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("soak") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around a test's fixtures as well, those of its module and of the session included."""
    with nullcontext() if wants_gpu(item) or not GPUS else gpus_hidden():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """A quiet end. What torch keeps for ever holds modules that pytest has loaded, their loader holds the session, and
    the session holds DuckDB's objects by way of the tests' parameters: DuckDB then lists hundreds of lines of leaks.
    """
    for finder in [finder for finder in sys.meta_path if isinstance(finder, AssertionRewritingHook)]:
        sys.meta_path.remove(finder)
        vars(finder).clear()

"""What tests change of the process that they run in, put back."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kto_dist.base import comm

OTHERS = {"PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK"}
"""Of the environment, what pytest and DeepSpeed's import set."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def put_back() -> Iterator[None]:
    """Environment, working directory, signal handlers, torch's settings, MLflow's address and the process group."""
    environment, folder = dict(os.environ), os.getcwd()
    handlers = [signal.getsignal(number) for number in SIGNALS]
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    in_group = torch.distributed.is_initialized()
    yield
    if not in_group:
        comm.shutdown()
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)
    for name in os.environ.keys() - environment.keys() - OTHERS:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name not in OTHERS})
    os.chdir(folder)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)

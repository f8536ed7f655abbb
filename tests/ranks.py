"""Several ranks for a test, forked from a server that has already imported everything: a second instead of ten.

`run_ranks(function, world_size, *arguments)` calls a module-level function on every rank of a fresh process group and
returns the results in rank order. An exception on a rank fails the test with that rank's traceback.

Ranks run on the CPU and see no GPU. With `gpu=True` each has one of the machine's, and is started afresh, since CUDA
does not outlive a fork.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devices import GPUS, deepspeed_on_gpu, gpus_hidden

from kto_dist.base.ports import held_port

# One thread a rank: four ranks of a test share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# The server finds modules by this alone; what it cannot import it passes over in silence.
_folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_folders, os.environ.get("PYTHONPATH", "")])

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["ranks_preload"])
_afresh = multiprocessing.get_context("spawn")


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300, gpu: bool = False
) -> list[Any]:
    if gpu and world_size > GPUS:
        pytest.skip(f"needs {world_size} GPUs, and there are {GPUS}")
    with held_port() as port:  # many tests at once start ranks
        return _run(function, world_size, port, arguments, timeout, gpu)


def _run(
    function: Callable[..., Any], world_size: int, port: int, arguments: tuple[Any, ...], timeout: float, gpu: bool
) -> list[Any]:
    context = _afresh if gpu else _server
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(sender, environment, function, arguments))
        with deepspeed_on_gpu() if gpu else gpus_hidden():  # the first also starts the server
            process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {world_size} gave no result within {timeout} s")
            try:
                kind, value = pipe.recv()
            except EOFError:
                processes[rank].join(timeout=300)
                kind, value = "died", f"rank {rank} died without a result (status {processes[rank].exitcode})"
            results.append((kind, value))
        for kind, value in results:
            if kind == "raised":
                raise value[0] from RuntimeError(value[1])
            if kind == "died":
                raise RuntimeError(value)
        return [value for _, value in results]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _rank(sender: Any, environment: dict[str, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    from kto_dist.base import comm

    torch.set_num_threads(1)
    comm.init()
    try:
        sender.send(("returned", function(*arguments)))
    except BaseException as error:
        sender.send(("raised", (error, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        comm.shutdown()

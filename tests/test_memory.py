"""Out of memory is no end: half the tokens a micro-batch, in place or after a restart, on the trajectory of that."""

import socket
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.base import comm
from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.training.config import Config
from kto_dist.training.loop import train

ROOM = 130
"""Tokens that the small device of these tests has room for; the runs ask for 256."""


def is_policys(layer: torch.nn.Module) -> bool:
    """The reference's parameters take no gradient."""
    return any(parameter.requires_grad for parameter in layer.parameters())


def small_device(phase: str, rank: int) -> None:
    """From here on one rank has no room for more than ROOM tokens in a phase: kl, forward, head or backward."""

    def full(tokens: int) -> None:
        if comm.rank() == rank and tokens > ROOM:
            raise torch.OutOfMemoryError(f"no room for {tokens} tokens")

    def before_layer(module, inputs):
        if type(module).__name__ == "LlamaDecoderLayer" and inputs:
            grad = torch.is_grad_enabled()
            if (phase == "forward" and grad) or (phase == "kl" and not grad and is_policys(module)):
                full(inputs[0].shape[0] * inputs[0].shape[1])

    def before_backward(module, gradients):
        if type(module).__name__ == "LlamaDecoderLayer" and phase == "backward":
            full(gradients[0].shape[0] * gradients[0].shape[1])

    torch.nn.modules.module.register_module_forward_pre_hook(before_layer)
    if phase == "backward":
        torch.nn.modules.module.register_module_full_backward_pre_hook(before_backward)


def train_on_a_small_device(config: Config, phase: str, rank: int) -> dict:
    small_device(phase, rank)
    return train(config)


@pytest.mark.parametrize(
    ("world", "stage", "dtype", "phase"),
    [
        (1, 2, "fp32", "backward"),
        (1, 1, "bf16", "backward"),
        (1, 2, "bf16", "forward"),
        (2, 0, "fp32", "backward"),
        (2, 1, "bf16", "backward"),
        (2, 1, "fp32", "forward"),
        (2, 2, "fp32", "kl"),
    ],
)
def test_a_step_is_done_again_in_place_on_the_trajectory_of_fewer_tokens(
    tmp_path, tiny_model, tiny_log, world, stage, dtype, phase
):
    shared = {"deepspeed__zero_stage": stage, "train__dtype": dtype, "reference__dtype": dtype, "train__max_steps": 3}
    shared |= {"train__packing": True}
    fitting = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "a"), train__tokens_per_microbatch=128, **shared
    )
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "b"), **shared)
    run_ranks(train_all, world, [fitting])
    summaries = run_ranks(train_on_a_small_device, world, config, phase, world - 1)
    assert len(summaries[0]["memory"]) == 1 and "at 256 tokens a micro-batch" in summaries[0]["memory"][0]
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    for expected, found in zip(metrics_of(fitting), metrics_of(config), strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=tolerance), (expected["step"], name)
    for name, tensor in weights_of(fitting).items():
        assert torch.norm((weights_of(config)[name] - tensor).float()) <= tolerance * torch.norm(tensor.float()), name


RESTARTING = """
import sys
import torch
from kto_dist.base import restart
from kto_dist.commands.entry import run_and_leave
from kto_dist.base import comm
from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

seen = 0

def full(module, gradients):
    global seen
    if isinstance(module, LlamaDecoderLayer):
        seen += 1
        if restart.order() is None and comm.rank() == 1 and seen > int(sys.argv[-1]):
            raise torch.OutOfMemoryError("no room")

torch.nn.modules.module.register_module_full_backward_pre_hook(full)
run_and_leave(["train", *[word for word in sys.argv[1:-1] if not word.startswith("--local_rank")]])
"""


@pytest.mark.parametrize("stage", (pytest.param(2, marks=pytest.mark.soak), 3))
def test_where_ranks_wait_for_each_other_the_run_starts_itself_again_with_half_the_tokens(
    tmp_path, tiny_model, tiny_log, stage
):
    shared = {"deepspeed__zero_stage": stage, "train__max_steps": 6, "train__packing": True}
    fitting = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "a"), train__tokens_per_microbatch=128, **shared
    )
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "b"), checkpoint__every_steps=2, **shared
    )
    run_ranks(train_all, 2, [fitting])
    (tmp_path / "job.py").write_text(RESTARTING)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port())]
    layers = 2 * 3  # of three steps
    done = subprocess.run(
        [*command, str(tmp_path / "job.py"), str(tmp_path / "config.yaml"), str(layers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Started again by itself" in done.stdout and "with train.tokens_per_microbatch=128" in done.stdout
    for expected, found in zip(metrics_of(fitting), metrics_of(config), strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (expected["step"], name)


def test_what_is_too_much_for_any_micro_batch_is_told_with_the_remedy(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    with pytest.raises(UserError, match=r"\(\d+ tokens\) alone in a micro-batch: lower data.max_length"):
        run_ranks(_train_without_room, 1, config)


def _train_without_room(config: Config) -> None:
    def full(module, inputs):
        if type(module).__name__ == "LlamaDecoderLayer" and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")

    torch.nn.modules.module.register_module_forward_pre_hook(full)
    train(config)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _reference_on_a_small_device(config: Config) -> dict:
    def full(module, inputs):
        if type(module).__name__ == "LlamaDecoderLayer" and inputs and not is_policys(module):
            tokens = inputs[0].shape[0] * inputs[0].shape[1]
            if tokens > ROOM and comm.rank() == 1:
                raise torch.OutOfMemoryError(f"no room for {tokens} tokens")

    torch.nn.modules.module.register_module_forward_pre_hook(full)
    return train(config)


def test_the_reference_pass_halves_its_tokens_as_well(tmp_path, tiny_model, tiny_log):
    shared = {"train__max_steps": 2, "reference__share_prefixes": False}
    room, full = (
        tiny_config(
            tmp_path / name,
            tiny_model,
            tiny_log,
            train__output=str(tmp_path / name),
            reference__store=str(tmp_path / f"store-{name}"),
            reference__tokens_per_batch=tokens,
            **shared,
        )
        for name, tokens in (("room", 128), ("full", 256))
    )
    run_ranks(train_all, 2, [room])
    run_ranks(_reference_on_a_small_device, 2, full)
    for expected, found in zip(metrics_of(room), metrics_of(full), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)

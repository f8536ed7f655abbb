"""Out of memory is no end: half the tokens a micro-batch, in place or after a restart, on the trajectory of that."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import metrics_of, tiny_config, train_all, weights_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kto_dist.base import comm, restart
from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.base.ports import held_port
from kto_dist.model.memory import more_room
from kto_dist.training import stepper
from kto_dist.training.config import Config
from kto_dist.training.loop import train

ROOM = 130
"""Tokens that the small device of these tests has room for; the runs ask for 256."""


def is_policys(layer: torch.nn.Module) -> bool:
    """The reference's parameters take no gradient."""
    return any(parameter.requires_grad for parameter in layer.parameters())


def small_device(phase: str, rank: int) -> None:
    """From here on one rank has no room for more than ROOM tokens in a phase: kl (or an evaluation), forward, head or
    backward."""
    seen = 0

    def full(tokens: int) -> None:
        if comm.rank() == rank and tokens > ROOM:
            raise torch.OutOfMemoryError(f"no room for {tokens} tokens")

    def before_layer(module, inputs):
        nonlocal seen
        grad = torch.is_grad_enabled()
        # the head alone takes completion rows, (N, H)
        if phase == "head" and grad and type(module).__name__ == "Linear" and inputs[0].dim() == 2:
            full(seen)
        if type(module).__name__ == "LlamaDecoderLayer" and inputs:
            seen = inputs[0].shape[0] * inputs[0].shape[1]
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
        (2, 1, "fp32", "head"),
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


def try_on_a_small_device(config: Config, phase: str, rank: int) -> dict:
    stepper.ends_suddenly = lambda device: True
    return train_on_a_small_device(config, phase, rank)


@pytest.mark.parametrize(
    ("stage", "phase", "what"), [(2, "kl", "KL pairs"), (1, "backward", "rows"), (3, None, None)], ids=str
)
def test_the_largest_micro_batches_are_tried_before_the_first_step(tmp_path, tiny_model, tiny_log, stage, phase, what):
    shared = {"deepspeed__zero_stage": stage, "train__max_steps": 2, "train__packing": True}
    fitting = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "a"), train__tokens_per_microbatch=128, **shared
    )
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "b"), **shared)
    run_ranks(train_all, 2, [fitting])
    said = [summary["memory"] for summary in run_ranks(try_on_a_small_device, 2, config, phase, 1)]
    # a step that met it would name another phase
    at_first = f"out of memory in the largest micro-batch of {what} at 256 tokens a micro-batch: going on with 128"
    assert said == [[at_first] if phase else []] * 2
    for expected, found in zip(metrics_of(fitting), metrics_of(config), strict=True):
        for name in ("loss", "kl_raw", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (expected["step"], name)


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
    tmp_path, tiny_model, tiny_log, torchrun, stage
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
    layers = 2 * 3  # of three steps
    done = subprocess.run(
        [*torchrun, str(tmp_path / "job.py"), str(tmp_path / "config.yaml"), str(layers)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Started again by itself" in done.stdout and "with train.tokens_per_microbatch=128" in done.stdout
    for expected, found in zip(metrics_of(fitting), metrics_of(config), strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (expected["step"], name)


ANSWERING = """
import sys
import torch
from kto_dist.base import comm
from kto_dist.commands.entry import run_and_leave
from kto_dist.training import samples
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

plain = samples.extend

def full(module, inputs):
    if isinstance(module, LlamaDecoderLayer) and comm.rank() == 1 and len(inputs[0]) > 1:
        raise torch.OutOfMemoryError("no room")

def extend(*arguments, **named):
    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        return plain(*arguments, **named)
    finally:
        hook.remove()

samples.extend = extend
run_and_leave(["train", *[word for word in sys.argv[1:] if not word.startswith("--local_rank")]])
"""


def test_sharded_weights_answer_half_the_prompts_at_once_after_a_restart_and_say_the_same(
    tmp_path, tiny_model, tiny_log, torchrun
):
    shared = {"deepspeed__zero_stage": 3, "train__max_steps": 1, "train__packing": False, "data__heldout": 0.3}
    shared |= {"answers__while_training": 3, "answers__max_tokens": 4, "answers__batch": 3}
    fitting = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "a"), **shared)
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "b"), **shared)
    run_ranks(train_all, 2, [fitting])
    (tmp_path / "job.py").write_text(ANSWERING)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run(
        [*torchrun, str(tmp_path / "job.py"), str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Started again by itself with answers.batch=1:") == 1
    first, second = ((Path(one.train.output) / "answers.jsonl").read_text() for one in (fitting, config))
    assert first == second and first.count("\n") == 2


def test_a_restart_keeps_what_an_earlier_one_has_set(monkeypatch):
    monkeypatch.delenv(restart.ORDER, raising=False)
    first = restart.again("no room", 3, {"train.tokens_per_microbatch": 128})
    monkeypatch.setenv(restart.ORDER, json.dumps(asdict(first)))
    second = restart.again("no room", 4, {"answers.while_training": 0, "answers.every_steps": None})
    assert restart.overrides(second.settings) == [
        "train.tokens_per_microbatch=128", "answers.while_training=0", "answers.every_steps=null"
    ]  # fmt: skip
    third = restart.again("no room", 4, {"train.tokens_per_microbatch": 64})
    assert third.settings == {"train.tokens_per_microbatch": 64}


def test_an_evaluation_is_done_again_in_place_and_finds_the_same(tmp_path, tiny_model, tiny_log):
    # without z0 there are no KL pairs, so that an evaluation alone runs the policy without gradient
    shared = {"objective__loss": "apo_zero_unpaired", "data__heldout": 0.4, "train__max_steps": 1}
    fitting, config = (
        tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / name), **shared) for name in "ab"
    )
    run_ranks(train_all, 2, [fitting])
    summaries = run_ranks(train_on_a_small_device, 2, config, "kl", 1)
    assert [len(summary["memory"]) for summary in summaries] == [1, 1]
    assert "out of memory in the evaluation's forwards at 256 tokens a micro-batch" in summaries[0]["memory"][0]
    expected, found = (
        [json.loads(line) for line in (Path(one.train.output) / "heldout.jsonl").read_text().splitlines()]
        for one in (fitting, config)
    )
    for name in ("loss", "auc", "rewards/margin"):
        assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-4, abs=1e-6)


def _train_without_room_for_states(config: Config) -> None:
    def full(optimizer, arguments, named):
        raise torch.OutOfMemoryError("no room for two moments")

    register_optimizer_step_pre_hook(full)
    train(config)


def test_no_memory_for_the_optimizers_step_is_told_with_what_to_change(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, deepspeed__zero_stage=1)
    with pytest.raises(UserError, match=r"optimizer's step.*devices, a higher stage, or take a host with more memory$"):
        run_ranks(_train_without_room_for_states, 1, config)


def test_what_is_too_much_for_any_micro_batch_is_told_with_the_remedy(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    with pytest.raises(UserError, match=r"\(\d+ tokens\) alone in a micro-batch: lower data.max_length.*more memory$"):
        run_ranks(_train_without_room, 1, config)


def test_a_gpus_states_may_lie_in_the_hosts_memory_and_those_of_a_cpu_do(monkeypatch):
    for device, remedy in (
        ("cpu", "take a host with more memory"),
        ("cuda", "offload (deepspeed.offload_optimizer: cpu)"),
    ):
        monkeypatch.setattr(comm, "device", lambda device=device: torch.device(device))
        assert more_room() == remedy


def _train_without_room(config: Config) -> None:
    def full(module, inputs):
        if type(module).__name__ == "LlamaDecoderLayer" and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")

    torch.nn.modules.module.register_module_forward_pre_hook(full)
    train(config)


@pytest.fixture
def torchrun() -> Iterator[list[str]]:
    """The start of a command line that two ranks share."""
    with held_port() as port:
        yield [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(port)]


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

"""The two engines, and the only importer of deepspeed: a policy that ZeRO shards, and a reference of its own.

In:  the config's sections, the process group. Out: `Policy` (forward, backward, step, save, load, weights) and
`Reference` (forward, close). Both wrap a `ScoringModel`; the objective sees only something to call.

DeepSpeed averages gradients over ranks and divides by accumulation steps. Both are undone in `Policy.backward`, once:
what it is given is this rank's share of a sum, and what arrives in the optimizer is the gradient of the sum.
"""

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base import agree, comm
from kto_dist.model.adapters import Adapter, gather_with_experts, put_in
from kto_dist.model.causal_lm import ScoringModel
from kto_dist.model.config import DeepspeedConfig, ModelConfig
from kto_dist.model.engine_io import PutOff, copy_swapped, gather, gathers_put_off, reads_in_turn, writes_noted
from kto_dist.model.loading import load_model, refuse_packed, set_modes
from kto_dist.model.options import claim_swap_folders, deepspeed_options, offload_options, release_swap_folder
from kto_dist.model.trial import check_runs
from kto_dist.model.zero_sums import forget_sums, own_steps, sum_in_place


@contextmanager
def _quiet_import() -> Iterator[None]:
    """DeepSpeed's import probes for compilers and libraries, and lets their complaints through on every rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner imports it, if it is there, which takes longer than all of the rest."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]


with _quiet_import(), _without_mlflow():
    import deepspeed

with _quiet_import():
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

# Its shared-memory collective leaves a segment of 66 MB a rank in /dev/shm after every run, and needs a compiler.
# Nothing else is asked of this table, which DeepSpeed would otherwise make by running compilers, on every rank.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def _sharded_load(options: dict[str, Any], adapter: Adapter | None, **arguments: Any) -> PreTrainedModel:
    """Loads a model so that with ZeRO-3 no rank ever holds all of it. (GGUF is unpacked whole, then sharded.)

    Collective with ZeRO-3, where rank 0 alone reads values: what it finds wrong is raised on every rank.
    """

    sharded = options["zero_optimization"]["stage"] == 3

    def load() -> PreTrainedModel:
        lm = load_model(**arguments)
        if adapter is not None:
            put_in(lm, adapter)
            if sharded:
                gather_with_experts(lm)
        return lm

    if not sharded:
        return load()
    if arguments["gguf_file"]:
        return agree.together(load)
    keep_alive = HfDeepSpeedConfig(options)  # transformers and peft look for it, and hold only a weak reference
    try:
        return agree.together(load)
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """The optimizer: decoupled weight decay, norms and biases exempt."""

    lr: float
    """Of the first update; `Policy.step` is given each step's own."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    """Largest global gradient norm; 0: no clipping."""


class Policy:
    """The model that is trained, as a DeepSpeed engine."""

    def __init__(
        self,
        section: ModelConfig,
        sharding: DeepspeedConfig,
        optimizer: AdamW,
        *,
        model_config: PretrainedConfig,
        dtype: torch.dtype,
        attention: str,
        kernels: str,
        adapter: Adapter | None = None,
        universal: bool = False,
        warn: Callable[[str], None] | None = None,
    ):
        """`universal`: a checkpoint of another world size is going to be loaded. `warn`: as `load_model` has it."""
        options = deepspeed_options(sharding, dtype, optimizer.clip)
        if universal:
            options["checkpoint"] = {"load_universal": True}
        self._swap_folders = claim_swap_folders(options)
        lm = agree.together(
            lambda: _sharded_load(
                options,
                adapter,
                path=section.path,
                gguf_file=section.gguf_file,
                dtype=dtype,
                attention=attention,
                kernels=kernels,
                quantization=section.quantization,
                config=model_config,
                trust_remote_code=section.trust_remote_code,
                warn=warn,
            )
        )
        refuse_packed(lm, section.path)
        if section.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        set_modes(lm)
        self.model = ScoringModel(lm)
        self.adapted = adapter is not None
        """Whether an adapter alone is trained."""
        if self.adapted:
            self.model.register_state_dict_post_hook(_without_frozen)
        self._stage = options["zero_optimization"]["stage"]
        self._on_cpu = sharding.offload_optimizer != "none"
        adamw = _adamw(self.model, optimizer, on_cpu=self._on_cpu)
        self._settings, self._decays = optimizer, [group["weight_decay"] for group in adamw.param_groups]
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=adamw,
            config=options,
            dist_init_required=False,
        )
        comm.apply_timeout()
        self.forward = self.engine
        # on a GPU, where it would save less, it has not been tried
        alone_on_a_cpu = comm.world_size() == 1 and comm.device().type == "cpu"
        if self._stage == 2 and not self._on_cpu and alone_on_a_cpu:
            sum_in_place(self.engine.optimizer)
        agree.together(lambda: check_runs(self.forward, self.model, comm.device()))
        if self._stage <= 1:
            # reduced in `step`, so that no rank waits for another in the middle of a backward
            self.engine.enable_backward_allreduce = False

    @property
    def waits_in_forward(self) -> bool:
        """Whether ranks wait for each other in the middle of a forward: weights are gathered."""
        return self._stage == 3

    @property
    def waits_in_backward(self) -> bool:
        """Whether ranks wait for each other in the middle of a backward, or one cannot be thrown away halfway."""
        return self._stage == 3 or (self._stage == 2 and comm.world_size() > 1)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this rank's share; `last` marks the step's final micro-batch, on every rank alike."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * comm.size(comm.DATA), scale_wrt_gas=False)

    def bytes_to_come(self) -> int:
        """Of the device's memory: the optimizer's states, which exist from the first update on."""
        held = sum(t.numel() for state in self._optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        if self._on_cpu or held:
            return 0
        # two moments in fp32 of this rank's share
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        return 8 * whole // (comm.world_size() if self._stage else 1)

    def forget(self) -> None:
        """Throws away the gradients of a step that was broken off. Where `waits_in_backward` there are none: only
        what comes before the first backward can be done again there."""
        if self.waits_in_backward:
            return
        for parameter in self.model.parameters():
            parameter.grad = None
        if self._stage > 0:
            forget_sums(self.engine.optimizer)

    def step(self, lr: float) -> Tensor | float:
        """One AdamW update; returns the global gradient norm before clipping, on whatever device it lies."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self._stage <= 1:
            self.engine.allreduce_gradients()
        if self._stage == 0:
            # the engine reports none without ZeRO
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        self.engine.step()
        return self.engine.get_global_grad_norm() if norm is None else norm

    def save(self, folder: Path, tag: str, *, first: bool | None, put_off: list[PutOff] | None = None) -> None:
        """Collective. Writes `folder/tag`; does not touch DeepSpeed's `latest`, which is not written atomically.

        `first`: of the ranks that see this folder. It writes the weights that all have alike, which DeepSpeed leaves to
        rank 0, whose folder other hosts may not see; None with ZeRO-3, where each has its share. `put_off`: where this
        rank's files come in place of the disk.
        Raises on all ranks where one could not write.
        """
        if first is not None:
            self.engine.save_non_zero_checkpoint = first
        with writes_noted(self.engine, put_off) as failures:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=self.adapted)

        def finish() -> None:
            if failures:
                raise failures[0]
            copy_swapped(self.engine, folder / tag)

        agree.side_by_side(finish)

    @property
    def reads_in_turn(self) -> bool:
        """Whether the ranks of a host `read` one after the other, so that they need less of its memory."""
        return reads_in_turn(self.engine)

    def read(self, folder: Path, tag: str) -> None:
        """This rank's files of a checkpoint. `loaded` has to follow, when all ranks have read theirs."""
        with gathers_put_off(self.engine):
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self.adapted)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {folder}")

    def loaded(self) -> None:
        """Collective. Weights, optimizer states and the engine's own counters are those of the files."""
        gather(self.engine)
        # the files bring the settings of then along, and this run has its own
        for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
            group.update(betas=self._settings.betas, eps=self._settings.eps, weight_decay=decay)
        if hasattr(self._optimizer, "clip_grad"):
            self._optimizer.clip_grad = self._settings.clip
        own_steps(self._optimizer)

    def weights(self) -> dict[str, Tensor] | None:
        """Collective. What is trained, the whole model or its adapter, in its training dtype on rank 0's CPU, None
        elsewhere."""
        state: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor, and are saved once
        for name, tensor in self.model.lm.state_dict(keep_vars=True).items():
            if self.adapted and not tensor.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if comm.is_main():
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                    state[name] = copies[id(tensor)]
        return state if comm.is_main() else None

    def unmoved(self) -> list[str]:
        """Collective. Layers whose adapter adds 0, as a fresh one does: after an update, those that got no gradient."""
        found = []
        for name, tensor in self.model.lm.named_parameters():
            if ".lora_B." in name:
                with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    if not tensor.any():
                        found.append(name.partition(".lora_B.")[0])
        return found

    def close(self) -> None:
        _destroy(self.engine, self.model)
        for folder in self._swap_folders:
            comm.barrier()
            release_swap_folder(folder)


def _without_frozen(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Takes out what the model's files hold anyway. DeepSpeed's own way leaves the second name of tied weights."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _adamw(model: nn.Module, settings: AdamW, *, on_cpu: bool) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) > 1]
    exempt = [p for p in model.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    arguments: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if on_cpu:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a frozen model's parameters lie."""

    sharded: bool
    """ZeRO-3 over the ranks, in place of a whole copy on every device."""
    offload: Literal["none", "cpu", "nvme"]
    """Where ZeRO-3 keeps them."""
    nvme_path: str | None


class Reference:
    """The frozen model, in memory only while pairs are scored."""

    def __init__(
        self,
        placement: Placement,
        *,
        path: str,
        gguf_file: str | None,
        model_config: PretrainedConfig,
        dtype: torch.dtype,
        attention: str,
        kernels: str,
        device: torch.device,
        trust_remote_code: bool = False,
        quantization: str = "none",
        adapter: Adapter | None = None,
    ):
        options: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3 if placement.sharded else 0},
        }
        if placement.offload != "none":
            options["zero_optimization"]["offload_param"] = offload_options(placement.offload, placement.nvme_path)
        self._swap_folders = claim_swap_folders(options)
        lm = _sharded_load(
            options,
            adapter,
            path=path,
            gguf_file=gguf_file,
            dtype=dtype,
            attention=attention,
            kernels=kernels,
            quantization=quantization,
            config=model_config,
            trust_remote_code=trust_remote_code,
        )
        lm.requires_grad_(False)
        set_modes(lm)
        self.model = ScoringModel(lm)
        self.sharded = placement.sharded
        """Whether ranks wait for each other in a forward."""
        self._engine = None
        if placement.sharded:
            self._engine, *_ = deepspeed.initialize(model=self.model, config=options, dist_init_required=False)
            comm.apply_timeout()
            self._engine.eval()
        else:
            self.model.to(device)
        self.forward = self._engine or self.model
        check_runs(self.forward, self.model, device)

    def close(self, *, wait: bool = True) -> None:
        """Gives the memory back. The object is not usable afterwards.

        Collective; not with `wait` False, for when an error is on its way, which the other ranks may not have met.
        """
        if self._engine is not None:
            _destroy(self._engine, self.model)
            for folder in self._swap_folders:
                if wait:
                    comm.barrier()
                release_swap_folder(folder)
        del self.forward, self.model, self._engine
        _return_memory()


def _destroy(engine: Any, model: nn.Module) -> None:
    # `engine.destroy()` alone frees nothing: a global stack holds the modules, a cache on a class the coordinator.
    engine.destroy()
    own = {id(module) for module in model.modules()}
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if id(module) not in own]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    # the cache lies below a decorator that keeps no reference to what it wraps but its closure
    cached = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _return_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps freed blocks for itself otherwise
        trim(0)

"""Checkpoints that are whole or absent, resume, and the export in Hugging Face layout.

    <output>/checkpoints/step-00000040/   DeepSpeed's files, rng-rank-*.pt, and state.json, which lists every file

A checkpoint is written below a hidden name, flushed to disk, and renamed when every rank is done, so one that a crash
cut short is never seen. On hosts without a shared file system each keeps its own part, and the newest step that all
of them have is resumed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from kto_dist.base import agree, comm
from kto_dist.base.errors import UserError
from kto_dist.base.files import write_whole
from kto_dist.model.engines import Policy
from kto_dist.training.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a resumed run must know beside the engine's own states."""

    step: int
    """Optimizer steps done."""
    world_size: int
    zero_stage: int
    identity: dict[str, Any]
    """What decides the trajectory: another value means another run."""
    mlflow_run: str | None


def identity(config: Config, *, data: str, policy: str, reference: str | None, zero_stage: int) -> dict[str, Any]:
    """`data`, `policy` and `reference`: fingerprints of the tokenised rows, of the starting weights, and of the
    reference's where it is another model.

    The ZeRO stage leaves the trajectory alone, but another stage cannot read the optimizer's states.
    """
    return {
        "data": data,
        "model": policy,
        "reference": reference,
        "train.seed": config.train.seed,
        "train.global_batch": config.train.global_batch,
        "train.dtype": config.train.dtype,
        "deepspeed.zero_stage": zero_stage,
        **{f"kto.{key}": value for key, value in config.kto.model_dump(mode="json").items()},
    }


def folder(output: str | Path) -> Path:
    return Path(output) / "checkpoints"


def save(policy: Policy, output: str | Path, state: State, keep: int) -> Path:
    """Collective. Returns the finished checkpoint's folder."""
    name = f"step-{state.step:08d}"
    root = folder(output)
    partial = root / f".partial-{name}"

    def finish() -> None:
        if not partial.exists():  # another host of a shared file system has done it
            return
        files = {
            str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()
        }
        for file in files:
            _flush(partial / file)
        write_whole(partial / "state.json", json.dumps({**asdict(state), "files": files}, indent=1).encode())
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(partial, root / name)
        _flush(root)
        for old in _complete(root)[keep:]:
            shutil.rmtree(root / old)

    agree.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    agree.once_per_host(lambda: partial.mkdir(parents=True, exist_ok=True))
    policy.save(root, partial.name)
    torch.save(_random_states(), partial / f"rng-rank-{comm.rank()}.pt")
    comm.barrier()
    agree.once_per_host(finish)
    return root / name


def find(output: str | Path, warn: Callable[[str], None]) -> Path | None:
    """Collective. The newest checkpoint that is whole on every host."""
    root = folder(output)
    seen = [
        set(names)
        for names in comm.gather(_complete(root, warn) if comm.local_rank() == 0 else None)
        if names is not None
    ]
    common = set.intersection(*seen)
    return root / max(common) if common else None


def read_state(checkpoint: Path) -> State:
    content = json.loads((checkpoint / "state.json").read_text())
    del content["files"]
    return State(**content)


def check_same_run(found: State, now: dict[str, Any], output: str) -> None:
    """Raises `UserError` when the checkpoint is another run's."""
    if "reference" not in found.identity and now["reference"] is not None:
        raise UserError(
            f"the checkpoint in train.output ({output}) does not say from which weights its policy started: an older "
            "version of kto_dist wrote it, which noted those of reference.path alone. Go on with that version, give "
            "another train.output, or delete the folder's checkpoints"
        )
    differing = [
        f"{key} was {found.identity.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if found.identity.get(key) != value
    ]
    if differing:
        raise UserError(
            f"the checkpoint in train.output ({output}) belongs to another run: {'; '.join(differing)}. "
            "Give another train.output, or delete the folder's checkpoints"
        )


def load(policy: Policy, checkpoint: Path, universal: Path | None) -> None:
    """Collective. Restores weights, optimizer and random states."""
    source = universal or checkpoint
    policy.load(source.parent, source.name)
    states = checkpoint / f"rng-rank-{comm.rank()}.pt"
    if states.exists():
        _set_random_states(torch.load(states, weights_only=False))


def to_universal(checkpoint: Path, found: State) -> Path | None:
    """Collective. Re-cuts a checkpoint that another world size wrote; None where that is not needed."""
    if found.world_size == comm.world_size() or found.zero_stage == 0:
        return None
    target = checkpoint.with_name(f".universal-{checkpoint.name}")

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"{checkpoint} was written by {found.world_size} ranks and could not be re-cut for "
                f"{comm.world_size()}: {done.stderr.strip()[-500:]}; resume with {found.world_size} ranks"
            )

    agree.on_main(convert)
    return target


def _complete(root: Path, warn: Callable[[str], None] | None = None) -> list[str]:
    """Names of whole checkpoints, newest first."""
    names = []
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            files = json.loads((path / "state.json").read_text())["files"]
            whole = all((path / file).stat().st_size == size for file, size in files.items())
        except (OSError, json.JSONDecodeError, KeyError):
            whole = False
        if whole:
            names.append(path.name)
        elif warn:
            warn(f"checkpoint {path} is damaged: passed over")
    return names


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(comm.device()) if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], comm.device())


def export(
    weights: dict[str, Tensor],
    target: Path,
    *,
    model_config: PretrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> None:
    """Rank 0. Writes a Hugging Face folder (safetensors, tokenizer, model card) and loads it back to check it.

    The folder appears whole: it is written beside `target` and takes its place when the check has passed.
    """
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    # the shell gives the names and the ties; the tensors are ours
    if generation_config is not None:
        shell.generation_config = generation_config
    shell.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")

    mask = os.umask(0)
    os.umask(mask)
    for file in partial.iterdir():  # safetensors writes for the owner alone
        file.chmod(0o666 & ~mask)

    loaded = AutoModelForCausalLM.from_pretrained(partial, dtype=dtype).state_dict()
    wrong = [name for name, tensor in weights.items() if name not in loaded or not torch.equal(loaded[name], tensor)]
    if wrong:
        raise RuntimeError(f"the export does not load back as it was written: {', '.join(wrong[:5])}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)

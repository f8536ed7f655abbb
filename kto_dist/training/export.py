"""A model in Hugging Face layout: written whole, and loaded back before it takes its place.

In:  weights, from the policy in memory or from a checkpoint of a run that has ended (`kto-dist export`).
"""

import copy
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from kto_dist.base import disks
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.model import engine_files
from kto_dist.model.adapters import pick_adapter
from kto_dist.model.loading import load_config, load_tokenizer
from kto_dist.record.run_folder import RunFolder, read_lines
from kto_dist.training import checkpoint
from kto_dist.training.beside import beside, copy_beside, unreadable
from kto_dist.training.card import checkpoint_card
from kto_dist.training.config import Config
from kto_dist.training.lock import RunLock


def export(
    weights: dict[str, Tensor],
    target: Path,
    *,
    model_config: PretrainedConfig,
    source: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    trust_remote_code: bool = False,
) -> None:
    """Rank 0. Writes a Hugging Face folder (safetensors, tokenizer, model card) and loads it back to check it.

    `source`: where the model's generation settings, processors and code lie, which go along. The folder appears whole:
    it is written beside `target` and takes its place when the check has passed.
    """
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = max(weights.values(), key=Tensor.numel).dtype  # of small ones some may be buffers in fp32
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(_dense(model_config), dtype=dtype, trust_remote_code=trust_remote_code)
    # The shell gives the names and the ties; the tensors are ours. It empties what it is given, and they are compared
    # below.
    shell.save_pretrained(partial, state_dict=dict(weights))
    tokenizer.save_pretrained(partial)
    copy_beside(source, partial)
    (partial / "README.md").write_text(card, encoding="utf-8")

    readable(partial)

    lm = AutoModelForCausalLM.from_pretrained(partial, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded = lm.state_dict()
    # a family may load some in fp32, which holds every value of bf16
    wrong = [n for n, t in weights.items() if n not in loaded or not torch.equal(loaded[n].to(t.dtype), t)]
    if wrong:
        raise RuntimeError(f"the export does not load back as it was written: {', '.join(wrong[:5])}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def readable(folder: Path) -> None:
    """By whom files of this process are: safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _dense(model_config: PretrainedConfig) -> PretrainedConfig:
    """As the weights are now: those of a packed checkpoint were unpacked to be trained."""
    config = copy.deepcopy(model_config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def export_checkpoint(run: Path, step: int | None, target: Path | None, console: Console) -> Path:
    """Writes the model of a run's checkpoint, by default its newest whole one, and returns where.

    On one process, whatever number of ranks wrote it. Raises `UserError`.
    """
    folder = RunFolder(run)
    if not folder.config.exists():
        raise UserError(f"{run} holds no run: it has no {folder.config.name}; give the folder that train.output names")
    config = Config.load(folder.config)
    target = target or folder.export
    finished = f"the run is finished, and its model is {folder.export}" if folder.summary.exists() else ""
    if target.exists():
        what = f" ({finished})" if finished and target == folder.export else ""
        raise UserError(f"{target} exists{what}: give another folder with --output, or remove it")
    lock = RunLock(run, uuid.uuid4().hex, console.say)
    lock.take()
    try:
        found = _chosen(run, step, console, finished)
        state = checkpoint.read_state(found)
        model = config.model
        console.say(f"{found.name}, written by {state.world_size} ranks")
        source = beside(model.path)
        if text := unreadable(source):
            console.warn(text)
        adapter = pick_adapter(config.adapter, base=model.path, seed=config.train.seed)
        weights = engine_files.consolidated(
            found.parent, found.name, state.zero_stage, _dtype_of(state, found), adapted=adapter is not None
        )
        lines = [line for line in read_lines(folder.metrics) if line["step"] == state.step]
        given: dict[str, Any] = {
            "model_config": load_config(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code),
            "tokenizer": load_tokenizer(model.path, model.gguf_file, trust_remote_code=model.trust_remote_code),
            "card": checkpoint_card(config, state.step, lines[0] if lines else {}),
            "trust_remote_code": model.trust_remote_code,
        }
        with disks.refusals("the export", "its folder", target):
            if adapter is None:
                export(weights, target, source=source, **given)
            else:
                from kto_dist.training.adapter_export import export_adapter

                export_adapter(weights, target, adapter=adapter, **given)
    finally:
        lock.release()
    return target


def _chosen(run: Path, step: int | None, console: Console, finished: str) -> Path:
    """A checkpoint that is whole. `finished`: what is said of a run that needs none."""
    finished = finished and f"; {finished} (such a run keeps checkpoints where checkpoint.every_steps is set)"
    root = checkpoint.folder(run)
    there = [checkpoint.name_of(number) for number in sorted(checkpoint.steps(run))]
    if step is None:
        found = checkpoint.find(run, console.warn)
        if found is None:
            damaged = f" ({', '.join(there)} are damaged)" if there else ""
            raise UserError(f"{run} holds no whole checkpoint{damaged}{finished}")
        return found
    chosen = root / checkpoint.name_of(step)
    if not chosen.exists():
        raise UserError(f"{run} has no checkpoint of step {step}: it has {', '.join(there) or 'none'}{finished}")
    if wrong := checkpoint.damage(chosen):
        raise UserError(f"checkpoint {chosen} is damaged: {'; '.join(wrong)}; choose another of {', '.join(there)}")
    return chosen


def _dtype_of(state: checkpoint.State, found: Path) -> torch.dtype:
    """In which the run trained; the optimizer's master weights are fp32 in any case."""
    noted = str(state.identity["train.dtype"])
    if noted == "auto":  # an older version did not say what that meant, but DeepSpeed's names do
        return torch.bfloat16 if any(found.glob("bf16_*")) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(noted) or getattr(torch, noted)

"""Checkpoints whose files and config.json do not belong together."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny


def rewrite(folder: Path, change) -> Path:
    """`change`: of the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **values) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def no_head(folder: Path) -> Path:
    return rewrite(save_tiny(folder), lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})


def prefixed(folder: Path) -> Path:
    return rewrite(save_tiny(folder), lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()})


def layer_more(folder: Path) -> Path:
    return edit_config(save_tiny(folder), num_hidden_layers=3)


def other_architecture(folder: Path) -> Path:
    return edit_config(save_tiny(folder), model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])


def other_shape(folder: Path) -> Path:
    return edit_config(save_tiny(folder), vocab_size=300)


def damaged(folder: Path) -> Path:
    file = save_tiny(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def damaged_bin(folder: Path) -> Path:
    file = save_tiny(folder) / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:-1000])
    return folder


# how it is made -> what is said of it
MISFITS = {
    no_head: r"lack 1 of the 21 tensors of LlamaForCausalLM \(lm_head.weight\).*base model without its LM head",
    prefixed: r'lack 21 of the 21.*names in the files begin with "_orig_mod\.": save them without it',
    layer_more: r"lack 9 of the 30.*counts 3 layers and the files hold 2",
    other_architecture: r"lack \d+ of the \d+ tensors of GPTNeoX.*another architecture \(model_type gpt_neox\)",
    other_shape: r"2 of another shape \(lm_head.weight is 258 x 48 and should be 300 x 48.*different models or sizes",
    damaged: r"model.safetensors \([\d,]+ bytes\) cannot be read as weights, it is damaged or cut short",
    damaged_bin: r"pytorch_model.bin \([\d,]+ bytes\) cannot be read as weights, it is damaged or cut short",
}

"""An adapter in peft's layout, and a model with its adapter merged in: each written whole, and loaded back first.

In:  an adapter's values, from the policy in memory or from a checkpoint; or its folder. Out: a folder.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kto_dist.base import disks
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.model.adapter_files import base_of, named_in_files, read_json
from kto_dist.model.adapters import NAME, Adapter, from_folder, injected, merge_in
from kto_dist.model.causal_lm import DTYPES
from kto_dist.model.config import ModelConfig, check_model_path
from kto_dist.model.loading import load_config, load_model, load_tokenizer, without_contents
from kto_dist.record.run_folder import RunFolder
from kto_dist.store.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kto_dist.training.beside import beside
from kto_dist.training.config import Config
from kto_dist.training.export import export, readable


def export_adapter(
    weights: dict[str, Tensor],
    target: Path,
    *,
    adapter: Adapter,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    trust_remote_code: bool = False,
) -> None:
    """Rank 0. Writes the adapter's folder, which loads with `PeftModel.from_pretrained`, and takes its place when it
    has been loaded so and compared."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def hollow() -> PreTrainedModel:
        return _hollow(without_contents(model_config, trust_remote_code=trust_remote_code))

    # "all-linear" becomes the names of layers, so that another version of peft finds the same ones
    lm = injected(hollow(), adapter)
    wanted = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert weights.keys() == wanted, f"the adapter's weights are not those of its settings: {wanted ^ weights.keys()}"
    settings = lm.peft_config[NAME]
    settings.inference_mode = True
    settings.save_pretrained(partial)
    _sort_targets(partial / ADAPTER_CONFIG)
    named = {named_in_files(name, NAME): tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    readable(partial)

    loaded = PeftModel.from_pretrained(hollow(), str(partial), torch_device="cpu")
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    wrong = [n for n, t in named.items() if n not in found or not torch.equal(found[n].to(t.dtype), t)]
    if wrong or found.keys() != named.keys():
        raise RuntimeError(f"the adapter does not load back as it was written: {', '.join(wrong[:5])}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _hollow(lm: PreTrainedModel) -> PreTrainedModel:
    """On the CPU, with one number in memory for every weight of the model, which an adapter's do not read."""
    for module in lm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(one, requires_grad=False))
    return lm


def _sort_targets(file: Path) -> None:
    """peft writes sets, in whatever order they have."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters"):
        if isinstance(found[name], list):
            found[name] = sorted(found[name])
    file.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")


def export_merged(
    folder: Path,
    target: Path,
    *,
    model: ModelConfig,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    source: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> None:
    """On one process. The model with the adapter in `folder` merged into it, as a Hugging Face folder."""
    adapter = from_folder("the adapter", folder)
    lm = load_model(
        model.path,
        gguf_file=model.gguf_file,
        dtype=dtype,
        attention="eager",
        config=model_config,
        trust_remote_code=model.trust_remote_code,
    )
    merge_in(lm, adapter)
    weights = {name: tensor.detach() for name, tensor in lm.state_dict().items()}
    export(
        weights,
        target,
        model_config=model_config,
        source=source,
        tokenizer=tokenizer,
        card=card,
        trust_remote_code=model.trust_remote_code,
    )


def merge(
    given: Path,
    target: Path | None,
    console: Console,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Merges the adapter of a run, or that of a folder, into its base model, and returns where. Raises `UserError`.

    `base` and `gguf_file`: the model; None: that of the run, or what the adapter names. `dtype` auto: as its files say.
    """
    run = RunFolder(given)
    folder = given

    def named() -> ModelConfig:
        return ModelConfig(path=base or base_of(folder), gguf_file=gguf_file, trust_remote_code=trust_remote_code)

    if run.config.is_file():
        folder, config = run.export, Config.load(run.config)
        if config.adapter.type == "none":
            raise UserError(f"{given} is a run without an adapter: {run.export} is its whole model")
        if not folder.exists():
            raise UserError(f"{given} has no {folder.name}/: `kto-dist export {given}` writes its newest checkpoint's")
        model = config.model if base is None and gguf_file is None else named()
    else:
        model = named()
    read_json("the adapter", folder)
    target = target or folder.with_name(f"{folder.name}-merged")
    if target.exists():
        raise UserError(f"{target} exists: give another folder with --output, or remove it")
    check_model_path("the adapter's base model", model.path)
    model_config = load_config(
        model.path, model.gguf_file, "the adapter's base model", trust_remote_code=model.trust_remote_code
    )
    own = getattr(model_config, "dtype", None)
    picked = DTYPES.get(dtype) or (own if isinstance(own, torch.dtype) else torch.float32)
    console.say(f"merging {folder} into {model.path}, in {str(picked).removeprefix('torch.')}")
    with disks.refusals("the merged model", "--output", target):
        export_merged(
            folder,
            target,
            model=model,
            model_config=model_config,
            dtype=picked,
            source=beside(model.path),
            tokenizer=load_tokenizer(
                str(folder) if (folder / "tokenizer_config.json").is_file() else model.path,
                None if (folder / "tokenizer_config.json").is_file() else model.gguf_file,
                trust_remote_code=model.trust_remote_code,
            ),
            card=f"---\nbase_model: {model.path}\nlibrary_name: transformers\ntags: [kto_dist]\n---\n\n"
            f"# {target.name}\n\n{model.path} with the adapter {folder.name} merged in.\n",
        )
    return target

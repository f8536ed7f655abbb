"""An adapter beside weights in 4 bits: the reference is the packed model, and the run is one of an adapter."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import save_tiny
from tiny_runs import metrics_of, tiny_config, train_all
from transformers import AutoModelForCausalLM

from kto_dist.base.errors import UserError
from kto_dist.model import loading
from kto_dist.model.devices import cost_of
from kto_dist.model.footprint import shape_of
from kto_dist.model.loading import load_model, pick_quantization
from kto_dist.training.config import Config

needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
PACKED: dict[str, Any] = {
    "model__quantization": "nf4",
    "adapter__type": "lora",
    "adapter__rank": 4,
    "train__lr": 1e-2,
    "train__max_steps": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose rows are whole blocks of 64 weights."""
    return save_tiny(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


@needs_package
def test_linear_layers_but_the_head_lie_in_4_bits_of_the_dtype_that_is_computed_in(model):
    lm = load_model(str(model), gguf_file=None, dtype=torch.bfloat16, attention="sdpa", quantization="nf4")
    plain = load_model(str(model), gguf_file=None, dtype=torch.bfloat16, attention="sdpa")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.lm_head.weight.shape == plain.lm_head.weight.shape
    layer = lm.model.layers[0].mlp.up_proj.weight
    assert layer.numel() * layer.element_size() == plain.model.layers[0].mlp.up_proj.weight.numel() // 2
    # arithmetic is that of whole weights, memory that of packed ones
    assert cost_of(lm).decoder == cost_of(plain).decoder
    packed, whole = shape_of(lm), shape_of(plain)
    assert packed.parameters == whole.parameters and whole.packed == 0
    assert packed.packed == packed.parameters - 2 * packed.head - sum(
        p.numel() for p in plain.parameters() if p.dim() == 1
    )


@needs_package
@pytest.mark.parametrize(
    ("world", "stage", "dtype"),
    [
        pytest.param(1, 0, "fp32", marks=pytest.mark.soak),
        pytest.param(2, 1, "fp32", marks=pytest.mark.soak),
        (2, 2, "bf16"),
    ],
)
def test_the_packed_model_is_the_reference_and_an_adapter_learns_beside_it(
    tmp_path, model, tiny_log, world, stage, dtype
):
    shared = {"train__dtype": dtype, "reference__dtype": dtype}
    whole = {**shared, "model__quantization": "none", "train__output": str(tmp_path / "whole")}
    config = tiny_config(tmp_path, model, tiny_log, **{**PACKED, **shared, "deepspeed__zero_stage": stage})
    summary, plain = run_ranks(
        train_all, world, [config, tiny_config(tmp_path, model, tiny_log, **{**PACKED, **whole})]
    )[0]
    first, last = metrics_of(config)[0], metrics_of(config)[-1]
    assert abs(first["kl_raw"]) < (1e-4 if dtype == "fp32" else 0.5) and last["kl_raw"] != 0
    # another model than the whole one, which the store knows
    assert summary["reference"]["fingerprint"] != plain["reference"]["fingerprint"]
    assert summary["reference"]["scored"] == plain["reference"]["scored"] > 0
    export = Path(config.train.output) / "export"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(export))
    assert loaded(torch.arange(2, 34).view(2, 16)).logits.isfinite().all()
    assert json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


@pytest.mark.gpu
@needs_package
def test_on_a_gpu_the_packed_model_is_the_reference_and_every_layer_of_the_adapter_learns(tmp_path, model, tiny_log):
    settings = {**PACKED, "train__dtype": "bf16", "reference__dtype": "bf16"}
    config = tiny_config(tmp_path, model, tiny_log, **settings)
    run_ranks(train_all, 1, [config], gpu=True)
    first, last = metrics_of(config)[0], metrics_of(config)[-1]
    assert abs(first["kl_raw"]) < 0.5 and last["kl_raw"] != 0
    values = load_file(Path(config.train.output) / "export" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in values.values())


@needs_package
def test_packing_is_a_part_of_the_run_that_a_checkpoint_belongs_to(tmp_path, model, tiny_log):
    config = tiny_config(tmp_path, model, tiny_log, **PACKED, checkpoint__every_steps=2)
    run_ranks(train_all, 1, [config])
    (Path(config.train.output) / "summary.json").unlink()
    other = {**PACKED, "model__quantization": "fp4", "checkpoint__every_steps": 2}
    with pytest.raises(UserError, match="model.quantization was 'nf4' and is 'fp4'"):
        run_ranks(train_all, 1, [tiny_config(tmp_path, model, tiny_log, **other)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__type": "none", "adapter__rank": None}, r"model.quantization \(nf4\) needs adapter.type lora, not"),
        ({"adapter__type": "dora"}, r"model.quantization \(nf4\) needs adapter.type lora, not dora"),
        ({"deepspeed__zero_stage": 3}, r"model.quantization \(nf4\) needs deepspeed.zero_stage 0, 1 or 2, not 3"),
        ({"reference__offload": "cpu"}, r"reference.quantization \(nf4\) needs reference.zero_stage 0 and"),
    ],
)
def test_what_4_bits_cannot_do_is_refused_when_settings_are_read(tmp_path, model, tiny_log, changes, message):
    def build(**settings: Any) -> Config:
        return tiny_config(tmp_path, model, tiny_log, **settings)

    with pytest.raises(UserError, match=message):
        build(**{**PACKED, **changes})
    if "reference__offload" in changes:
        build(**{**PACKED, **changes, "reference__quantization": "none"})


def test_without_the_package_it_is_refused_in_a_sentence(monkeypatch):
    assert pick_quantization("model.quantization", "none") == "none"
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"reference.quantization \(nf4\) needs the package bitsandbytes.*qlora"):
        pick_quantization("reference.quantization", "auto", like="nf4")
    assert pick_quantization("reference.quantization", "none", like="nf4") == "none"

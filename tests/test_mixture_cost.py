"""What a mixture of experts asks of a device: the arithmetic and the memory of those that a token is sent to."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kto_dist.model.footprint import Shape, shape_of

HIDDEN, INNER, LAYERS = 32, 24, 2
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 128}


def _config(kind: str, experts: int, routed: int) -> AutoConfig:
    """Each family names them in its own way."""
    if kind == "dbrx":
        ffn = {"moe_num_experts": experts, "moe_top_k": routed, "ffn_hidden_size": INNER}
        sizes = {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "vocab_size": 128}
        return AutoConfig.for_model(kind, ffn_config=ffn, attn_config={"kv_n_heads": 2, "rope_theta": 1e4}, **sizes)
    names = {
        "mixtral": {"num_local_experts": experts, "num_experts_per_tok": routed, "intermediate_size": INNER},
        "granitemoe": {"num_local_experts": experts, "num_experts_per_tok": routed, "intermediate_size": INNER},
        "olmoe": {"num_experts": experts, "num_experts_per_tok": routed, "intermediate_size": INNER},
        "hunyuan_v1_moe": {
            "num_experts": experts,
            "moe_topk": [routed] * LAYERS,
            "intermediate_size": INNER,
            "head_dim": 8,
        },
    }
    return AutoConfig.for_model(kind, **SIZES, num_key_value_heads=2, **names[kind])


def _shape(kind: str, experts: int, routed: int) -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(_config(kind, experts, routed)))


@pytest.mark.parametrize("kind", ("mixtral", "dbrx", "granitemoe", "olmoe", "hunyuan_v1_moe"))
def test_a_token_costs_the_experts_that_it_is_sent_to_and_no_others(kind):
    few, many, two = _shape(kind, 4, 1), _shape(kind, 8, 1), _shape(kind, 8, 2)
    one = 3 * HIDDEN * INNER * LAYERS
    assert many.parameters - few.parameters == 4 * (one + LAYERS * HIDDEN)
    # a router asks about each
    assert many.cost.decoder - few.cost.decoder == pytest.approx(4 * LAYERS * HIDDEN)
    assert two.cost.decoder - many.cost.decoder == pytest.approx(one)
    shared = INNER if kind == "hunyuan_v1_moe" else 0  # one more, that every token passes
    assert (few.inner, two.inner) == (INNER + shared, 2 * INNER + shared)


def test_experts_that_are_stacked_under_another_name_count_as_experts():
    """jetmoe has such ones in its MLP, beside experts in its attention."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "kv_channels": 8}
    names = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": INNER, "vocab_size": 128}
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes, **names))
    stacked = sum(p.numel() for name, p in lm.named_parameters() if p.dim() == 3 and ".experts." not in name)
    every = sum(p.numel() for name, p in lm.named_parameters() if p.dim() == 3)
    assert 0 < stacked < every
    whole = sum(p.numel() for name, p in lm.named_parameters() if p.dim() == 2 and ".experts." not in name)
    assert 2 / 8 * every < shape_of(lm).cost.decoder < 2 / 8 * every + whole

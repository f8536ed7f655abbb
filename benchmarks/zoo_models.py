"""Every causal family of the installed transformers in miniature: configs small enough to run in milliseconds.

In:  a model type. Out: a tiny config of it with all that decides its function left in: each kind of layer once,
experts, windows, sparse attention, longrope's switch, with windows and their like shorter than `zoo.py`'s sequences.

1. `SIZES`      what a field of a config becomes, by its name
2. `OWN`        what a family needs besides
3. `config_of`  the family's default config with both
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 260
WINDOW = 6
"""Of windows, sparse attention and the rest that only long rows meet."""

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

HIDDEN = 32
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim", "word_embed_proj_dim"),
        HIDDEN,
    ),
    **dict.fromkeys(
        ("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width", "hidden_size_global"),
        HIDDEN,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "dim_ff", "d_inner"),
        48,
    ),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
        ),
        16,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks"), 2
    ),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "linear_num_heads",
            "mamba_n_heads",
            "n_mamba_heads",
            "mamba_num_heads",
            "swa_num_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    "linear_num_value_heads": 4,
    # with few heads most scores of an indexer are exactly 0, and which of them it takes depends on the width of a row
    "index_n_heads": 16,
    **dict.fromkeys(
        (
            "head_dim",
            "global_head_dim",
            "v_head_dim",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "swa_head_dim",
            "kv_channels",
            "dim_head",
            "d_head",
            "mamba_d_head",
            "mamba_head_dim",
            "attention_head_size",
            "query_pre_attn_scalar",
        ),
        8,
    ),
    "encoder_hash_byte_group_vocab": VOCABULARY,
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size"), HIDDEN),
    "qk_head_dim": 16,
    "index_head_dim": 16,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "gated_norm_rank", "hc_lowrank"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "o_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_d_ssm",), HIDDEN),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "adapter_rank", "ple_embed_dim", "router_hidden_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 512),
    **dict.fromkeys(
        (
            "sliding_window",
            "window_size",
            "sliding_window_size",
            "attention_chunk_size",
            "attention_window_size",
            "local_attention",
            "keep_window_size",
            "index_topk",
            "floor_scale",
        ),
        WINDOW,
    ),
    **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "decoder_start_token_id"), 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_OF_EACH = ("layer_types", "layers_block_type", "block_types")
"""Lists of the kinds of layers: each kind comes in once."""

_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 2,
}
_DOTS3 = {"num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {}}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LONGROPE = {
    "original_max_position_embeddings": 4 * WINDOW,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 4 * WINDOW,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
_MLA = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        _MLA,
    ),
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "bamba": {"mamba_d_head": 16},
    "granitemoehybrid": {"mamba_d_head": 16},
    "dbrx": {
        "default": {"attn_config": {"rope_theta": 1e4}},
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "phi3": _LONGROPE,
    "phimoe": {"rope_parameters": _LONGROPE["rope_parameters"] | {"short_mscale": 1.2, "long_mscale": 1.3}},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(kind: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[kind]
    default = config_class(**OWN.get(kind, {}).get("default", {}))
    return AutoConfig.for_model(kind, **settings(kind, default))


def settings(kind: str, default: PretrainedConfig) -> dict[str, Any]:
    """What the family's config class is called with."""
    found = _small(default)
    for name in type(default).sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            found[name] = {"model_type": inner.model_type, **_small(inner), **OWN.get(inner.model_type, {})}
    own = {name: value for name, value in OWN.get(kind, {}).items() if name != "default"}
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] |= value
        else:
            found[name] = value
    return found


def _small(config: PretrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    mapped = {target: name for name, target in config.attribute_map.items()}
    found: dict[str, Any] = {}
    for name, value in values.items():
        size = SIZES.get(name, SIZES.get(mapped.get(name, "")))
        if size is not None and isinstance(value, int) and not isinstance(value, bool):
            found[name] = size if value or name.endswith("_token_id") else value
        elif name.endswith("_token_id") and isinstance(value, (list, int)):
            found[name] = 0
        elif name == "head_dim" and value is None:
            found[name] = SIZES[name]
    if values.get("is_decoder") is False and not values.get("is_encoder_decoder"):
        # of an encoder's family, the half that generates
        found["is_decoder"] = True
    for name in ONE_OF_EACH:
        if isinstance(values.get(name), list) and values[name]:
            kinds = list(dict.fromkeys(values[name]))
            found[name] = kinds if len(kinds) > 1 else kinds * 2
            found["num_hidden_layers"] = len(found[name])
    if isinstance(values.get("mlp_layer_types"), list):
        count = found.get("num_hidden_layers", 2)
        kinds = list(dict.fromkeys(values["mlp_layer_types"]))
        found["mlp_layer_types"] = (kinds * count)[:count]
    if "initializer_range" in values:
        found["initializer_range"] = 0.2
    return found

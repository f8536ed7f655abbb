"""config.json of models as they were published, without what names tokens; their known sizes, outlines and plans.

`PUBLISHED`: name -> (config, billions of parameters, billions of those that a token passes; of one without experts the
same). Counts are those of the models' own pages.
"""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kto_dist.cluster.hardware import cluster_of
from kto_dist.cluster.plan import Method, Plan, plan
from kto_dist.cluster.predict import Way
from kto_dist.cluster.workload import of_means
from kto_dist.model.footprint import Shape
from kto_dist.model.loading import load_config, without_contents
from kto_dist.training.config import Config

WAY = Way(
    zero_stage=3,
    offload_optimizer=False,
    offload_parameters=False,
    checkpointing=False,
    tokens=8192,
    bf16=True,
    fused=True,
    packed=True,
    logits_bytes=2**31,
)


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kept: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kept,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "max_window_layers": layers,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }


_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}
_GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "pad_token_id": 32000,
}
_FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "vocab_size": 65024,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "activation_function": "gelu_new",
    "vocab_size": 50257,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Llama-3.1-8B": (_llama(4096, 14336, 32, 32), 8.03, 8.03),
    "Llama-3.1-70B": (_llama(8192, 28672, 80, 64), 70.55, 70.55),
    "Llama-3.1-405B": (_llama(16384, 53248, 126, 128), 405.85, 405.85),
    "Qwen2.5-7B": (_qwen2(3584, 18944, 28, 28, 4), 7.62, 7.62),
    "Qwen2.5-72B": (_qwen2(8192, 29568, 80, 64, 8), 72.71, 72.71),
    "Qwen3-30B-A3B": (_QWEN3_MOE, 30.53, 3.35),
    "Mixtral-8x7B": (_MIXTRAL, 46.70, 12.88),
    "gemma-2-9b": (_GEMMA2, 9.24, 9.24),
    "gemma-3-27b": (_GEMMA3, 27.43, 27.43),
    "DeepSeek-V3": (_DEEPSEEK_V3, 671.0, 37.5),
    "Phi-3-mini-4k": (_PHI3, 3.82, 3.82),
    "falcon-7b": (_FALCON, 6.92, 6.92),
    "gpt2": (_GPT2, 0.1244, 0.1244),
    "Mistral-7B": (_MISTRAL, 7.24, 7.24),
    "OLMo-2-7B": (_OLMO2, 7.30, 7.30),
    "gpt-oss-20b": (_GPT_OSS, 20.91, 3.6),
}


def write(name: str, folder: Path) -> Path:
    """A folder with this model's config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    return folder


@cache
def outline(name: str) -> PreTrainedModel:
    """The model without contents."""
    with tempfile.TemporaryDirectory() as folder:
        return without_contents(load_config(str(write(name, Path(folder)))))


def hollow(folder: Path) -> PreTrainedModel:
    """The model of a folder, without contents."""
    return without_contents(load_config(str(folder)))


def config_of(**changes: Any) -> Config:
    tree: dict[str, dict[str, Any]] = {"model": {"path": "m"}, "data": {"train": "t", "max_length": 1024}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section] = {**tree.get(section, {}), key: value}
    return Config.build(tree)


def planned(
    shape: Shape,
    gpu: str,
    gpus: int,
    tokens: int = 600,
    method: Method = "full",
    **changes: Any,
) -> Plan:
    config = config_of(**{"train__global_batch": max(64, 4 * gpus)} | changes)
    work = of_means(config, 100_000, tokens / 2, tokens / 2)
    return plan(config, shape, work, cluster_of(gpu, gpus), method=method)

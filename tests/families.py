"""Model families in miniature, packed sequences for them, and their log-probs from the untouched model."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kto_dist.data.batch import collate
from kto_dist.model.causal_lm import completion_logps

VOCABULARY = 99
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64}
# name -> (model type, settings, attention); windows are shorter than the sequences below
FAMILIES = {
    "llama": ("llama", {}, "sdpa"),
    "llama_eager": ("llama", {}, "eager"),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, "sdpa"),
    "gpt2": ("gpt2", GPT, "sdpa"),
    "qwen2": ("qwen2", {}, "sdpa"),
    "qwen3": ("qwen3", {"head_dim": 8}, "sdpa"),
    "phi_with_bias": ("phi", {}, "sdpa"),
    "mistral_window": ("mistral", {"sliding_window": 4}, "sdpa"),
    "gemma2_softcap": (
        "gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
        "eager",
    ),
    "gemma3_window": ("gemma3_text", {"head_dim": 8, "sliding_window": 4}, "sdpa"),
    "granite_scaling": ("granite", {"logits_scaling": 3.0}, "sdpa"),
    "cohere_scale": ("cohere", {"logit_scale": 0.3}, "sdpa"),
    "cohere2_window": ("cohere2", {"logit_scale": 0.3, "sliding_window": 4}, "sdpa"),
    "mixtral_experts": ("mixtral", {"num_local_experts": 4}, "sdpa"),
    "nanochat_softcap": ("nanochat", {"final_logit_softcapping": 2.0}, "sdpa"),
}
FALCON_H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "lm_head_multiplier": 0.4,
}
# Families whose state or mask runs on over a restart of the positions.
UNPACKABLE = {
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "sdpa"),
    "falcon": ("falcon", {}, "sdpa"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "eager"),
    "mamba": ("mamba", {}, "eager"),
    "falcon_h1": ("falcon_h1", FALCON_H1, "sdpa"),
}
HEADS = {
    "falcon_h1": ("falcon_h1", FALCON_H1, "sdpa"),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 3.0}, "sdpa"),
    "minicpm3": (
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
        "sdpa",
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 4, "logits_soft_cap": 2.0},
        "sdpa",
    ),
}


def tiny(family, attention=None):
    """`family`: of the tables above. `attention`: in place of its own."""
    kind, settings, own = family
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **settings})
    attention = attention or own
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    bias = lm.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)  # it starts at zero, where it would not be missed
    return lm


def sequences(seed=0):
    draw = np.random.default_rng(seed)
    lengths = ((3, 5), (7, 2), (1, 9), (6, 6))
    return [(draw.integers(3, VOCABULARY, p), draw.integers(3, VOCABULARY, c)) for p, c in lengths]


@torch.no_grad()
def from_own_logits(lm, pairs):
    """(S,) each sequence alone through the untouched model."""
    result = []
    for prompt, completion in pairs:
        logits = lm(input_ids=torch.tensor(np.concatenate([prompt, completion]))[None], use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        result.append(logps.gather(-1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(result)


@torch.no_grad()
def scored(model, pairs, packed):
    batch = collate(pairs, np.arange(len(pairs)), packed=packed)
    return completion_logps(model, batch, model.transform, 7 * VOCABULARY * 4)


def neighbourly(hidden, much):  # (R, T, H)
    """A layer's output in which each position also has a little of the one before it in the row, like a state."""
    found = hidden.clone()
    found[:, 1:] += much * hidden[:, :-1]
    return found

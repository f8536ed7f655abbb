"""A tiny model, tokenizer and log of thumbs, built on the spot, for tests that need no real model."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and ChatML's two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """About 70,000 parameters in two layers."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings))


def save_tiny(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder as `from_pretrained` wants it."""
    tiny_llama(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def thumbs(rows: int, prompts: int, seed: int = 0, longest: int = 40) -> list[dict[str, object]]:
    """Rows of random words with labels that follow a rule (an answer without an "e" is good), unequal classes."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join("".join(rng.choices("abcdeghilmno", k=rng.randint(1, 6))) for _ in range(count))

    questions = [words(rng.randint(1, 4)) for _ in range(prompts)]
    result = []
    for row in range(rows):
        answer = words(rng.randint(1, 6))[:longest]
        result.append({"prompt": questions[row % prompts], "completion": answer, "label": "e" not in answer})
    return result


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

"""Answers of a model to a list of questions: greedy, in batches, as the demo shows them before and after.

Comes in: a Hugging Face model folder and questions. Goes out: one answer a question, in the questions' order.
Decoding is greedy, so that a difference between two models' answers is a difference between the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(model_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in bf16, on the GPU where there is one, and its tokenizer set up for batched generation."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Generated tokens follow the last column, so every prompt must end there.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    **decoding: object,
) -> list[str]:
    """One answer for each conversation (a list of chat messages), all in one batch, stripped.

    `decoding` goes to `generate`: `max_new_tokens`, `do_sample`, `temperature`, ...
    """
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    # The template has written every special token already.
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    tokens = model.generate(
        **batch,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **decoding,
    )
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def generate(
    model_dir: str | Path,
    questions: Sequence[str],
    max_new_tokens: int = 80,
    batch: int = 36,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers to `questions`, each asked alone as the user's message.

    `progress(done, total)` is called after every batch.
    """
    model, tokenizer = load(model_dir)
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        conversations = [[{"role": "user", "content": q}] for q in questions[start : start + batch]]
        answers += reply(model, tokenizer, conversations, max_new_tokens=max_new_tokens, do_sample=False)
        if progress is not None:
            progress(len(answers), len(questions))
    return answers

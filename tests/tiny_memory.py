"""A device that runs out of memory, as tests of whole runs put it in place on one of two ranks."""

from typing import Any

import torch
from transformers import LlamaForCausalLM

from kto_dist.base import comm


def room_for_one_prompt() -> None:
    """From here on, in a process that ends with the test: rank 1 cannot answer several prompts at once."""
    plain = LlamaForCausalLM.generate

    def generate(lm: Any, ids: Any, **named: Any) -> Any:
        if comm.rank() == 1 and len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return plain(lm, ids, **named)

    LlamaForCausalLM.generate = generate

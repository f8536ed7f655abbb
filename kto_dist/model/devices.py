"""What a device can do and what a model asks of it: peaks, and the arithmetic of a pass.

`Cost` counts what a step must do, whatever the implementation: 2 FLOP a parameter of the matmuls and token forward, 4
backward, 2 of one that is frozen; attention by the positions that each token sees; the LM head on completion rows
alone. Embeddings look up and count nothing, and neither does what checkpointing computes twice.
"""

import contextlib
import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_dist.model.attention import largest

# Dense bf16 peak of one device in FLOP/s, from the makers' datasheets, by `kind`.
PEAKS = {
    "A100": 312e12,
    "A100PCIE": 312e12,
    "H100": 989e12,
    "H100PCIE": 756e12,
    "H100NVL": 835e12,
    "H200": 989e12,
    "H200NVL": 835e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI300X": 1307e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX4090": 165.2e12,
}
_SAYS_NO_KIND = re.compile(r"NVIDIA|AMD|INSTINCT|GEFORCE|TESLA|GPU|OAM|VF|SXM\d?|HBM\d?E?")
_SIZE = re.compile(r"(\d+)GI?B?")


def kind(name: str) -> tuple[str, float | None]:
    """What people or torch call a GPU -> its kind, and the GB of memory that the name states.

    "NVIDIA A100-SXM4-40GB" and "a100 40GB" -> ("A100", 40.0); "RTX 4090" and "RTX4090" -> ("RTX4090", None)
    """
    words = [word for word in re.split(r"[^A-Z0-9]+", name.upper()) if word and not _SAYS_NO_KIND.fullmatch(word)]
    sizes = [float(found[1]) for word in words if (found := _SIZE.fullmatch(word))]
    kinds = [re.sub(r"(?<=\d)SXM\d?$", "", word) for word in words if not _SIZE.fullmatch(word)]
    return "".join(kinds), sizes[0] if sizes else None


def peak() -> float | None:
    """FLOP/s of this process's device in bf16; None where it is not known."""
    return PEAKS.get(kind(torch.cuda.get_device_name())[0]) if torch.cuda.is_available() else None


def named_device(device: torch.device) -> str:
    """What decides how it rounds, as far as a name tells: the GPU, or the processor and its vector units."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # a virtual machine may lack what the processor of its name has
    units = [
        torch.backends.cpu.get_cpu_capability(),
        *(unit for unit in ("amx_bf16", "avx512_bf16") if known.get(unit)),
    ]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return ", ".join([line.partition(":")[2].strip(), *units])
    return ", ".join([platform.machine(), *units])


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The arithmetic of one model."""

    decoder: float
    """Parameters of the matmuls that every token passes; of experts, those that a token is sent to."""
    head: int
    """Parameters of the LM head."""
    attention: tuple[tuple[int, int | None], ...]
    """Of each layer: heads times their size, and the window in positions (None: all)."""
    frozen_decoder: float = 0.0
    """Of `decoder`, what has no gradient."""
    frozen_head: int = 0
    """Of `head`."""
    experts: float = 0.0
    """Of `decoder`, those of experts."""
    stored: float = 0.0
    """As `decoder`, with all experts: what a pass reads."""

    def backward(self, lengths: np.ndarray, head_rows: int) -> float:
        """FLOP of the backward after `forward`."""
        spared = 2 * (self.frozen_decoder * float(lengths.sum()) + self.frozen_head * head_rows)
        return 2 * self.forward(lengths, head_rows) - spared

    def forward(self, lengths: np.ndarray, head_rows: int) -> float:
        """FLOP of a forward over sequences of (S,) tokens, `head_rows` of which reach the head."""
        tokens = float(lengths.sum())
        seen: dict[int | None, float] = {}
        total = 2 * (self.decoder * tokens + self.head * head_rows)
        for width, window in self.attention:
            if window not in seen:
                seen[window] = _positions_seen(lengths, window)
            # scores and weighted values: a multiplication and an addition each
            total += 4 * width * seen[window]
        return total


def _positions_seen(lengths: np.ndarray, window: int | None) -> float:
    """Pairs of positions that causal attention compares."""
    tokens = lengths.astype(np.float64)
    if window is None:
        return float((tokens * (tokens + 1) / 2).sum())
    near = np.minimum(tokens, window)
    return float((near * (near + 1) / 2 + (tokens - near) * window).sum())


def cost_of(lm: PreTrainedModel) -> Cost:
    """Of a causal language model, sharded or not."""
    config = lm.config.get_text_config()
    looked_up = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    passed_by = looked_up | of_other_senses(lm)
    head = lm.get_output_embeddings().weight
    experts, routed = experts_of(config)
    decoder = frozen = of_all_experts = stored = 0.0
    for name, parameter in lm.named_parameters():
        if parameter is head or id(parameter) in passed_by or len(_shape(parameter)) < 2:
            continue
        # some families name no experts, and stack them
        of_experts = ".experts." in name or (len(_shape(parameter)) == 3 and _shape(parameter)[0] == experts)
        share = routed / experts if experts and routed and of_experts else 1.0
        decoder += share * math.prod(_shape(parameter))
        stored += math.prod(_shape(parameter))
        of_all_experts += share * math.prod(_shape(parameter)) if of_experts else 0.0
        frozen += 0.0 if parameter.requires_grad else share * math.prod(_shape(parameter))
    size = math.prod(_shape(head))
    return Cost(
        decoder=decoder,
        head=size,
        attention=_attention(config),
        frozen_decoder=frozen,
        frozen_head=0 if head.requires_grad else size,
        experts=of_all_experts if experts and routed else 0.0,
        stored=stored,
    )


def of_other_senses(lm: nn.Module) -> set[int]:
    """Parameters, by `id`, of towers for images and sounds, which no token of a text passes."""
    towers = [m for m in lm.modules() if isinstance(m, PreTrainedModel) and "text" not in m.input_modalities]
    return {id(parameter) for tower in towers for parameter in tower.parameters()}


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def experts_of(config: Any) -> tuple[int | None, float | None]:
    """How many there are in a layer, and how many of them a token is sent to (on average over the layers)."""
    routed = stated(config, *_ROUTED)
    if isinstance(routed, list | tuple):
        routed = sum(routed) / len(routed)
    return stated(config, *_EXPERTS), routed


def stated(config: Any, *names: str) -> Any:
    """The first of these that a config has, or its section of the MLP, where dbrx keeps them; None where none has."""
    values = (getattr(part, name, None) for part in (config, getattr(config, "ffn_config", None)) for name in names)
    return next((value for value in values if value), None)


def _attention(config: Any) -> tuple[tuple[int, int | None], ...]:
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", None)
    if not heads:
        return ()
    width = round(heads * head_width(config))
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    windows = {
        "sliding_attention": window,
        "full_attention": None,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    return tuple((width, windows[kind]) for kind in kinds if kind in windows)


def head_width(config: Any) -> float:
    """Of a head of attention: of its queries and its values on average, where they differ (MLA, whose `head_dim` is the
    part that turns with the position)."""
    turned, other = (getattr(config, f"qk_{part}_head_dim", None) or 0 for part in ("rope", "nope"))
    if turned + other:
        return (turned + other + (getattr(config, "v_head_dim", None) or turned + other)) / 2
    return float(largest(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of all ranks' parts together; of what is packed into 4 bits, unpacked."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape)


def make_deterministic() -> None:
    """The same bits from every run on the same devices: deterministic algorithms, flash attention's backward too.

    cuBLAS reads its variable when it is first used, NCCL when its first communicator is made.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # no kernel of ours reads what nobody wrote, and filling costs a pass over all fresh memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

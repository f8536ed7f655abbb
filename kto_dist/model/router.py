"""The loss that keeps a mixture's experts evenly loaded, as a sum over tokens that any micro-batches add up to.

In:  the logits that the routers of a forward gave to T tokens, (T, E) each. Out: sums over tokens.

With L routers, E experts and k of them a token, over all routers together (Eq. 4 to 6 of arXiv 2101.03961, as
`load_balancing_loss_func` of transformers has it):

    f_e  = routings to expert e / (L T)         P_e = sum of its probabilities / (L T)
    loss = E * sum over e of f_e P_e

f has no gradient, and belongs to the whole step: it is counted ahead, without gradient, and a constant from there on.
What is left is linear in the probabilities.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kto_dist.base.errors import UserError

Router = Callable[[Sequence[Tensor], Tensor], Tensor]
# L times (T, E) logits, (T,) bool whether there is a token -> sums over tokens

_FUNCTION = "load_balancing_loss_func"
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What is known of a model's routers before it is loaded."""

    coefficient: float
    """Of the loss; above 0."""
    top_k: int
    """Experts that a token is sent to."""


def routing_of(
    setting: Literal["auto"] | float,  # `objective.router_loss`
    config: PretrainedConfig,  # that the class is built from
    kind: type[PreTrainedModel] | None,  # the class that the model is loaded as
) -> Routing | None:
    """Of a model whose family has the loss above; None: nothing is to be added.

    Raises `UserError` where a coefficient was asked for, and the family has none.
    """
    text = config.get_text_config()
    nested = getattr(text, "ffn_config", None)  # dbrx
    own = _first(text, nested, "router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
    top_k = _first(text, nested, "num_experts_per_tok", "moe_top_k")
    if not _has_loss(kind) or top_k is None:
        if setting in ("auto", 0.0):
            return None
        raise UserError(
            f"objective.router_loss ({setting}) cannot be had: transformers has no such loss for {config.model_type}, "
            "whose layers have no experts or balance them in another way; set it to auto or 0"
        )
    coefficient = float(own or 0.0) if setting == "auto" else float(setting)
    return Routing(coefficient=coefficient, top_k=int(top_k)) if coefficient else None


def _first(text: Any, nested: Any, *names: str) -> Any:
    """The first of these that a config has, or what is nested in it."""
    values = (getattr(part, name, None) for part in (text, nested) for name in names)
    return next((value for value in values if value is not None), None)


def _has_loss(kind: type[PreTrainedModel] | None) -> bool:
    """Whether the family's own loss is the one above, over logits that its decoder gives when it is asked."""
    function = getattr(sys.modules.get(kind.__module__), _FUNCTION, None) if kind is not None else None
    recorded = getattr(kind, "_can_record_outputs", None) or {}
    return (
        function is not None
        and list(inspect.signature(function).parameters) == _ARGUMENTS
        and "router_logits" in recorded
    )


def counting(top_k: int) -> Router:
    """A router's view that counts: (L, E) fp64, tokens that each router sends to each expert."""

    def count(logits: Sequence[Tensor], is_token: Tensor) -> Tensor:
        counts = []
        for each in logits:
            chosen = torch.topk(_probabilities(each), top_k, dim=-1).indices
            found = torch.zeros(each.shape[-1], dtype=torch.float64, device=each.device)
            counts.append(found.index_add_(0, chosen.reshape(-1), is_token.double().repeat_interleave(top_k)))
        # a config may make every layer of such a family a dense one
        return torch.stack(counts) if counts else torch.zeros(0, 0, dtype=torch.float64, device=is_token.device)

    return count


def weighing(load: Tensor | None) -> Router:  # (E,) f of the step; None: even
    """A router's view that weighs probabilities: (), the sum over routers, tokens and experts of f_e p_e."""

    def weigh(logits: Sequence[Tensor], is_token: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=is_token.device)
        for each in logits:
            p = _probabilities(each) * is_token[:, None]
            sums = p.sum(0, dtype=torch.float64)
            total = total + (sums if load is None else sums * load).sum()
        return total

    return weigh


def load_of(counts: Tensor, top_k: int) -> Tensor:  # (L, E) -> (E,) fp64
    """f: of each expert, the share of tokens that are sent to it, over all routers; k in all."""
    return counts.sum(0) * top_k / counts.sum().clamp(min=1)


def _probabilities(logits: Tensor) -> Tensor:  # (T, E) -> (T, E), fp32 at least
    return logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

"""Sums over rows, by class, and the one division that turns them into what is logged.

1. `row_table`      (S, Q): what is known of each row, for whoever needs rows: intervals, slices, samples
2. `by_class`       (2, S, Q): 0 for undesirable and 1 for desirable rows. Summed over rows it is (2, Q), which adds up
                    over shards; summed over classes it is the table again
3. `step_metrics`   the only division. A class without rows is absent from the result.
4. `pair_metrics`   means over pairs, from the table of a loss on pairs
5. `source_metrics` the same by source of the data, from the table
6. `part_metrics`   the same of some of the rows, from the table
7. `router_metrics` of a mixture of experts, how evenly they are loaded

A row whose label is a probability p counts to the desirable ones by p and to the others by 1 - p, in every quantity.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

QUANTITIES = ("rows", "weight", "loss", "reward", "logps", "ref_logps", "correct", "saturated", "tokens")
CLASSES = ("undesirable", "desirable")


def row_table(
    *,
    losses: Tensor,  # (S,) fp64, unweighted: 1 - v for kto
    weight: Tensor,  # (S,)
    logps: Tensor,  # (S,)
    ref_logps: Tensor,  # (S,)
    sign: Tensor,  # (S,) +1 or -1
    z0: Tensor,  # ()
    beta: float,
    tokens: Tensor,  # (S,) completion tokens
    saturated: Tensor | None = None,  # (S,) bool, as the loss's own curve says; None: no row is
    beside: Tensor | None = None,  # (S,) what is added to the weighted loss
    rounding: float = 0.0,  # nats per square root of a row's tokens
    share: Tensor | None = None,  # (S,) fp64, how much of each row `sign` speaks of; `weight` has it in it. None: all
) -> Tensor:  # (S, Q) fp64
    """A row is correct when its log-ratio lies on its label's side of z0; on it, to `rounding`, counts as half."""
    log_ratio = logps - ref_logps
    correct = (torch.sign(sign * unrounded(log_ratio - z0, tokens, rounding)) + 1) / 2
    weighted = weight * losses
    columns = (
        torch.ones_like(losses),
        weight,
        weighted if beside is None else weighted + beside,
        beta * log_ratio,
        logps,
        ref_logps,
        correct,
        torch.zeros_like(losses) if saturated is None else saturated,
        tokens,
    )
    table = torch.stack([column.detach().double() for column in columns], dim=1)
    if share is not None:
        shared = torch.tensor([name not in ("weight", "loss") for name in QUANTITIES], device=table.device)
        table = torch.where(shared, share[:, None] * table, table)
    return table


def unrounded(difference: Tensor, tokens: Tensor, rounding: float) -> Tensor:  # (S,), (S,) -> (S,)
    """Differences of log-probs, with 0 for those within what a precision rounds: what is equal compares as equal."""
    return torch.where(difference.abs() <= rounding * tokens.sqrt(), 0.0, difference)


def by_class(table: Tensor, sign: Tensor) -> Tensor:  # (S, Q), (S,) -> (2, S, Q), each row in its class, 0 in the other
    desirable = (sign > 0)[:, None]
    return torch.stack([torch.where(desirable, 0.0, table), torch.where(desirable, table, 0.0)])


def step_metrics(
    sums: Tensor,  # (2, Q) over all ranks
    kl: Tensor,  # (2,) sum and count of log-ratios over the KL pairs of all ranks
) -> dict[str, float]:
    """Means over rows, for all and per class. `loss` is the objective: weighted losses over the number of rows."""
    table = {name: dict(zip(QUANTITIES, row, strict=True)) for name, row in zip(CLASSES, sums.tolist(), strict=True)}
    table["all"] = {quantity: sum(table[name][quantity] for name in CLASSES) for quantity in QUANTITIES}
    result = {"loss": table["all"]["loss"] / max(1.0, table["all"]["rows"])}
    kl_sum, kl_count = kl.tolist()
    if kl_count:
        result |= {
            "kl": max(kl_sum / kl_count, 0.0),  # in this order a NaN stays one
            "kl_raw": kl_sum / kl_count,
            "kl_clamped": float(kl_sum < 0),
            "kl_pairs": kl_count,
        }
    for name, total in table.items():
        if not total["rows"]:
            continue
        if name != "all":
            result[f"loss/{name}"] = total["loss"] / total["rows"]
        result |= {
            f"rewards/{name}": total["reward"] / total["rows"],
            f"accuracy/{name}": total["correct"] / total["rows"],
            f"logps/{name}": total["logps"] / total["rows"],
            f"ref_logps/{name}": total["ref_logps"] / total["rows"],
            f"saturated/{name}": total["saturated"] / total["rows"],
            f"rows/{name}": total["rows"],
        }
    if all(f"rewards/{name}" in result for name in CLASSES):
        result["rewards/margin"] = result["rewards/desirable"] - result["rewards/undesirable"]
    return result


def pair_metrics(table: Tensor) -> dict[str, float]:  # (2 P, Q), of each pair the chosen row, then the rejected one
    """Means over pairs; of equal rewards a pair counts as half right. Without pairs: nothing."""
    rewards = table[:, QUANTITIES.index("reward")].view(-1, 2)
    if not len(rewards):
        return {}
    chosen, rejected = rewards.mean(0).tolist()
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": float(margins.mean()),
        "accuracy/pairs": float(((margins.sign() + 1) / 2).mean()),
        "pairs": float(len(rewards)),
    }


def source_metrics(
    table: Tensor,  # (S, Q) of the rows of all ranks, on the CPU
    source: np.ndarray,  # (S,) number of each row's source
    names: Sequence[str],
) -> dict[str, float]:
    """Means over the rows of each source; a source without rows is absent, as are sources that are not told apart."""
    if len(names) < 2:
        return {}
    sums = torch.zeros(len(names), len(QUANTITIES), dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(source.astype(np.int64)), table)
    result: dict[str, float] = {}
    for name, values in zip(names, sums.tolist(), strict=True):
        result |= _means(values, f"source/{name}")
    return result


def part_metrics(
    table: Tensor,  # (S, Q) of the rows of all ranks, on the CPU
    chosen: np.ndarray,  # (S,) bool
    name: str,
) -> dict[str, float]:
    """Means over the chosen rows; nothing where there are none."""
    return _means(table[torch.from_numpy(chosen)].sum(0).tolist(), name)


def _means(sums: Sequence[float], name: str) -> dict[str, float]:  # (Q,) of the rows that are called so
    total = dict(zip(QUANTITIES, sums, strict=True))
    if not total["rows"]:
        return {}
    return {
        f"loss/{name}": total["loss"] / total["rows"],
        f"rewards/{name}": total["reward"] / total["rows"],
        f"rows/{name}": total["rows"],
    }


def router_metrics(loss: float, counts: Tensor) -> dict[str, float]:  # (L, E) routings, on the CPU
    """The loss that balances experts, without its coefficient, and of each router how much more than an even share its
    busiest expert has: 1 where all have the same."""
    busiest = counts.shape[1] * counts.max(1).values / counts.sum(1).clamp(min=1)
    return {"router/loss": loss} | {f"router/max_load/{number}": value for number, value in enumerate(busiest.tolist())}


def clamp_kl(kl: Tensor) -> Tensor:  # (2,) sum and count -> () fp64
    """z0: the mean log-ratio over all KL pairs of the step, clamped at 0 once; 0 where there are none."""
    return (kl[0] / kl[1].clamp(min=1)).clamp(min=0)

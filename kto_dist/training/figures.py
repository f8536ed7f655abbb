"""What is logged of a step, and what it says of the steps to come."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from kto_dist.base import comm
from kto_dist.data.examples import Examples
from kto_dist.model.devices import Cost, peak
from kto_dist.objective import metrics
from kto_dist.training.step import StepResult, StepWork

FEW = 3
"""Steps after which their rate says how long a run will take."""
_LONG = timedelta(days=2)


def step_figures(
    result: StepResult, work: StepWork, cost: Cost, seconds: float, *, steps_per_epoch: int, unit: int = 1
) -> dict[str, Any]:
    """The step's line of metrics."""
    figures: dict[str, Any] = {
        "step": result.step,
        "epoch": result.step / steps_per_epoch,
        **metrics.step_metrics(result.sums, result.kl),
        **(metrics.pair_metrics(result.table) if unit > 1 else {}),
        **({} if (routed := result.routed) is None else metrics.router_metrics(routed.loss, routed.counts)),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
    }
    rows = int(work.answers.sum())
    flops = cost.forward(work.lengths, rows) + cost.backward(work.lengths, rows)
    flops += cost.forward(work.kl_lengths, int(work.kl_answers.sum()))
    if routed is not None and not work.kl_lengths.size:  # the load of experts was counted on the rows themselves
        flops += cost.forward(work.lengths, 0)
    if (rate := peak()) is not None:
        figures["mfu"] = flops / seconds / (rate * comm.world_size())
    return figures


def part_figures(result: StepResult, train: Examples, sources: Sequence[str]) -> dict[str, float]:
    """Of the step's rows by source, and of those that another row contradicts."""
    found = metrics.source_metrics(result.table, train.source[result.rows], sources)
    return found | metrics.part_metrics(result.table, train.contradicted[result.rows], "contradicted")


def line_of(figures: Mapping[str, float]) -> str:
    shown = [f"loss {figures['loss']:.4f}"]
    shown += [f"{name} {figures[name]:+.2f}" for name in ("kl_raw", "rewards/margins") if name in figures]
    return "  ".join([*shown, f"{figures['tokens_per_second']:,.0f} tokens/s"])


def is_sound(figures: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in figures.values())


def due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def long_way(steps: int, seconds_a_step: float) -> str | None:
    """What is said of steps that will take days at this rate."""
    if steps * seconds_a_step <= _LONG.total_seconds():
        return None
    return f"at {seconds_a_step:.3g} s a step the {steps:,} steps that are left take {duration(steps * seconds_a_step)}"


def beyond_grace(step: float, checkpoint: float, grace: float) -> str | None:
    """What is said where a step and its checkpoint take more seconds than there are after SIGTERM."""
    if step + checkpoint <= grace:
        return None
    return (
        f"a step takes {step:.3g} s and its checkpoint {checkpoint:.3g} s, more than cluster.grace ({grace:g} s): "
        "after a SIGTERM the run may be killed before they are done, and goes on from the checkpoint before. Raise it, "
        "where the scheduler gives that time, or lower train.global_batch"
    )


def duration(seconds: float) -> str:
    for unit, length in (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"about {seconds / length:,.0f} {unit}"
    return f"about {seconds:.0f} seconds"

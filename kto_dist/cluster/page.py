"""A plan for people, and for programs: lines of a table, and plain values for JSON."""

from dataclasses import asdict
from typing import Any

from kto_dist.cluster.plan import Plan
from kto_dist.cluster.predict import Prediction

COLUMNS = (
    "",
    "ZeRO",
    "offload",
    "checkpointing",
    "tokens",
    "weights",
    "gradients",
    "optimizer",
    "head",
    "activations",
    "margin",
    "GiB a GPU",
    "s a step",
    "tokens/s",
    "mfu",
    "hours",
    "cost",
)


def lines(plan: Plan) -> list[tuple[str, ...]]:
    """A line a way, as `COLUMNS` name them; memory in GiB."""
    return [_line(plan, way, place == 0) for place, way in enumerate(plan.ways)]


def _line(plan: Plan, way: Prediction, first: bool) -> tuple[str, ...]:
    held, memory, set_up = way.memory.held, way.memory, way.way
    parts = (held.weights + held.gathered, held.gradients, held.optimizer, held.head, memory.activations, memory.margin)
    offload = [
        name for name, on in (("optimizer", set_up.offload_optimizer), ("weights", set_up.offload_parameters)) if on
    ]
    cost = plan.cost(way)
    speed = (
        f"{way.seconds.total:.3g}",
        f"{way.tokens_per_second:,.0f}",
        f"{way.mfu:.0%}",
        f"{plan.hours(way):,.1f}",
        "" if cost is None else f"{cost:,.0f}",
    )
    return (
        "too large" if way.trouble else "best" if first else "",
        str(set_up.zero_stage),
        " + ".join(offload) or "none",
        "yes" if set_up.checkpointing else "no",
        f"{set_up.tokens:,}",
        *(f"{part / 2**30:.1f}" for part in parts),
        f"{memory.device / 2**30:.1f}",
        *(speed if not way.trouble else ("",) * len(speed)),
    )


def sentences(plan: Plan) -> list[str]:
    """What the table is about, and what stands behind it."""
    cluster, work, shares = plan.cluster, plan.workload, plan.cluster.shares
    gpu, best = cluster.gpu, plan.best
    said = [
        "computed, not measured: "
        f"{plan.shape.parameters:,} parameters, {plan.shape.trained:,} trained ({plan.method}), "
        f"on {cluster.gpus:,} {gpu.name}, {cluster.local} a node",
        f"{work.rows:,} rows of {float((work.prompts + work.answers).mean()):,.0f} tokens on average, "
        f"{float(work.answers.mean()):,.0f} of them trained on; {work.steps:,} steps of {work.global_batch:,} rows",
    ]
    if work.cut > 0.01:
        said.append(
            f"{work.cut:.0%} of these rows are longer than data.max_length ({work.max_length:,}) and are cut to it"
        )
    if best is not None:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in asdict(best.seconds).items() if value > 0)
        said.append(f"seconds of a step of the best: {parts}; {best.microbatches} micro-batches a rank")
        host = best.memory.host
        if host:
            said.append(f"offloaded: {host / 2**30:,.0f} GiB of a node's memory")
    reference = plan.reference
    said.append(
        f"reference pass, once: {reference.pairs:,} pairs in {reference.seconds / 3600:.2f} hours, "
        f"{'sharded, ' if reference.sharded else ''}{reference.memory / 2**30:.1f} GiB a GPU; hours and cost include it"
    )
    said.append(
        f"assumed: {shares.matmul:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s in matmuls, "
        f"{shares.attention:.0%} in attention, "
        f"{shares.memory:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, {shares.links:.0%} of links of {gpu.link / 1e9:.0f} "
        f"GB/s in a node and {gpu.network / 1e9:.0f} GB/s a node, {shares.alpha_inside * 1e6:.0f} and "
        f"{shares.alpha_between * 1e6:.0f} microseconds a message, {shares.overlap:.0%} of ZeRO-3's collectives hidden,"
        f" {shares.host_seconds * 1e3:.1f} ms of the host for a layer's forward"
        + (f", all compute times {shares.compute:.3g} as measured" if shares.compute != 1 else "")
    )
    return said


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain values, the best way first."""
    return {
        "computed": True,
        "method": plan.method,
        "gpu": plan.cluster.gpu.name,
        "gpus": plan.cluster.gpus,
        "nodes": plan.cluster.nodes,
        "parameters": plan.shape.parameters,
        "trained": plan.shape.trained,
        "rows": plan.workload.rows,
        "steps": plan.workload.steps,
        "global_batch": plan.workload.global_batch,
        "assumptions": asdict(plan.cluster.shares),
        "reference": asdict(plan.reference),
        "ways": [
            {
                **asdict(way),
                "fits": not way.trouble,
                "bytes": way.memory.device,
                "step_seconds": way.seconds.total,
                "hours": plan.hours(way),
                "cost": plan.cost(way),
            }
            for way in plan.ways
        ],
    }

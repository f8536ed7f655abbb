"""A plan for people, and for programs: lines of a table, what is said above and below it, and plain values for JSON."""

from dataclasses import asdict
from typing import Any

from kto_dist.cluster.measure import Measured
from kto_dist.cluster.plan import Plan
from kto_dist.cluster.predict import Prediction
from kto_dist.model.adapters import Rehearsed
from kto_dist.model.loading import shortened

COLUMNS = (
    "fits",
    "ZeRO",
    "offload",
    "ckpt",
    "tokens",
    "weights",
    "grads",
    "optimizer",
    "activations",
    "at hand",
    "GiB/GPU",
    "s/step",
    "tokens/s",
    "mfu",
    "hours",
    "cost",
)

_SET_UP = COLUMNS[: COLUMNS.index("tokens")]
MEMORY = (*_SET_UP, *COLUMNS[COLUMNS.index("weights") : COLUMNS.index("GiB/GPU") + 1])
SPEED = (*_SET_UP, "tokens", *COLUMNS[COLUMNS.index("GiB/GPU") :])
"""The columns of two tables in place of one, where a terminal is narrow."""
WIDTH = 120
"""Of a terminal that is not."""


def lines(plan: Plan) -> list[tuple[str, ...]]:
    """A line a way, as `COLUMNS` name them; memory in GiB, whose parts add up but for the margin."""
    return [_line(plan, way, place == 0) for place, way in enumerate(plan.ways)]


def _line(plan: Plan, way: Prediction, first: bool) -> tuple[str, ...]:
    held, memory, set_up = way.memory.held, way.memory, way.way
    beside = memory.peak - held.rest
    # gradients that come when activations go take their place: what is kept counts by what it takes beyond them
    kept = min(memory.activations, beside)
    # the rest is the most of logits, a backward and an update
    parts = (held.weights + held.gathered, held.gradients, held.optimizer, kept, beside - kept)
    offload = {(0, 0): "none", (1, 0): "optimizer", (0, 1): "weights", (1, 1): "both"}
    cost = plan.cost(way)
    speed = (
        f"{way.seconds.total:.3g}",
        f"{way.tokens_per_second:,.0f}",
        f"{way.mfu:.0%}",
        _short(plan.hours(way)),
        "" if cost is None else _short(cost),
    )
    return (
        "no" if way.trouble else "best" if first else "yes",
        str(set_up.zero_stage),
        offload[set_up.offload_optimizer, set_up.offload_parameters],
        "yes" if set_up.checkpointing else "no",
        f"{set_up.tokens:,}",
        *(f"{part / 2**30:.1f}" for part in parts),
        f"{memory.device / 2**30:.1f}",
        *(speed if not way.trouble else ("",) * len(speed)),
    )


def of_measured(found: Measured) -> list[str]:
    """What a short run here has shown."""
    here, links = found.here, found.links
    said = [
        f"measured here, on {here.gpus} {here.gpu.name}: {found.seconds:.3g} s a step, {found.computed:.3g} computed; "
        f"compute times below are taken {found.factor:.3g} times"
    ]
    if links is not None:
        said.append(
            f"links within a node were measured between {here.gpus} ranks: {1e6 * links.latency:.0f} microseconds for "
            f"an all-reduce of 4 bytes, {links.bandwidth / 1e9:,.0f} GB/s of the maker's {here.gpu.link / 1e9:,.0f}; "
            "those between nodes are assumed"
        )
    return said


def above(plan: Plan, adapter: Rehearsed | None = None) -> list[str]:
    """What the table is about, and the best way."""
    cluster, work, gpu = plan.cluster, plan.workload, plan.cluster.gpu
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
    if adapter is not None and adapter.experts:
        said.append(
            f"the adapter leaves {len(adapter.experts)} parameters of experts ({shortened(adapter.experts)}) as they "
            "are, and in 16 bits: they are no linear layers; name them in adapter.targets to adapt them too"
        )
    if plan.idle:
        said.append(
            f"{plan.idle:,} of the {cluster.gpus:,} GPUs have no row in a step of {work.global_batch:,}: raise "
            "train.global_batch, or take fewer"
        )
    if (slow := _slow(plan)) is not None:
        said.append(slow)
    if (foreign := _foreign(plan)) is not None:
        said.append(foreign)
    if plan.best is not None:
        said.append(_best(plan, plan.best))
    return said


def _foreign(plan: Plan) -> str | None:
    """That what was measured was measured on something else."""
    if plan.measured is None or (here := plan.measured.here.gpu.name) == plan.cluster.gpu.name:
        return None
    what = "the factor and the links' share" if plan.measured.links is not None else "the factor"
    return (
        f"measured on {here}, planned for {plan.cluster.gpu.name}: that {what} of the one hold for the other is a "
        f"guess; --measure on a machine with {plan.cluster.gpu.name} says more"
    )


def _slow(plan: Plan) -> str | None:
    layers = plan.layers
    what = []
    if layers.attention == "eager":
        what.append("attention is eager and keeps a weight for every pair of positions of a row")
    if not layers.packed:
        what.append("rows are padded to the longest of a micro-batch")
    if not layers.fused:
        what.append("layers are plain ones, no fused kernels")
    if not what:
        return None
    return f"as this family runs with what is installed here: {'; '.join(what)}"


def _best(plan: Plan, best: Prediction) -> str:
    """In one line, for who reads no more."""
    way, cost = best.way, plan.cost(best)
    set_up = [f"ZeRO {way.zero_stage}", *_offloaded(best), *(["checkpointing"] if way.checkpointing else [])]
    return (
        f"best: {', '.join(set_up)}, {way.tokens:,} tokens a micro-batch: {best.memory.device / 2**30:,.0f} of "
        f"{plan.cluster.gpu.memory / 2**30:,.0f} GiB a GPU, {best.seconds.total:.3g} s a step, "
        f"{best.tokens_per_second:,.0f} tokens/s ({best.tokens_per_second / plan.cluster.gpus:,.0f} a GPU), "
        f"mfu {best.mfu:.0%}, {_short(plan.hours(best))} hours"
        + ("" if cost is None else f", {_short(cost)} at {plan.price:g} a GPU and hour")
    )


def _short(value: float) -> str:
    """With two figures at the least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _offloaded(way: Prediction) -> list[str]:
    both = ("optimizer", way.way.offload_optimizer), ("weights", way.way.offload_parameters)
    return [f"{name} in host memory" for name, on in both if on]


def below(plan: Plan) -> list[str]:
    """What stands behind the table."""
    cluster, shares = plan.cluster, plan.cluster.shares
    gpu, best, said = cluster.gpu, plan.best, []
    where = "" if plan.measured is None else f" on {plan.measured.here.gpus} {plan.measured.here.gpu.name}"
    if best is not None:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in asdict(best.seconds).items() if value > 0)
        said.append(f"seconds of a step of the best: {parts}; {best.microbatches} micro-batches a rank")
        host = best.memory.host
        if host:
            said.append(f"offloaded: {host / 2**30:,.0f} GiB of a node's memory")
    loading = max(plan.reference.loading, 0 if best is None else best.memory.loading)
    if loading:
        whole = plan.shape.copied == plan.shape.parameters
        what = "weights, since config.json does not call their files bf16" if whole else "experts"
        said.append(
            f"while it loads: {loading / 2**30:,.0f} GiB of a node's memory, {loading / cluster.local / 2**30:,.1f} "
            f"for each of its {cluster.local} processes, which copy the {what}; what is not copied lies in pages that "
            "they share"
        )
    reference = plan.reference
    said.append(
        f"reference pass, once: {reference.pairs:,} pairs in {_short(reference.seconds / 3600)} hours, "
        f"{'sharded, ' if reference.sharded else ''}{'in host memory, ' if reference.offload else ''}"
        f"{reference.memory / 2**30:.1f} GiB a GPU; hours and cost include it"
    )
    said.append(
        "at hand: for a moment beside what is held, the most of logits with the gradient of the head, of a layer's "
        "backward, and of an update; what a GPU takes has a margin beside these parts, of "
        f"{plan.ways[0].memory.margin / 2**30:.1f} GiB, for what the allocator loses and what CUDA and NCCL take"
    )
    said.append(
        f"assumed: {gpu.matmul:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s in matmuls, "
        + (f"{gpu.matmul * shares.experts:.0%} in those of experts, " if plan.shape.sent else "")
        + f"{gpu.attention:.0%} in attention, "
        f"{shares.memory:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, {shares.links_inside:.0%} of links of "
        f"{gpu.link / 1e9:.0f} GB/s in a node{f' (as measured{where})' if cluster.links_measured else ''} and "
        f"{shares.links:.0%} of {cluster.network / 1e9:g} GB/s a node, {shares.alpha_inside * 1e6:.0f} and "
        f"{shares.alpha_between * 1e6:.0f} microseconds a message, {shares.overlap:.0%} of ZeRO-3's collectives hidden,"
        f" {shares.host_seconds * 1e3:.1f} ms of the host for a layer's forward and "
        f"{shares.hook_seconds * 1e6:.0f} microseconds for a module of ZeRO 3"
        + (f", all compute times {shares.compute:.3g} times, as measured{where}" if shares.compute != 1 else "")
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
        "gpus_per_node": plan.cluster.per_node,
        "gpus_without_a_row": plan.idle,
        "host_memory": plan.cluster.host_memory,
        "price": plan.price,
        "layers": asdict(plan.layers),
        "prompt_tokens": float(plan.workload.prompts.mean()),
        "completion_tokens": float(plan.workload.answers.mean()),
        "rows_cut": plan.workload.cut,
        "max_length": plan.workload.max_length,
        "kl_pairs_per_step": plan.workload.kl_pairs,
        "parameters": plan.shape.parameters,
        "trained": plan.shape.trained,
        "rows": plan.workload.rows,
        "steps": plan.workload.steps,
        "global_batch": plan.workload.global_batch,
        "measured": None
        if (found := plan.measured) is None
        else {
            "gpu": found.here.gpu.name,
            "gpus": found.here.gpus,
            "seconds": found.seconds,
            "computed": found.computed,
            "factor": found.factor,
            "links": None if found.links is None else asdict(found.links),
            "warning": _foreign(plan),
        },
        "assumptions": {"gpu": asdict(plan.cluster.gpu), "shares": asdict(plan.cluster.shares)},
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

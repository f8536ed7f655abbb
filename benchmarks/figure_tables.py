"""The tables of figures: each function takes results, as `benchmarks/results` holds them, and returns Markdown."""

from collections.abc import Callable
from pathlib import Path

import evidence_tables
import fault_kinds
import random_model
import records
from adapter_rate_table import adapter_rate
from cluster_table import cluster_faults
from compare_table import compare
from long_log_table import long_log
from saving_table import saving
from scaling_table import curves, memory, times
from table_parts import Content, about, counted, table
from trainers import NAMES, title_of
from zoo_table import zoo, zoo_short

from kto_dist.evaluation.intervals import wilson

GIB = 2**30
ADAPTERS = {"lora": "LoRA", "dora": "DoRA"}


def span(values: list[float], digits: int = 2) -> str:
    return f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""


def mark(line: Content, losses: dict[tuple[str, ...], float], benchmark: str) -> str:
    loss = losses.get(records.key_of(line, benchmark))
    return "" if loss is None else f" ▼ {loss:.0%}"


def with_legend(text: str, content: Content, losses: dict[tuple[str, ...], float]) -> str:
    if not losses:
        return text
    return f"{text}\n\n▼: so much slower than on {content['previous']['date']}."


def job_of(settings: Content) -> str:
    """The model and the rows of a measurement of training."""
    shape, words = random_model.SHAPES.get(settings["model"]), random_model.LENGTHS.get(settings["log"])
    model = shape.title if shape else "the demo's model"
    rows = (
        f"random rows, prompts around {words.prompt} and completions around {words.completion} tokens"
        if words
        else "the demo's rows"
    )
    size = f"{settings['training_tokens'] / settings['training_rows']:.0f} tokens on average"
    kind = settings.get("adapter", "none")
    adapter = "" if kind == "none" else f", {ADAPTERS[kind]} of rank {settings['rank']} on all layers but the head"
    return f"{model}, {settings['dtype']}{adapter}; {settings['global_batch']} rows a step, {size} ({rows})"


def throughput(*files: Content) -> str:
    blocks = []
    for content in files:
        settings, losses = content["settings"], records.losses(content)
        results = {(line["phase"], line["implementation"]): line for line in content["results"]}
        own = results["training", "kto_dist"]["rows_per_second"]
        rows = []
        for name in NAMES:
            line, scored = results.get(("training", name)), results.get(("reference", name))
            if line is None or scored is None:
                continue
            ratio = "" if name == "kto_dist" else f"{own / line['rows_per_second']:.2f}x"
            power = f"{line['mfu']:.2f}" if "mfu" in line else ""
            title = title_of(name, settings.get("adapter", "none"))
            rows.append(
                [
                    f"**{title}**" if name == "kto_dist" else title,
                    f"{line['rows_per_second']:.2f}{span(line['runs'])}{mark(line, losses, 'throughput')}",
                    f"{line['tokens_per_second']:,.0f}",
                    f"{line['seconds_per_step']:.2f}",
                    power,
                    f"{line['peak_bytes'] / GIB:.1f}",
                    f"{line['seconds_to_first_step']:.0f}" if "seconds_to_first_step" in line else "",
                    f"{scored['rows_per_second']:.1f}{mark(scored, losses, 'throughput')}",
                    ratio,
                ]
            )
        head = [
            "",
            "rows/s",
            "tokens/s",
            "s a step",
            "mfu",
            "peak GiB",
            "s to step 1",
            "reference, pairs/s",
            "kto_dist is",
        ]
        keep = [column for column in range(len(head)) if not column or any(row[column] for row in rows)]
        text = table([head[column] for column in keep], [[row[column] for column in keep] for row in rows])
        runs = f"{counted(settings['repeats'], 'run')} of {counted(settings['steps'], 'step')}"
        blocks.append(with_legend(f"{about(content, job_of(settings), runs)}\n\n{text}", content, losses))
    return "\n\n".join(blocks)


def lengths(content: Content) -> str:
    """Training on rows of several lengths; `draw_lengths` has the picture."""
    settings, losses = content["settings"], records.losses(content)
    kinds: dict[str, dict[str, Content]] = {}
    for line in content["results"]:
        if line["phase"] == "training":
            kinds.setdefault(line["rows"], {})[line["implementation"]] = line
    names = [name for name in NAMES if any(name in found for found in kinds.values())]
    columns = ["rows", "tokens a row"]
    for name in names:
        columns += [f"{NAMES[name].title}: rows/s", "peak GiB"]
    rows = []
    for kind, found in kinds.items():
        tokens = next(iter(found.values()))["tokens_per_row"]
        cells = [kind.replace("-", " "), f"{tokens:.0f}"]
        for name in names:
            line = found.get(name)
            speed = f"{line['rows_per_second']:.2f}{mark(line, losses, 'lengths')}" if line else ""
            cells += [speed, f"{line['peak_bytes'] / GIB:.1f}" if line else ""]
        rows.append(cells)
    model = random_model.SHAPES[settings["model"]].title
    job = f"{model}, {settings['dtype']}; {settings['global_batch']} rows a step"
    return with_legend(f"{about(content, job)}\n\n{table(columns, rows)}", content, losses)


def draw_lengths(content: Content, file: Path) -> None:
    """Rows a second and memory over the tokens of a row, side by side."""
    from matplotlib.figure import Figure

    from kto_dist.record.theme import LIGHT, finish

    figure = Figure(figsize=(8.4, 3.4), dpi=130, layout="constrained", facecolor=LIGHT.paper)
    colours = dict(zip(NAMES, [LIGHT.colours[role] for role in ("desirable", "all", "plain")] * 9, strict=False))
    colours |= {"trl": LIGHT.colours["undesirable"], "trl-liger": LIGHT.colours["undesirable"]}
    of_training = [line for line in content["results"] if line["phase"] == "training"]
    panels = (("rows_per_second", 1, "rows a second"), ("peak_bytes", GIB, "peak memory, GiB"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in dict.fromkeys(line["implementation"] for line in of_training):
            points = sorted(
                (line["tokens_per_row"], line[key] / unit) for line in of_training if line["implementation"] == name
            )
            axes.plot(*zip(*points, strict=True), marker="o", color=colours[name], label=NAMES[name].title)
        axes.set_ylim(bottom=0)
        finish(axes, LIGHT, label, xlabel="tokens a row")
    figure.savefig(file)


def reference(content: Content) -> str:
    titles = {
        "kto_dist_prefix": "kto_dist, prompts shared by their completions",
        "kto_dist": "kto_dist, every pair alone",
        "bare": "bare loop",
        "trl": "TRL's precompute",
    }
    losses = records.losses(content)
    found = {line["implementation"]: line for line in content["results"]}
    bare = found["bare"]["runs"]
    rows = []
    for name, title in titles.items():
        if name not in found:
            continue
        line = found[name]
        ratios = [own / other for own, other in zip(line["runs"], bare, strict=True)]
        of_bare = "" if name == "bare" else f"{line['of_bare']:.2f}x{span(ratios)}"
        speed = f"{line['rows_per_second']:.1f}{span(line['runs'], 1)}{mark(line, losses, 'reference')}"
        rows.append([title, speed, of_bare, f"{line['peak_bytes'] / GIB:.2f}"])
    settings = content["settings"]
    job = f"{settings['pairs']} pairs of {settings['tokens'] / settings['pairs']:.0f} tokens, {settings['dtype']}"
    text = table(["", "pairs/s (runs)", "of the bare loop (turns)", "peak GiB"], rows)
    turns = f"{settings['repeats']} turns"
    return with_legend(f"{about(content, job, turns)}\n\n{text}", content, losses)


def store(reference: Content, content: Content) -> str:
    """Pairs of a plan from `reference.py`, the rest from `store.py`."""
    plan = reference["plan"]
    rows = [
        [f"find the pairs of {plan['rows']:,} rows", f"{plan['find_seconds']:.1f} s"],
        [f"hash the keys of {plan['pairs']:,} pairs, on one rank", f"{plan['hash_seconds']:.1f} s"],
    ]
    for held in (content["few"], content["all"]):
        seconds, gib = f"{held['seconds']:.1f} s", f"{held['peak_bytes'] / GIB:.2f} GiB"
        rows.append([f"look {held['pairs']:,} pairs up in a store of {content['pairs']:,}", f"{seconds}, {gib}"])
    rows.append(["a pair on disk", f"{content['bytes_per_pair']:.0f} bytes"])
    return f"{about(content)}\n\n{table(['', ''], rows)}"


def sweep(content: Content) -> str:
    losses = records.losses(content)
    rows = [
        [
            f"{line['beta']:g}{mark(line, losses, 'sweep')}",
            f"{line['scored']}",
            f"{line['from_store']}",
            f"{line['reference_seconds']:.1f}",
        ]
        for line in content["results"]
    ]
    total = sum(line["seconds"] for line in content["results"])
    settings = content["settings"]
    job = f"{settings['steps']} steps of {settings['global_batch']} rows a run"
    end = f"All of it took {total:.0f} s, and would have taken {content['saved_seconds']:.0f} s more without the store."
    text = table(["`objective.beta`", "pairs scored", "from the store", "s of scoring"], rows)
    return with_legend(f"{about(content, job)}\n\n{text}\n\n{end}", content, losses)


def feedback(content: Content) -> str:
    losses = records.losses(content)
    rows = [
        [
            f"{line['rows']:,}",
            f"{line['log_bytes'] / GIB:.2f} GiB",
            f"{line['seconds']:.0f}{mark(line, losses, 'feedback')}",
            f"{line['rows'] / line['seconds']:,.0f}",
            f"{line['peak_bytes'] / GIB:.2f} GiB",
        ]
        for line in content["results"]
    ]
    job = f"{content['threads']} threads, {content['memory_mebibytes'] / 1024:g} GiB for the database"
    text = table(["rows of the log", "its size", "seconds", "rows/s", "peak memory of the process"], rows)
    return with_legend(f"{about(content, job)}\n\n{text}", content, losses)


HEADS = {
    "floor": "floor: bare matmuls",
    "kto_kernels": "**`kto_head`**",
    "kto_bf16_logits": "**`kto_head`**, bf16 logits",
    "torch_compile": "`torch.compile` of plain PyTorch",
    "torch": "plain PyTorch",
    "liger": "Liger",
    "trl": "TRL",
    "cce": "cut-cross-entropy",
}


def head(*files: Content) -> str:
    """Forward and backward, a group of columns a file."""
    rows: dict[str, list[str]] = {}
    columns, captions = [""], []
    for content in files:
        size, losses = content["sizes"], records.losses(content)
        columns += [f"{content['dtype']}, H={size['hidden']}: ms", "x floor", "peak MB"]
        captions.append(
            about(content, f"N={size['rows']}, H={size['hidden']}, V={size['vocab']}, {content['dtype']}")
            + (f" ▼: so much slower than on {content['previous']['date']}." if losses else "")
        )
        found = {line["implementation"]: line for line in content["results"] if line["pass"] == "forward_backward"}
        for name in [*HEADS, *(name for name in found if name not in HEADS)]:
            line = found.get(name)
            cells = ["", "", ""]
            if line:
                speed = f"{line['seconds'] * 1e3:,.1f}{mark(line, losses, 'head')}"
                cells = [speed, f"{line['times_the_floor']:.2f}", f"{line['peak_bytes'] / 1e6:,.0f}"]
            rows.setdefault(name, []).extend(cells)
    shown = [[HEADS.get(name, name), *cells] for name, cells in rows.items() if any(cells)]
    return "\n\n".join([table(columns, shown), *captions])


def profile(content: Content) -> str:
    kernels = content["kernels"]
    rows = [
        [line["name"], f"{line['seconds'] * 1e3:.1f}", f"{line['share']:.0%}", f"{line['calls']:,.0f}"]
        for line in kernels["classes"]
    ]
    settings = content["settings"]
    model = random_model.SHAPES[settings["random"]].title
    job = f"{model}; {settings['global_batch']} rows of together {content['tokens_per_step']:,.0f} tokens a step"
    text = table(["kernels", "ms a step", "share", "launches"], rows)
    losses = records.losses(content)
    end = (
        f"A step took {content['seconds_per_step']:.3f} s{mark(content, losses, 'profile')} without the profiler and "
        f"{content['traced_seconds_per_step']:.3f} s with it; the GPU was busy for {kernels['busy']:.1%} of the latter."
    )
    return with_legend(f"{about(content, job)}\n\n{text}\n\n{end}", content, losses)


DEMO = {
    "answers that the wish approves": ("answers", "approved", "{:.0%}"),
    "mean words of an answer": ("answers", "words", "{:.0f}"),
    "finished": ("answers", "finished", "{:.0%}"),
    "about the question": ("answers", "on_topic", "{:.0%}"),
    "going in circles": ("answers", "repeating", "{:.0%}"),
    "accuracy on held-out thumbs up": ("heldout", "accuracy/desirable", "{:.2f}"),
    "accuracy on held-out thumbs down": ("heldout", "accuracy/undesirable", "{:.2f}"),
    "AUC of the reward on held-out thumbs": ("heldout", "auc", "{:.2f}"),
    "mean reward, thumbs up": ("heldout", "rewards/desirable", "{:+.2f}"),
    "mean reward, thumbs down": ("heldout", "rewards/undesirable", "{:+.2f}"),
    "KL to the reference (`kl_raw`, nats)": ("heldout", "kl_raw", "{:.1f}"),
}


def demo(content: Content) -> str:
    seconds, losses = content["seconds"], records.losses(content)
    slower = mark(content, losses, "demo")
    end = f"{seconds['training']:.0f} s of training, {seconds['all']:.0f} s for everything{slower}. One run."
    job = f"{content['settings']['steps']} steps, {content['settings']['questions']} questions"
    text = table(["held-out", "before", "after"], _before_and_after(content, *DEMO))
    return with_legend(f"{about(content, job)}\n\n{text}\n\n{end}", content, losses)


def demo_short(content: Content) -> str:
    """For who meets it first: whether the wish was learned, and how surely so few questions tell."""
    approved, *rows = _before_and_after(content, *DEMO_SHORT)
    share = content["results"]["answers"]["after"]["approved"]
    low, high = wilson(share, content["settings"]["questions"])
    approved[-1] += f" ({low:.0%} to {high:.0%})"
    return table(["held-out", "before", "after"], [approved, *rows])


def demo_profile(content: Content) -> str:
    """Where a step's time goes, on rank 0."""
    rows = [
        [line["part"], f"{line['milliseconds'] / STEPS_PROFILED / 1e3:.2f}", f"{line['share']:.0%}"]
        for line in content["profile"]
    ]
    return f"{about(content, 'the demo')}\n\n{table(['part', 's a step', 'share'], rows)}"


STEPS_PROFILED = 3
"""By `train.profile`."""

DEMO_SHORT = ("answers that the wish approves", "mean words of an answer", "AUC of the reward on held-out thumbs")


def _before_and_after(content: Content, *titles: str) -> list[list[str]]:
    rows = []
    for title in titles:
        part, key, form = DEMO[title]
        before, after = (content["results"][part][when].get(key) for when in ("before", "after"))
        if before is not None and after is not None:
            # -0.0 is 0
            rows.append([title, form.format(before + 0.0), form.format(after + 0.0)])
    return rows


def summary(*files: Content) -> str:
    """A line a result, for who does not want the tables."""
    lines = []
    for content in files:
        if content["benchmark"] == "feedback":
            most = max(content["results"], key=lambda line: line["rows"])
            size, peak = f"{most['rows'] / 1e6:g} million rows of a raw log", f"{most['peak_bytes'] / GIB:.1f} GiB"
            lines.append(f"- {content['device']}: {size} are mined in {most['seconds']:.0f} s and {peak} of memory.")
            continue
        rates = {
            (line["phase"], line["implementation"]): line["rows_per_second"]
            for line in content["results"]
            if line["implementation"] in NAMES
        }
        settings = content["settings"]
        shape = random_model.SHAPES.get(settings["model"])
        model = shape.title if shape else "the demo's model"
        against = []
        for name, title in (
            ("trl", "of TRL's"),
            ("trl-liger", "of TRL's with bf16 weights, Liger's layers and its best batch"),
        ):
            if ("training", name) in rates:
                factors = [rates[phase, "kto_dist"] / rates[phase, name] for phase in ("training", "reference")]
                against.append(f"{factors[0]:.1f}x {title} ({factors[1]:.1f}x in the reference pass)")
        lines.append(
            f"- {content['device']}, {model}: "
            f"{rates['training', 'kto_dist']:.3g} rows a second in training; {', '.join(against)}."
        )
    return "\n".join(lines)


def faults(content: Content) -> str:
    """What became of runs that were disturbed."""
    names = ("injected", "survived", "exact", "told", "lost", "steps_lost", "most_steps_lost")
    rows = [[line["fault"], *(str(line[name]) for name in names)] for line in content["results"]]
    whole = {name: sum(line[name] for line in content["results"]) for name in names[:-1]}
    most = max(line["most_steps_lost"] for line in content["results"])
    rows.append(["**all**", *(str(value) for value in whole.values()), str(most)])
    head = ["fault", "injected", "survived", "of these to the bit", "refused with a sentence", "lost"]
    job = f"{content['settings']['steps']} steps, a checkpoint every {content['settings']['checkpoint_every']}"
    shown = table([*head, "steps done twice", "most in one run"], rows)
    return f"{about(content, job)}\n\n{shown}\n\n{_faults_beside(content)}"


def _faults_beside(content: Content) -> str:
    """Which runs were refused, and what was not tried."""
    told = [f"{line['fault']} ({line['told']})" for line in content["results"] if line["told"]]
    there = {line["fault"] for line in content["results"]}
    left = "".join(f"; {kind.name}" for kind in fault_kinds.KINDS if kind.name not in there)
    return (
        f"- Refused with a sentence: {', '.join(told) or 'no run'}.\n"
        "- Not tried here: several hosts; GPUs; a disk that turns read-only while a run has a file open, which the "
        f"system does not allow{left}."
    )


def faults_short(content: Content) -> str:
    lines = content["results"]
    count = {name: sum(line[name] for line in lines) for name in ("injected", "survived", "exact", "told", "lost")}
    most = max(line["most_steps_lost"] for line in lines)
    return (
        f"{count['injected']} faults of {len(lines)} kinds were injected into runs with a checkpoint every "
        f"{counted(content['settings']['checkpoint_every'], 'step')}: {count['survived']} ended with the weights of an "
        f"undisturbed run ({count['exact']} to the bit). Refused with a sentence: {count['told']}; lost: "
        f"{count['lost']}. At most {counted(most, 'step')} of one run were done twice."
    )


KINDS: dict[str, Callable[..., str]] = {
    "faults": faults,
    "faults-short": faults_short,
    "summary": summary,
    "throughput": throughput,
    "lengths": lengths,
    "reference": reference,
    "store": store,
    "sweep": sweep,
    "feedback": feedback,
    "head": head,
    "profile": profile,
    "demo": demo,
    "demo-short": demo_short,
    "demo-profile": demo_profile,
    "long-log": long_log,
    "scaling-memory": memory,
    "scaling-times": times,
    "scaling-curves": curves,
    "zoo": zoo,
    "zoo-short": zoo_short,
    "compare": compare,
    "adapter-rate": adapter_rate,
    "cluster-faults": cluster_faults,
    "saving": saving,
    **evidence_tables.KINDS,
}

"""Where a training step's time goes: the share in which the GPU works, its time by class of kernel, and its gaps.

    python benchmarks/step_profile.py --random 1.2b --json FILE --trace FILE.json.gz

1. run       kto_dist trains on a random model and rows (or on a given model and log), as in `throughput.py`
2. trace     torch's profiler runs around whole steps, after a few that warm up; the profiler itself slows the host, so
             `seconds_per_step` is measured in the same run without it
3. sum       kernels by class, what runs on the host in the gaps between kernels, operations by their kernels' time

On a CPU there are no kernels, and operations are listed by their own time.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import random_model
import records
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from trainers import NAMES, Job, run_kto_dist
from workload import write_rows

# The first pattern that a kernel's name matches is its class.
CLASSES = {
    "communication": r"nccl",
    "attention": r"flash|fmha|attention|sdpa|efficient",
    "head's own kernels": r"^_(row|sequence|scale|scale_rows)_kernel",
    "optimizer": r"adam|multi_tensor_apply",
    "layer kernels": r"rms_norm|rope|swiglu|geglu|liger",
    "matmul": r"gemm|nvjet|xmma|cublas|gemv|splitk|cutlass",
    "copies and casts": r"memcpy|memset|copy|catarray|fillfunctor|fill_",
    "indexing": r"index|gather|scatter|embedding",
    "reductions": r"reduce|softmax|norm",
    "elementwise": r"elementwise|vectorized|unrolled|triton_",
}


def class_of(kernel: str) -> str:
    lowered = kernel.lower()
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, lowered)), "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something that ran, in seconds of the profiler's clock."""

    name: str
    begin: float
    end: float


class Tracing:
    """A hook for after each step: starts the profiler after `wait` steps, and stops it after `steps` more."""

    def __init__(self, wait: int, steps: int):
        self.wait, self.steps = wait, steps
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self.profile = profile(activities=activities)
        self._step: Any = None

    def __call__(self, result: Any) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        done = result.step - self.wait
        if done == -1:
            self.profile.start()  # its own start-up falls into a step that is not looked at
        if 0 <= done < self.steps:
            self._step = record_function(f"training step {result.step}")
            self._step.__enter__()
        if done == self.steps:
            machine.now()
            self.profile.stop()

    def spans(self) -> tuple[list[Span], list[Span], list[Span]]:
        """Steps, kernels and what ran on the host, each by its begin; kernels and host within the steps."""
        steps, kernels, host = [], [], []
        for event in self.profile.profiler.kineto_results.events():
            begin = event.start_ns() / 1e9
            span = Span(name=event.name(), begin=begin, end=begin + event.duration_ns() / 1e9)
            if event.device_type() == DeviceType.CPU:
                (steps if span.name.startswith("training step") else host).append(span)
            else:
                kernels.append(span)
        # the profiler repeats ranges of the host on the device, under the same name
        ranges = {span.name for span in steps + host}
        kernels = [span for span in kernels if span.name not in ranges]
        begin, end = min(step.begin for step in steps), max(step.end for step in steps)

        def within(spans: list[Span]) -> list[Span]:
            return sorted((s for s in spans if begin <= s.begin < end), key=lambda span: span.begin)

        return sorted(steps, key=lambda span: span.begin), within(kernels), within(host)


def gaps(kernels: list[Span], begin: float, end: float) -> list[Span]:
    """When no kernel ran."""
    found, last = [], begin
    for kernel in kernels:
        if kernel.begin > last:
            found.append(Span(name="", begin=last, end=kernel.begin))
        last = max(last, kernel.end)
    if end > last:
        found.append(Span(name="", begin=last, end=end))
    return found


def of_kernels(steps: list[Span], kernels: list[Span], host: list[Span]) -> dict[str, Any]:
    """Seconds are those of one step."""
    begin, end, count = steps[0].begin, steps[-1].end, len(steps)
    idle = gaps(kernels, begin, end)
    by_class: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        took = kernel.end - kernel.begin
        by_class[class_of(kernel.name)].append(took)
        by_name[kernel.name].append(took)
    total = sum(map(sum, by_class.values()))

    def lines(sums: dict[str, list[float]], most: int) -> list[dict[str, Any]]:
        ordered = sorted(sums.items(), key=lambda item: -sum(item[1]))[:most]
        return [
            {
                "name": name[:160],
                "seconds": sum(took) / count,
                "share": sum(took) / total,
                "calls": len(took) / count,
            }
            for name, took in ordered
        ]

    longest = sorted(idle, key=lambda span: span.begin - span.end)[:12]
    return {
        "busy": 1 - sum(span.end - span.begin for span in idle) / (end - begin),
        "kernels_per_step": len(kernels) / count,
        "kernel_seconds": total / count,
        "classes": lines(by_class, 20),
        "kernels": [line | {"class": class_of(line["name"])} for line in lines(by_name, 40)],
        "gaps": {
            "seconds": sum(span.end - span.begin for span in idle) / count,
            "above_10_us": sum(span.end - span.begin > 1e-5 for span in idle) / count,
            "above_100_us": sum(span.end - span.begin > 1e-4 for span in idle) / count,
            "longest": [
                {"seconds": span.end - span.begin, "at": span.begin - begin, "host": _running(span, host)}
                for span in longest
            ],
        },
    }


def _running(gap: Span, host: list[Span]) -> list[str]:
    """What the host did in the middle of a gap, the innermost first."""
    middle = (gap.begin + gap.end) / 2
    inside = [span for span in host if span.begin <= middle < span.end]
    return [span.name[:80] for span in sorted(inside, key=lambda span: span.end - span.begin)[:4]]


def of_host(host: list[Span], count: int, most: int = 25) -> list[dict[str, Any]]:
    """Calls of the host by their whole time, nested ones included."""
    sums: dict[str, list[float]] = defaultdict(list)
    for span in host:
        sums[span.name].append(span.end - span.begin)
    ordered = sorted(sums.items(), key=lambda item: -sum(item[1]))[:most]
    return [
        {"name": name[:120], "seconds": sum(took) / count, "calls": len(took) / count, "each": statistics.median(took)}
        for name, took in ordered
    ]


def of_operations(traced: profile, count: int, most: int = 30) -> list[dict[str, Any]]:
    """Operations by the time of their own kernels; on a CPU by their own time."""
    cuda = torch.cuda.is_available()
    lines = []
    for item in traced.key_averages():
        own = (item.self_device_time_total if cuda else item.self_cpu_time_total) / 1e6
        lines.append({"name": item.key[:120], "seconds": own / count, "calls": item.count / count})
    return sorted(lines, key=lambda line: -line["seconds"])[:most]


def show(content: dict[str, Any]) -> None:
    print(f"{content['device']}: {content['seconds_per_step']:.4f} s a step without the profiler, {content['traced']}")
    kernels = content.get("kernels")
    if kernels:
        print(
            f"with it {content['traced_seconds_per_step']:.4f} s, GPU busy {kernels['busy']:.1%}, "
            f"{kernels['kernels_per_step']:.0f} kernels a step of {kernels['kernel_seconds']:.4f} s, "
            f"{kernels['gaps']['above_100_us']:.0f} gaps above 100 us"
        )
        for line in kernels["classes"]:
            print(
                f"  {line['name']:20} {line['seconds'] * 1e3:9.2f} ms {line['share']:6.1%} {line['calls']:8.0f} calls"
            )
        for line in kernels["kernels"][:15]:
            print(f"  {line['seconds'] * 1e3:9.2f} ms {line['calls']:8.0f}  {line['class']:16} {line['name'][:80]}")
        for gap in kernels["gaps"]["longest"][:6]:
            print(f"  gap of {gap['seconds'] * 1e3:.2f} ms at {gap['at'] * 1e3:.1f}: {' < '.join(gap['host'])[:140]}")
    for line in content["operations"][:12]:
        print(f"  {line['seconds'] * 1e3:9.2f} ms {line['calls']:8.0f}  {line['name'][:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=random_model.SHAPES, default="1.2b", help="shape of the random model")
    parser.add_argument("--random-folder", type=Path, help="keep it here, or find it here")
    parser.add_argument("--lengths", choices=random_model.LENGTHS, default="mixed", help="of the rows")
    parser.add_argument("--implementation", choices=[n for n in NAMES if n.startswith("kto")], default="kto_dist")
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tokens-per-microbatch", type=int, default=16384)
    parser.add_argument("--untraced", type=int, default=3, help="timed steps without the profiler, after two others")
    parser.add_argument("--steps", type=int, default=2, help="traced ones")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace here (.json.gz)")
    arguments = parser.parse_args()
    began = time.time()
    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        fast = random_model.fast_folder(2 * random_model.weight_bytes(arguments.random))
        made = arguments.random_folder or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=fast)))
        random_model.make_model(arguments.random, made)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kto-profile-")))
        from throughput import job_dtype

        job = Job(
            name=arguments.implementation,
            model=str(made),
            folder=str(folder),
            warmup=2,
            # one more takes the profiler's own start
            steps=arguments.untraced + 1 + arguments.steps,
            global_batch=arguments.global_batch,
            max_length=arguments.max_length,
            tokens_per_microbatch=arguments.tokens_per_microbatch,
            dtype=job_dtype(),
            threads=arguments.threads,
            trl_batch=0,
            trl_reference_batch=0,
        )
        rows = job.all_steps * job.global_batch
        log = folder / "log.jsonl"
        random_model.write_log(arguments.random, arguments.lengths, rows, job.max_length, log)
        work = write_rows(str(log), job, folder)
        tracing = Tracing(wait=2 + arguments.untraced + 1, steps=arguments.steps)
        found = run_kto_dist(job, folder / "run", began, watch=tracing)
        steps, kernels, host = tracing.spans()
        content = records.frame("profile", vars(arguments) | {"json": None, "trace": None, "random_folder": None})
        content |= {
            "about": found["about"],
            "tokens_per_step": work.training_tokens / job.steps,
            "traced": f"{len(steps)} steps of {work.training_tokens / job.steps:,.0f} tokens traced",
            "seconds_per_step": statistics.median(found["training"]["seconds"][: arguments.untraced]),
            "traced_seconds_per_step": (steps[-1].end - steps[0].begin) / len(steps),
            "peak_bytes": found["training"]["peak_bytes"],
            "kernels": of_kernels(steps, kernels, host) if kernels else None,
            "operations": of_operations(tracing.profile, len(steps)),
            "host": of_host(host, len(steps)),
        }
        records.write_json(arguments.json, content)
        show(content)
        if arguments.trace:
            arguments.trace.parent.mkdir(parents=True, exist_ok=True)
            tracing.profile.export_chrome_trace(str(arguments.trace))
            print(f"{arguments.trace}: {arguments.trace.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

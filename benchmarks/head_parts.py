"""Where the fused head's time goes: its parts alone, choices beside each other, and a profile of one iteration.

    python benchmarks/head_parts.py [--width H ...] [--json FILE] [--tiny]

For each hidden size: the bare matmuls by rows of a chunk, the row pass by block, warps and stages, the last pass over
dW both ways, and the whole head with fp32 and bf16 logits by bytes of a chunk and by rows of logits at a time, each
over the floor of the same rounds. Medians. The file is written after every part, so that a run cut short keeps what it
has. On a GPU one to two minutes; `--tiny` runs everything once at sizes that mean nothing, on the CPU too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
if not torch.cuda.is_available():
    # before the first import of triton: its kernels then run in Python
    os.environ["TRITON_INTERPRET"] = "1"

from head import BETA, Floor, Inputs, Meter, device_name, draw, versions
from kto_kernels import kto_head, logits
from kto_kernels.matmul import add_product, logits_of, scaled
from kto_kernels.rows import Rows, pick_backend
from kto_kernels.transform import IDENTITY

ROWS, VOCAB, SEQUENCES = 16384, 128256, 32
TINY = (64, 500, 4)
GIB = 2**30


class Report:
    """What was measured so far: printed as it comes, and on disk after each part."""

    def __init__(self, path: Path | None, device: torch.device):
        self.path, self.started = path, time.perf_counter()
        self.content: dict = {"device": device_name(device), "versions": versions(), "parts": []}

    def add(self, part: str, **found: object) -> None:
        self.content["parts"].append({"part": part, **found})
        self.content["seconds"] = time.perf_counter() - self.started
        shown = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        print(f"[{self.content['seconds']:5.1f} s] {part}: {shown}", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


class Bench:
    def __init__(self, device: torch.device, repeats: int, report: Report):
        self.device, self.repeats, self.report, self.meter = device, repeats, report, Meter(device)

    def ms(self, work: Callable[[], object]) -> float:
        return self.together({"it": work})["it"]

    def together(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median milliseconds of each, in rounds that take turns; the first round warms up."""
        found: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(self.repeats + 1):
            for name, work in works.items():
                took = self.meter.seconds(work)
                if turn:
                    found[name].append(1e3 * took)
        return {name: statistics.median(values) for name, values in found.items()}

    def tried(self, part: str, work: Callable[[], dict]) -> None:
        """One part's figures; one that fails is said, and the next goes on."""
        try:
            self.report.add(part, **work())
        except Exception as error:
            self.report.add(part, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def matmuls(bench: Bench, given: Inputs, rows: int, wide: torch.dtype) -> dict[str, float]:
    """ms of the products that one chunk of so many rows takes, and of all rows' in such chunks."""
    hidden, weight = given.hidden.detach()[:rows], given.weight.detach()
    gradient = torch.randn(rows, len(weight), device=hidden.device, dtype=torch.float32).to(hidden.dtype)
    narrow, out = torch.empty_like(gradient), torch.empty_like(hidden)
    part = min(rows, 1024)
    wide_part = hidden.new_empty(part, len(weight), dtype=wide)
    total = add_product(None, gradient.T, hidden)

    def in_parts() -> None:
        for start in range(0, rows - part + 1, part):
            logits_of(hidden[start : start + part], weight, wide_part)

    works = {
        "logits_narrow": lambda: logits_of(hidden, weight, narrow),
        "logits_wide_in_parts": in_parts,
        "grad_hidden": lambda: torch.mm(gradient, weight, out=out),
        "grad_weight_narrow": lambda: torch.mm(gradient.T, hidden),
        "grad_weight_add_wide": lambda: add_product(total, gradient.T, hidden),
    }
    found = bench.together(works)
    return {"rows": rows, **found}


def row_passes(bench: Bench, given: Inputs, rows: int, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> dict:
    """ms of the row kernel over `rows` rows, with gradient, by (block, warps, stages); and without gradient."""
    from kto_kernels.triton_rows import row_pass

    vocab, narrow = len(given.weight), given.hidden.dtype
    z = (2 * torch.randn(rows, vocab, device=given.hidden.device)).to(dtype)
    gradient = torch.empty_like(z, dtype=narrow)
    into = Rows.empty(rows, z, scale=True, entropy=False)
    target = given.target[:rows]
    works = {}
    for block, warps, stages in shapes:
        works[f"{block}/{warps}/{stages}"] = lambda block=block, warps=warps, stages=stages: row_pass(
            z, target, None, IDENTITY, gradient, into.logps, into.scale, None, block=block, warps=warps, stages=stages
        )
    works["no gradient"] = lambda: row_pass(z, target, None, IDENTITY, None, into.logps, None, None)
    works["copy of as many bytes"] = lambda: gradient.copy_(z)
    return {"rows": rows, "logits": str(dtype), **bench.together(works)}


def last_pass(bench: Bench, given: Inputs) -> dict[str, float]:
    """ms of dW's sum times the incoming gradient, rounded."""
    weight = given.weight.detach()
    total, factor = torch.randn(weight.shape, device=weight.device), torch.ones((), device=weight.device)
    works = {"product_then_cast": lambda: total.mul_(factor).to(weight.dtype)}
    works["one_torch_operation"] = lambda: torch.mul(total, factor, out=torch.empty_like(weight))
    if pick_backend("auto", weight.device) == "triton":
        works["triton"] = lambda: scaled(total, factor, weight.dtype, "triton")
    return bench.together(works)


def head_of(given: Inputs, **options) -> Tensor:
    return kto_head(
        given.hidden,
        given.weight,
        given.target,
        given.lengths,
        ref_logps=given.ref_logps,
        sign=given.sign,
        row_weight=given.row_weight,
        z0=given.z0,
        beta=BETA,
        **options,
    ).loss


def both_ways(given: Inputs, logit_rows: int | None = None, **options) -> Callable[[], None]:
    def run() -> None:
        given.hidden.grad = given.weight.grad = None
        usual = logits.LOGIT_ROWS
        logits.LOGIT_ROWS = logit_rows or usual
        try:
            head_of(given, **options).backward()
        finally:
            logits.LOGIT_ROWS = usual

    return run


def forward_alone(given: Inputs) -> None:
    with torch.no_grad():
        head_of(given)


def whole_head(bench: Bench, given: Inputs, budgets: list[int]) -> None:
    """One hidden size: the head over its floor, with the default budget, and by budget and rows of logits at a time."""
    floor = Floor(given)
    narrow, cuda = given.hidden.dtype, given.hidden.is_cuda
    dtypes = {"fp32": None, "bf16": narrow} if cuda else {"default": None}
    for name, dtype in dtypes.items():
        options = {"logits_dtype": dtype}
        variants = {"floor": lambda: floor.run(backward=True), "default": both_ways(given, **options)}
        for budget in budgets:
            variants[f"budget {budget / GIB:.3g} GiB"] = both_ways(given, budget=budget, **options)
        for logit_rows in (512, 2048):
            variants[f"{logit_rows} rows of logits"] = both_ways(given, logit_rows=logit_rows, **options)

        def measured(variants=variants) -> dict:
            found = bench.together(variants)
            peaks = {}
            for variant in list(variants)[1:]:
                given.hidden.grad = given.weight.grad = None
                peaks[variant] = bench.meter.peak(variants[variant]) // 10**6
            ratios = {variant: round(value / found["floor"], 3) for variant, value in found.items()}
            return {"ms": found, "times_the_floor": ratios, "peak_mb": peaks}

        bench.tried(f"H={given.hidden.shape[1]} head, {name} logits", measured)
    bench.tried(
        f"H={given.hidden.shape[1]} head, forward alone",
        lambda: bench.together({"floor": lambda: floor.run(backward=False), "default": lambda: forward_alone(given)}),
    )


def compiled_plain(bench: Bench, given: Inputs) -> dict[str, float]:
    from head import compiled

    head = compiled()

    def run() -> None:
        given.hidden.grad = given.weight.grad = None
        head(given).backward()

    return {"ms": bench.ms(run)}


def profile(given: Inputs) -> dict:
    """One iteration's kernels by time on the device (the operations on a CPU), and the host's largest."""
    cuda = given.hidden.is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    run = both_ways(given)
    run()
    with torch.profiler.profile(activities=activities) as found:
        run()
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in found.key_averages():
        rows.append(
            {
                "name": event.key[:120],
                "calls": event.count,
                "device_ms": round(event.self_device_time_total / 1e3, 4),
                "host_ms": round(event.self_cpu_time_total / 1e3, 4),
            }
        )
    by_device = sorted(rows, key=lambda row: -row["device_ms"])[:25]
    by_host = sorted(rows, key=lambda row: -row["host_ms"])[:15]
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e3
    span = 0.0
    if kernels:
        first = min(event.time_range.start for event in kernels)
        span = (max(event.time_range.end for event in kernels) - first) / 1e3
    return {"busy_ms": busy, "from_first_to_last_kernel_ms": span, "kernels": by_device, "host": by_host}


def measure(bench: Bench, widths: list[int], sizes: tuple[int, int, int], *, tiny: bool) -> None:
    """In order of worth."""
    rows, vocab, sequences = sizes
    shapes = [(4096, 8, 1), (2048, 8, 1), (2048, 4, 1), (4096, 16, 1), (8192, 16, 1), (1024, 4, 1), (8192, 32, 1)]
    shapes += [(4096, 8, 2), (4096, 8, 3), (2048, 4, 3)]

    def inputs(width: int) -> Inputs:
        return draw(rows, width, vocab, sequences, torch.bfloat16, bench.device)

    for width in widths:
        given = inputs(width)
        whole_head(bench, given, [1000 * vocab] if tiny else [GIB, 3 * GIB])
        bench.tried(f"H={width} profile", lambda given=given: profile(given))
        bench.tried(f"H={width} last pass over dW", lambda given=given: last_pass(bench, given))
    given = inputs(64)
    for dtype in (torch.float32, torch.bfloat16):
        count = 16 if tiny else 4096
        bench.tried("row pass", lambda dtype=dtype, count=count: row_passes(bench, given, count, dtype, shapes))
    for width in widths:
        given = inputs(width)
        wide = torch.float32 if given.hidden.is_cuda else torch.bfloat16
        for chunk in (16, 32) if tiny else (2560, 4096, 4224, 6144, 8192):
            work = lambda given=given, chunk=chunk, wide=wide: matmuls(bench, given, chunk, wide)  # noqa: E731
            bench.tried(f"H={width} matmuls", work)
    for width in [] if tiny else widths:
        given = inputs(width)
        bench.tried(f"H={width} torch.compile of plain PyTorch", lambda given=given: compiled_plain(bench, given))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", help="hidden sizes (default 4096 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--json", type=Path, help="write the results here, after every part")
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing, to see that it runs")
    arguments = parser.parse_args()
    if device.type == "cpu" and not arguments.tiny:
        parser.error("without a GPU only --tiny makes sense: benchmarks/head.py measures the CPU")
    repeats = 1 if arguments.tiny else arguments.repeats
    bench = Bench(device, repeats, Report(arguments.json, device))
    widths = arguments.width or ([32] if arguments.tiny else [4096, 1024])
    sizes = TINY if arguments.tiny else (ROWS, VOCAB, SEQUENCES)
    measure(bench, widths, sizes, tiny=arguments.tiny)


if __name__ == "__main__":
    main()

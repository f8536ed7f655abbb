"""The LM head of KTO: this project's fused head, plain PyTorch, and its peers, on the same random inputs.

    python benchmarks/head.py [--rows N --hidden H --vocab V --sequences S --dtype fp32|bf16 --repeats R --json FILE]

Everything is timed in one process, the implementations one after the other in each round, and a ratio is the median of
the rounds' ratios to the floor of the same round: three bare matmuls of the same sizes for forward and backward, one
for forward alone, into memory that is there already. `--liger-row` takes the sizes of Liger's own published benchmark.
Peers that are not installed, or fail, are left out, and said so. Peak memory is measured in a run of its own, beyond
the inputs.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # so that it runs without an installation, too

import records
from kto_kernels import kto_head, kto_loss, sequence_logps
from kto_kernels.logits import DEFAULT_BUDGET

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": (4096, 576, 49152, 16), "cuda": (16384, 4096, 128256, 32)}
LIGER_ROW = (32 * 512, 1024, 128256, 32)
BETA = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """S sequences of N / S rows each, so that peers that want a rectangle get one."""

    hidden: Tensor
    # (N, H)
    weight: Tensor
    # (V, H)
    target: Tensor
    # (N,)
    lengths: Tensor
    # (S,) on the CPU
    ref_logps: Tensor
    # (S,)
    sign: Tensor
    # (S,)
    row_weight: Tensor
    # (S,) ones: Liger's loss has no weights
    z0: Tensor
    # ()


def draw(rows: int, hidden: int, vocab: int, sequences: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    each = rows // sequences
    return Inputs(
        hidden=torch.randn(rows, hidden, device=device).to(dtype).requires_grad_(),
        # logits of unit variance and more, so that the softmax is neither flat nor a point
        weight=(2 * torch.randn(vocab, hidden, device=device) / hidden**0.5).to(dtype).requires_grad_(),
        target=torch.randint(vocab, (rows,), device=device),
        lengths=torch.full((sequences,), each),
        ref_logps=-12.0 * each + torch.randn(sequences, device=device),
        sign=torch.where(torch.arange(sequences, device=device) % 2 == 0, 1.0, -1.0),
        row_weight=torch.ones(sequences, device=device),
        z0=torch.tensor(0.1, device=device),
    )


Head = Callable[[Inputs], Tensor]
# the weighted sum (or, for Liger, the mean) of the losses


def loss_of(logps: Tensor, given: Inputs) -> Tensor:
    summed = sequence_logps(logps, given.lengths)
    return (given.row_weight * kto_loss(summed, given.ref_logps, given.sign, z0=given.z0, beta=BETA)).sum()


def ours(given: Inputs, logits_dtype: torch.dtype | None = None) -> Tensor:
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
        logits_dtype=logits_dtype,
    ).loss


def plain(given: Inputs) -> Tensor:
    logits = (given.hidden @ given.weight.T).float()
    return loss_of(logits.log_softmax(-1).gather(-1, given.target[:, None])[:, 0], given)


def compiled() -> Head:
    @torch.compile
    def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]

    return lambda given: loss_of(logps(given.hidden, given.weight, given.target), given)


def trl() -> Head:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def head(given: Inputs) -> Tensor:
        logps = ChunkedLogProbFunction.apply(
            given.hidden, given.weight, None, given.target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        return loss_of(logps, given)

    return head


def liger() -> Head:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    head = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=False)

    def run(given: Inputs) -> Tensor:
        # without a reference it compares with 0: its cost is that of the policy's part alone, the fairest comparison
        shape = (given.lengths.numel(), -1)
        return head(
            given.hidden.view(*shape, given.hidden.shape[-1]),
            given.weight,
            given.target.view(shape),
            preference_labels=given.sign > 0,
            kl=given.z0,
        )[0]

    return run


def cce() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return lambda given: loss_of(
        -linear_cross_entropy(given.hidden, given.weight, given.target, reduction="none"), given
    )


class Floor:
    """Nothing but the matmuls, into memory that is there already, in chunks as large as the fused head's."""

    def __init__(self, given: Inputs):
        self.hidden, self.weight = given.hidden.detach(), given.weight.detach()
        device, size = self.hidden.device.type, self.hidden.element_size()
        rows = max(1, DEFAULT_BUDGET[device] // (len(self.weight) * size))
        self.rows = min(len(self.hidden), rows)
        self.logits = self.hidden.new_empty(self.rows, len(self.weight))
        self.grad_hidden, self.grad_weight = torch.empty_like(self.hidden), torch.zeros_like(self.weight)

    def run(self, *, backward: bool) -> None:
        for start in range(0, len(self.hidden), self.rows):
            part = slice(start, start + self.rows)
            hidden = self.hidden[part]
            logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
            if backward:
                torch.mm(logits, self.weight, out=self.grad_hidden[part])
                if start:
                    self.grad_weight.addmm_(logits.T, hidden)
                else:
                    torch.mm(logits.T, hidden, out=self.grad_weight)


class Meter:
    """Seconds and peak bytes on a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def seconds(self, work: Callable[[], None]) -> float:
        if self.device.type == "cuda":
            # once untimed: a GPU runs as fast as what it did before has left it power for, so each kind of work is
            # timed after itself
            work()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def peak(self, work: Callable[[], None]) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        level = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        return peak


def implementations(given: Inputs) -> tuple[dict[str, Head], list[str]]:
    """Those that run here, each tried once, and why the others do not."""
    found: dict[str, Head] = {}
    missing = []
    wanted: Tensor | None = None
    own: list[tuple[str, str, Callable[[], Head]]] = [("kto_kernels", "torch", lambda: ours)]
    if given.hidden.is_cuda and given.hidden.dtype == torch.bfloat16:
        # at the precision of the peers' logits
        own.append(("kto_bf16_logits", "torch", lambda: partial(ours, logits_dtype=torch.bfloat16)))
    for name, package, build in (
        *own,
        ("torch", "torch", lambda: plain),
        ("torch_compile", "torch", compiled),
        ("trl", "trl", trl),
        ("liger", "liger_kernel", liger),
        ("cce", "cut_cross_entropy", cce),
    ):
        if importlib.util.find_spec(package) is None:
            missing.append(f"{name}: {package} is not installed")
            continue
        try:
            head = build()
            loss = head(given)
            loss.backward()
        except Exception as error:  # a peer that fails here is reported, and must not end the others' measurement
            reason = next(iter(str(error).strip().splitlines()), "")[:150]
            missing.append(f"{name}: {type(error).__name__}: {reason}")
            continue
        finally:
            given.hidden.grad = given.weight.grad = None
        loss = loss.detach().double()
        wanted = loss if wanted is None else wanted
        # Liger's is a mean, against a reference of 0
        if name != "liger" and not torch.allclose(loss, wanted, rtol=0.05):
            missing.append(f"{name}: its loss ({float(loss):.4f}) is not {float(wanted):.4f}, so it does another job")
            continue
        found[name] = head
    return found, missing


def passes(head: Head, given: Inputs) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            head(given)

    def both() -> None:
        given.hidden.grad = given.weight.grad = None
        head(given).backward()

    return {"forward": forward, "forward_backward": both}


def measure(given: Inputs, repeats: int) -> tuple[list[dict], list[str]]:
    meter = Meter(given.hidden.device)
    heads, missing = implementations(given)
    floor = Floor(given)
    work = {
        ("floor", name): (lambda backward=backward: floor.run(backward=backward))
        for name, backward in (("forward", False), ("forward_backward", True))
    }
    for name, head in heads.items():
        work |= {(name, kind): run for kind, run in passes(head, given).items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for turn in range(repeats + 1):
        for key, run in work.items():
            took = meter.seconds(run)
            if turn:  # the first warms up
                seconds[key].append(took)
    results = []
    for (name, kind), run in work.items():
        given.hidden.grad = given.weight.grad = None
        ratios = [a / b for a, b in zip(seconds[name, kind], seconds["floor", kind], strict=True)]
        results.append(
            {
                "implementation": name,
                "pass": kind,
                "seconds": statistics.median(seconds[name, kind]),
                "times_the_floor": statistics.median(ratios),
                "peak_bytes": meter.peak(run),
                "all_seconds": seconds[name, kind],
            }
        )
    return results, missing


def table(results: list[dict]) -> str:
    lines = [f"{'implementation':15} {'pass':17} {'seconds':>9} {'x floor':>8} {'ours is':>8} {'peak MB':>9}"]
    own = {row["pass"]: row["all_seconds"] for row in results if row["implementation"] == "kto_kernels"}
    for row in results:
        pairs = zip(row["all_seconds"], own[row["pass"]], strict=True)
        faster = statistics.median(theirs / mine for theirs, mine in pairs)
        lines.append(
            f"{row['implementation']:15} {row['pass']:17} {row['seconds']:9.4f} {row['times_the_floor']:8.2f} "
            f"{faster:7.2f}x {row['peak_bytes'] / 1e6:9.0f}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = model[0].partition(":")[2].strip() if model else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = SIZES[device.type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help=f"completion rows N (default {default[0]})")
    parser.add_argument("--hidden", type=int, help=f"hidden size H (default {default[1]})")
    parser.add_argument("--vocab", type=int, help=f"vocabulary V (default {default[2]})")
    parser.add_argument("--sequences", type=int, help=f"sequences S, which divide N (default {default[3]})")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device.type == "cuda" else "fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--liger-row", action="store_true", help="B=32, T=512, H=1024, V=128256")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    defaults = LIGER_ROW if arguments.liger_row else default
    given_sizes = (arguments.rows, arguments.hidden, arguments.vocab, arguments.sequences)
    rows, hidden, vocab, sequences = (a or b for a, b in zip(given_sizes, defaults, strict=True))
    if rows % sequences:
        parser.error(f"--sequences ({sequences}) must divide --rows ({rows}): Liger's loss wants equal lengths")
    if min(rows, hidden, vocab, sequences, arguments.repeats) < 1:
        parser.error("sizes and --repeats must be at least 1")

    given = draw(rows, hidden, vocab, sequences, DTYPES[arguments.dtype], device)
    results, missing = measure(given, arguments.repeats)
    title = f"N={rows} H={hidden} V={vocab} S={sequences} {arguments.dtype} on {device_name(device)}"
    print(f"{title}, median of {arguments.repeats}\n{table(results)}")
    for line in missing:
        print(f"left out: {line}")
    if arguments.json:
        content = records.frame("head", {}) | {
            "device": device_name(device),
            "sizes": {"rows": rows, "hidden": hidden, "vocab": vocab, "sequences": sequences},
            "dtype": arguments.dtype,
            "repeats": arguments.repeats,
            "results": results,
            "left_out": missing,
        }
        records.write_json(arguments.json, content)


if __name__ == "__main__":
    main()

"""Whether all that a measurement needs can be imported here, and what the machine itself reaches.

    python benchmarks/importable.py [--json FILE]

Status 1 where something is missing that the other measurements need.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records

# module: who needs it. The first group has to be there; without the others their lines are left out.
NEEDED = {
    "torch": "everything",
    "triton": "kto_kernels",
    "transformers": "kto_dist",
    "deepspeed": "kto_dist",
    "datasets": "kto_dist",
    "kto_kernels": "kto_dist",
    "kto_dist.training.loop": "kto_dist",
    "kto_dist.commands.cli": "kto_dist",
    "pytest": "tests",
    "hypothesis": "tests",
}
PEERS = {
    "trl": "TRL",
    "trl.trainer.kto_trainer": "TRL",
    "trl.kernels": "TRL's head",
    "accelerate": "TRL",
    "peft": "adapters",
    "liger_kernel.transformers": "Liger's layers",
    "liger_kernel.chunked_loss": "Liger's head",
    "cut_cross_entropy": "cut-cross-entropy's head",
    "flash_attn": "flash_attention_2",
    "torch.nn.attention.varlen": "packed attention of torch's own",
    "mlflow": "tracking, which the measurements leave off",
    "gguf": "models in GGUF files",
    "duckdb": "mining",
}


def find(modules: dict[str, str]) -> list[dict[str, Any]]:
    lines = []
    for name, purpose in modules.items():
        started = time.monotonic()
        line: dict[str, Any] = {"module": name, "for": purpose}
        try:
            module = importlib.import_module(name)
            line["version"] = str(getattr(module, "__version__", ""))
        except Exception as error:  # whatever an import does here is what the table has to say
            line["missing"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        line["seconds"] = time.monotonic() - started
        lines.append(line)
    return lines


def ceilings() -> dict[str, float]:
    """What a large bf16 matmul and a large copy reach, on random data; medians of ten."""
    import torch

    if not torch.cuda.is_available():
        return {}

    def seconds(work: Callable[[], Any]) -> float:
        for _ in range(3):
            work()
        took = []
        for _ in range(10):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            took.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(took)

    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    free, total = torch.cuda.mem_get_info()
    return {
        "matmul_tflops": 2 * size**3 / seconds(lambda: left @ right) / 1e12,
        "copy_terabytes_per_second": 2 * source.numel() * 4 / seconds(lambda: target.copy_(source)) / 1e12,
        "memory_bytes": total,
        "free_bytes": free,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    needed, peers = find(NEEDED), find(PEERS)
    content = records.frame("imports", {}) | {"needed": needed, "peers": peers, "ceilings": {}}
    records.write_json(arguments.json, content)
    content["ceilings"] = ceilings()
    records.write_json(arguments.json, content)
    for line in needed + peers:
        state = line.get("missing") or line["version"] or "there"
        print(f"{line['module']:28} {line['seconds']:6.2f} s  {'MISSING ' if 'missing' in line else ''}{state}")
    for name, value in content["ceilings"].items():
        print(f"{name:28} {value:,.4g}")
    if any("missing" in line for line in needed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""All that a GPU can say of this project, in stages: most worth first, each in a process with a time limit of its own.

    benchmarks/gpu.sh [--tiny] [--within SECONDS] [--list] [STAGE ...]

Each stage writes `<device>-<stage>.json` while it measures, so what fails or runs out of time keeps what it has, and
the next goes on. `OUT` names the folder (default: `benchmarks/results`), `WHEELS` a folder of wheels to install from
first. A table of all stages comes last. Nothing is fetched from a network.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scaling_table

HERE = Path(__file__).resolve().parent
ALL = ("kto_dist", "bare-liger", "trl", "trl-liger", "kto_dist-eager", "bare", "kto_dist-stage1", "kto_dist-sdpa")

# trl-bf16: only the adapter needs fp32 weights, and the model's can be bf16
ADAPTED = ("kto_dist", "bare", "trl-bf16", "trl-liger", "trl")


def _names(*names: str) -> list[str]:
    return [part for name in names for part in ("--implementation", name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    name: str
    script: str
    limit: float
    """Seconds."""
    arguments: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    """In place of `arguments`, to see on any machine that it runs."""
    model: str | None = None
    """The random model that it needs."""
    trace: bool = False
    """Writes a Chrome trace as well."""


FULL = ["--global-batch", "64", "--max-length", "1024", "--tokens-per-microbatch", "16384"]
SHORT = ["--global-batch", "8", "--max-length", "256", "--tokens-per-microbatch", "1024", "--threads", "1"]
TIMED = ["--steps", "5", "--warmup", "2", "--repeats", "1", "--limit", "90"]
ONCE = ["--steps", "1", "--repeats", "1", "--trl-probe", "4,8"]
TINY_HEAD = ["--rows", "64", "--hidden", "32", "--vocab", "500", "--sequences", "4", "--repeats", "1"]

STAGES = (
    Stage(name="imports", script="importable.py", limit=240),
    Stage(name="tests", script="device_tests.py", limit=150, tiny=["--only", "gpu"]),
    Stage(
        name="profile",
        script="step_profile.py",
        limit=90,
        model="1.2b",
        arguments=FULL,
        tiny=[*SHORT, "--untraced", "1", "--steps", "1"],
        trace=True,
    ),
    Stage(
        name="throughput",
        script="throughput.py",
        limit=360,
        model="1.2b",
        arguments=[*FULL, *TIMED, "--trl-batch", "8", "--trl-probe", "8,16,32", *_names(*ALL)],
        tiny=[*SHORT, *ONCE, *_names("kto_dist", "bare", "trl")],
    ),
    Stage(
        name="throughput-135m",
        script="throughput.py",
        limit=200,
        model="135m",
        arguments=[*FULL, *TIMED, "--trl-batch", "8", "--trl-probe", "16,32,64", *_names(*ALL[:5])],
        tiny=[*SHORT, *ONCE, *_names("kto_dist")],
    ),
    Stage(name="head-wide", script="head.py", limit=120, tiny=TINY_HEAD),
    Stage(name="head-narrow", script="head.py", limit=90, arguments=["--liger-row"], tiny=TINY_HEAD),
    Stage(name="head-parts", script="head_parts.py", limit=200, tiny=["--tiny"]),
    Stage(
        name="profile-135m",
        script="step_profile.py",
        limit=60,
        model="135m",
        arguments=FULL,
        tiny=[*SHORT, "--untraced", "1", "--steps", "1"],
    ),
    Stage(
        name="scaling",
        script="scaling.py",
        limit=240,
        model="1.2b",
        arguments=[
            "--global-batch",
            "64",
            "--max-length",
            "1024",
            "--tokens-per-microbatch",
            "16384",
            "--limit",
            "90",
            "--stages",
            "1,2,3",
            "--adapter-stages",
            "2",
        ],
        tiny=["--stages", "2", "--adapter-stages", "", "--global-batch", "4", "--case", "ZeRO 2", "--case", "one rank"],
    ),
    Stage(
        name="lengths",
        script="row_lengths.py",
        limit=240,
        model="1.2b",
        arguments=[*FULL, "--steps", "3", "--warmup", "2", "--trl-batch", "16", *_names("kto_dist", "trl")],
        tiny=[*SHORT, "--lengths", "short-chats"],
    ),
    Stage(
        name="throughput-lora",
        script="throughput.py",
        limit=240,
        model="1.2b",
        arguments=[*FULL, *TIMED, "--adapter", "lora", "--trl-batch", "16", *_names(*ADAPTED)],
        tiny=[*SHORT, *ONCE, "--adapter", "lora", *_names(*ADAPTED[:2])],
    ),
    Stage(
        name="deterministic",
        script="throughput.py",
        limit=120,
        model="1.2b",
        arguments=[*FULL, *TIMED, *_names("kto_dist", "kto_dist-deterministic")],
        tiny=[*SHORT, *ONCE, *_names("kto_dist", "kto_dist-deterministic")],
    ),
)


def run(stage: Stage, folder: Path, slug: str, models: Path, *, tiny: bool, left: float) -> dict[str, Any]:
    """Runs a stage with its output on ours; returns what became of it. `left`: seconds that all stages still have."""
    limit = min(stage.limit, left)
    file = folder / f"{slug}-{stage.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-u", str(HERE / stage.script), "--json", str(file)]
    if stage.model:
        model = "tiny" if tiny else stage.model
        command += ["--random", model, "--random-folder", str(models / model)]
    if stage.trace:
        command += ["--trace", str(folder / f"{slug}-{stage.name}-trace.json.gz")]
    command += stage.tiny if tiny else stage.arguments
    print(f"\n=== {stage.name} (at most {limit:.0f} s)", flush=True)
    started = time.monotonic()
    line: dict[str, Any] = {"stage": stage.name, "file": str(file)}
    if not (HERE / stage.script).exists():
        return line | {"seconds": 0.0, "state": f"{stage.script} is not there"}
    if limit < 10:
        return line | {"seconds": 0.0, "state": "no time was left"}
    # a session of its own, so that what a stage starts ends with it
    process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
        line["state"] = "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        line["state"] = f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    line["seconds"] = time.monotonic() - started
    print(f"=== {stage.name}: {line['state']}, {line['seconds']:.0f} s", flush=True)
    return line


def gist(file: Path) -> list[str]:
    """The figures of a result file, a line each."""
    if not file.exists():
        return ["no result"]
    content = json.loads(file.read_text(encoding="utf-8"))
    kind, lines = content.get("benchmark", "head"), []
    if kind == "imports":
        missing = [line["module"] for line in content["needed"] + content["peers"] if "missing" in line]
        lines = [f"missing: {', '.join(missing) or 'nothing'}"]
        lines += [f"{name} {value:,.4g}" for name, value in content["ceilings"].items()]
    elif kind == "tests":
        lines = [
            f"{line['run']}: {line.get('tests', 0)} tests, {line.get('failures')} failed" for line in content["results"]
        ]
    elif kind == "profile":
        kernels = content["kernels"]
        lines = [f"{content['seconds_per_step']:.4f} s a step"]
        if kernels:
            shares = ", ".join(f"{line['name']} {line['share']:.0%}" for line in kernels["classes"][:8])
            lines += [f"GPU busy {kernels['busy']:.1%}: {shares}"]
    elif kind in ("throughput", "lengths"):
        for line in content["results"]:
            step = f", {line['seconds_per_step']:.3f} s a step" if "seconds_per_step" in line else ""
            mfu = f", mfu {line['mfu']:.2f}" if "mfu" in line else ""
            rows = f"{line['rows']:13} " if "rows" in line else ""
            lines.append(
                f"{rows}{line['phase']:9} {line['implementation']:24} {line['rows_per_second']:8.1f} rows/s, "
                f"{line['tokens_per_second']:9,.0f} tokens/s{step}{mfu}, {line['peak_bytes'] / 2**30:.1f} GiB"
            )
        lines += [f"left out: {name}: {why.splitlines()[0][:120]}" for name, why in content["left_out"].items()]
    elif kind == "scaling":
        lines = scaling_table.gist(content)
    else:
        for line in content.get("results", []):
            if "times_the_floor" in line and "pass" in line:
                lines.append(
                    f"{line['implementation']:14} {line['pass']:17} {line['seconds'] * 1e3:8.2f} ms, "
                    f"{line['times_the_floor']:.2f} of the floor, {line['peak_bytes'] / 1e6:,.0f} MB"
                )
        lines += [f"left out: {why[:140]}" for why in content.get("left_out", [])]
    return lines


def slug_of_device() -> str:
    """Asked of a process of its own, which does not stay on the GPU."""
    code = "import machine; print(machine.device_slug())"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)}; by default all")
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing, to see that it runs anywhere")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all stages together")
    parser.add_argument("--list", action="store_true", help="name the stages and their limits, and run nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stages if name not in names]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(names)}")
    chosen = [stage for stage in STAGES if not arguments.stages or stage.name in arguments.stages]
    if arguments.list:
        for stage in chosen:
            print(f"{stage.name:18} at most {stage.limit:.0f} s: {stage.script}")
        return
    folder = Path(os.environ.get("OUT") or HERE / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    slug = slug_of_device() + ("-tiny" if arguments.tiny else "")
    memory = Path("/dev/shm")
    lines = []
    until = time.monotonic() + arguments.within
    with tempfile.TemporaryDirectory(dir=os.environ.get("MODELS") or (memory if memory.is_dir() else None)) as models:
        for stage in chosen:
            lines.append(run(stage, folder, slug, Path(models), tiny=arguments.tiny, left=until - time.monotonic()))
    print(f"\n{slug}")
    for line in lines:
        print(f"{line['stage']:18} {line['seconds']:6.0f} s  {line['state']}")
        for text in gist(Path(line["file"])):
            print(f"    {text}")
    if any(line["state"] != "done" for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

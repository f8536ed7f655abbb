"""The tests that need this machine's GPU, and those of the kernels on it, counted.

    python benchmarks/device_tests.py [--json FILE]

Status 1 where one fails. Without a GPU they are skipped, or run on the CPU.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import machine
import records

TESTS = records.ROOT / "tests"
# Files are named, since others may import what a measurement does without.
MARKED = [str(file) for file in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in file.read_text()]
# The first run has what only a GPU can show, the second what holds on every device.
RUNS = {
    "gpu": ["-m", "gpu", *MARKED],
    "kernels": ["-m", "not soak and not gpu", "tests/test_head.py", "tests/test_triton.py", "tests/test_kernels.py"],
}


def run(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        if name == "kernels" and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(4, machine.cores()))]  # each compiles its own kernels, which takes the time
        started = time.monotonic()
        line: dict[str, Any] = {"run": name}
        try:
            done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=limit)
            # 5: no test was chosen, as where none is marked
            line["status"] = 0 if done.returncode == 5 else done.returncode
            if line["status"]:
                line["end"] = done.stdout.splitlines()[-15:]
        except subprocess.TimeoutExpired:
            line["status"], line["end"] = 124, [f"took more than {limit:.0f} s"]
        line["seconds"] = time.monotonic() - started
        if report.exists():
            suite = xml.parse(report).getroot().find("testsuite")
            assert suite is not None
            line |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            broken = [case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error")]
            line["broken"] = [f"{case.get('classname')}::{case.get('name')}: {_reason(case)}" for case in broken]
        return line


def _reason(case: xml.Element) -> str:
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            return (found.get("message") or "")[:300]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS, action="append", help="instead of both")
    parser.add_argument("--limit", type=float, default=90, help="seconds of each")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    content = records.frame("tests", {}) | {"results": []}
    records.write_json(arguments.json, content)
    for name in arguments.only or RUNS:
        if name == "gpu" and not MARKED:
            print("gpu: no test is marked")
            continue
        line = run(name, RUNS[name], arguments.limit)
        content["results"].append(line)
        records.write_json(arguments.json, content)
        counts = ", ".join(f"{line[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in line)
        print(f"{name}: status {line['status']}, {counts}, {line['seconds']:.0f} s")
        for broken in line.get("broken", [])[:30]:
            print(f"  {broken[:240]}")
        if line["status"]:
            print("\n".join(line["end"]))
    if any(line["status"] for line in content["results"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

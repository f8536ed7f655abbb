"""A log larger than the memory that a run may use is mined all the same.

The small version runs always; the full one (5 GB in 2 GB) is marked soak. Both measure the peak of a process of their
own, as the system saw it, on logs without one repeated answer: nothing gets smaller on the way.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import yaml
from mining import MORE

CHILD = """
import json, sys
from kto_dist.feedback import MiningConfig, mine
audit = mine(MiningConfig.load(sys.argv[1]))
rows = {file["split"]: file["rows"] for file in audit["files"]}
# not ru_maxrss, which a child inherits from a larger parent
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([int(peak) * 1024, rows]))
"""


def generate(path: Path, rows: int, words: int) -> int:
    """A log of answers that are all different, two to a prompt; returns its bytes."""
    with duckdb.connect() as connection:
        connection.execute(
            f"""COPY (SELECT 'question ' || (i // 2) AS q, 'answer ' || i || array_to_string(list_transform(
                    range({words}), lambda k: md5((i * 1000 + k)::VARCHAR)), ' ') AS a,
                CASE WHEN hash(i) % 3 = 0 THEN 'down' ELSE 'up' END AS f, 'user ' || (hash(i) % 5000) AS u,
                1767225600 + i AS t, 'v' || (i * 3 // {rows}) AS m
            FROM range({rows}) r(i)) TO '{path}' (FORMAT json)"""
        )
    return path.stat().st_size


def mine_apart(folder: Path, log: Path, memory: int) -> tuple[int, dict[str, int]]:
    config = folder / "mine.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "input": {"files": str(log)},
                "columns": MORE,
                "split": {"stratify": False},
                "output": {"folder": str(folder / "mined")},
                "resources": {"memory_mebibytes": memory, "threads": 2, "work": str(folder / "work")},
            }
        )
    )
    done = subprocess.run([sys.executable, "-c", CHILD, str(config)], stdout=subprocess.PIPE, text=True, check=True)
    peak, rows = json.loads(done.stdout.splitlines()[-1])
    return peak, rows


def test_a_log_larger_than_the_memory_of_the_database_is_mined_whole(tmp_path):
    rows = 120_000
    assert generate(tmp_path / "log.jsonl", rows, words=75) > 1.1 * 256 * 2**20
    peak, kept = mine_apart(tmp_path, tmp_path / "log.jsonl", memory=256)
    assert sum(kept.values()) == rows
    # the interpreter, Arrow and matplotlib, and what DuckDB takes beyond its limit: about 400 MB whatever the log
    assert peak < 750e6


def test_what_draws_the_report_is_imported_once_the_log_has_been_read():
    listed = "import sys; from kto_dist.feedback import mine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], stdout=subprocess.PIPE, text=True, check=True)
    assert not {"matplotlib", "scipy", "torch"} & {*done.stdout.split()}  # 90 MiB beside the log's


@pytest.mark.soak
def test_5_gigabytes_are_mined_in_2(tmp_path):
    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip("needs 30 GB of disk")
    rows = 1_750_000
    assert generate(tmp_path / "log.jsonl", rows, words=86) > 5e9
    peak, kept = mine_apart(tmp_path, tmp_path / "log.jsonl", memory=1280)
    assert sum(kept.values()) == rows
    assert peak < 2e9

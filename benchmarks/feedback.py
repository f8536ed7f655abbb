"""How fast a log of thumbs becomes a dataset, in how much memory, and how both grow with the log.

In:  nothing: logs are generated, of the shape below. Out: a table, and `--json` for the
     figures of the README.

1. log      JSON lines: four votes an answer and 2.5 answers a prompt on average, users by a power law, 5 % delivered
            twice, one answer in ten a light edit of another; about 440 bytes a line
2. mine     the whole of `kto-dist mine` in a fresh process: reading, every step of the cleaning with its defaults,
            near duplicates, audit, report, Parquet. The peak is the largest resident set of that process's own memory
3. growth   seconds and peak over rows; a straight line means that a row costs the same in a longer log

Generating, which has a process of its own too, is in neither figure. Memory is bounded by `--memory` for the database;
Python and Arrow come on top.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import duckdb
import yaml
from rich.console import Console
from rich.table import Table

COLUMNS = {"prompt": "prompt", "response": "response", "feedback": "feedback", "user": "user_id", "time": "at",
           "model": "model"}  # fmt: skip
VOTES_AN_ANSWER, ANSWERS_A_PROMPT = 4, 2.5


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """A log of `rows` lines; the same rows and seed give the same lines."""
    answers = max(1, int(rows / VOTES_AN_ANSWER))
    prompts = max(1, int(answers / ANSWERS_A_PROMPT))
    connection = duckdb.connect()
    connection.execute("CREATE MACRO draw(key, i) AS hash(key || ' ' || i) / 18446744073709551616.0")
    connection.execute(
        "CREATE TABLE words AS SELECT list(md5(i::VARCHAR)[:2 + i % 8] ORDER BY i) AS w FROM range(4096) t(i)"
    )
    connection.execute(
        f"""COPY (
            WITH votes AS (
                SELECT i, CASE WHEN draw('again', i) < 0.05 AND i > 0 THEN i - 1 ELSE i END AS j FROM range({rows}) t(i)
            ),
            drawn AS (SELECT j, (draw('answer {seed}', j) * {answers})::BIGINT AS a FROM votes),
            -- an edit shares the words of the answer before it but for its last ones
            told AS (SELECT *, CASE WHEN a % 10 = 9 THEN a - 1 ELSE a END AS base FROM drawn)
            SELECT 'What does ' || w[1 + (base / {ANSWERS_A_PROMPT})::BIGINT % 4096] || ' mean, and why is question '
                    || ((base / {ANSWERS_A_PROMPT})::BIGINT % {prompts}) || ' asked so often?' AS prompt,
                array_to_string(list_transform(range(40), lambda k: w[1 + (hash(base * 64 + k) % 4096)::BIGINT]), ' ')
                    || CASE WHEN a = base THEN '.' ELSE ', indeed.' END AS response,
                CASE WHEN draw('label', j) < 0.55 THEN 'thumbs_up' ELSE 'thumbs_down' END AS feedback,
                'user-' || (power(draw('user', j), 3) * {max(10, rows // 50)})::BIGINT AS user_id,
                strftime(TIMESTAMP '2026-01-01' + INTERVAL (j * 7) SECOND, '%Y-%m-%dT%H:%M:%SZ') AS at,
                'v' || (j * 4 / {rows})::BIGINT AS model
            FROM told, words
        ) TO '{path}' (FORMAT json)"""
    )


def generate_apart(path: Path, rows: int) -> None:
    """The log from a process of its own, whose memory is given back with it."""
    subprocess.run([sys.executable, __file__, "--generate", str(path), "--rows", str(rows)], check=True)


def peak_bytes() -> int:
    """The largest resident set of this process so far. ru_maxrss also counts the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def mine_once(log: Path, folder: Path, memory: int, threads: int) -> tuple[float, int, dict[str, int]]:
    """Seconds, peak bytes and counts of a run in a process of its own."""
    config = folder / "mine.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "input": {"files": str(log)},
                "columns": COLUMNS,
                "output": {"folder": str(folder / "mined")},
                "resources": {"memory_mebibytes": memory, "threads": threads, "work": str(folder / "work")},
            }
        )
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(config)], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - started, *json.loads(done.stdout.splitlines()[-1])


def child(config: str) -> None:
    from kto_dist.feedback import MiningConfig, mine

    audit = mine(MiningConfig.load(config))
    counts = {file["split"]: file["rows"] for file in audit["files"]}
    print(json.dumps([peak_bytes(), counts]))


@click.command()
@click.option("--rows", "sizes", multiple=True, type=int, default=(1_000_000, 3_000_000, 10_000_000), show_default=True)
@click.option("--memory", default=4096, show_default=True, help="MiB for the database.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Where to write the figures.")
@click.option("--folder", type=click.Path(path_type=Path), help="For logs and databases.")
@click.option("--child", "config", hidden=True, help="Mine this config and print the peak.")
@click.option("--generate", "written", hidden=True, type=click.Path(path_type=Path), help="Write a log and end.")
def main(
    sizes: tuple[int, ...],
    memory: int,
    threads: int,
    target: Path | None,
    folder: Path | None,
    config: str | None,
    written: Path | None,
) -> None:
    """Mine generated logs of growing length."""
    if config is not None:
        child(config)
        return
    if written is not None:
        generate(written, *sizes)
        return
    results, table = [], Table("rows", "log", "seconds", "rows/s", "peak memory", "dataset")
    for rows in sizes:
        here = Path(tempfile.mkdtemp(dir=folder))
        try:
            log = here / "log.jsonl"
            generate_apart(log, rows)
            seconds, peak, counts = mine_once(log, here, memory, threads)
            size = log.stat().st_size
        finally:
            shutil.rmtree(here)
        results.append(
            {"rows": rows, "seconds": round(seconds, 2), "peak_bytes": peak, "log_bytes": size, "dataset_rows": counts}
        )
        table.add_row(
            f"{rows:,}", f"{size / 2**30:.2f} GiB", f"{seconds:.1f}", f"{rows / seconds:,.0f}",
            f"{peak / 2**30:.2f} GiB",
            f"{sum(counts.values()):,}",
        )  # fmt: skip
    Console().print(table)
    if target is not None:
        from machine import device_name
        from records import code  # they bring torch, which a miner's memory should not hold

        about = {
            "benchmark": "feedback",
            "device": device_name(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "code": code(),
            "versions": {name: version(name) for name in ("kto_dist", "duckdb", "rensa", "pyarrow", "numpy")},
            "memory_mebibytes": memory,
            "threads": threads,
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

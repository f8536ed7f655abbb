"""MLflow in an outage, as a fault of `cluster_faults.py`: its server, on the second host, is killed and comes back.

Run by itself it is that server: `python benchmarks/cluster_mlflow.py FOLDER`.

Judged by the server's own database: one run, that has ended; every figure of `metrics.jsonl` once, in order of steps.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from cluster_job import Trial

HOST, RANK_0, PORT = "node-b", "node-a", 5000
WORDS = ("tracking.enabled=true", f"tracking.uri=http://{HOST}:{PORT}")
LONGEST_OUTAGE = 15.0
"""Seconds. Some end while the job trains, some after it has ended."""
SLOW_LINK = "4mbit"
_SECONDS_TO_SERVE, _SECONDS_TO_TRACK = 120.0, 120.0


def begin(trial: Trial) -> None:
    """Starts the server; returns when it has made its database and listens."""
    folder, said = trial.nodes.disk / "mlflow", trial.nodes.folder / "said-by-mlflow"
    trial.nodes.seen(HOST, folder).mkdir(exist_ok=True)
    before = len(_text(said))
    # its temporary files are its own, and nothing that a job has left
    words = ["env", f"TMPDIR={folder}", sys.executable, str(Path(__file__).resolve()), str(folder)]
    process = trial.nodes.popen(HOST, words, said)
    deadline = time.monotonic() + _SECONDS_TO_SERVE
    while "listens" not in _text(said)[before:]:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"MLflow's server does not start: {_text(said)[-500:]}")
        time.sleep(0.05)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def kill(trial: Trial) -> None:
    """And starts it again some seconds later."""
    _stop(trial)
    seconds = trial.draw.uniform(1.0, LONGEST_OUTAGE)
    if trial.draw.random() < 0.5:  # the job would end before that: steps take a second from now on
        trial.nodes.slow(HOST, SLOW_LINK)

    def come_back() -> None:
        time.sleep(seconds)
        begin(trial)

    back = threading.Thread(target=come_back, daemon=True, name=_BACK)
    back.start()


_BACK = "mlflow is back"


def _stop(trial: Trial) -> None:
    """SIGKILL."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = process.cmdline()
            # of this trial, and not `nsenter`, which ends with it
            if words[-1:] == [str(trial.nodes.disk / "mlflow")] and not words[0].endswith(("nsenter", "env")):
                process.kill()


def _asked(trial: Trial, question: str, *values: object) -> list[tuple[Any, ...]]:
    """Of the database; nothing where it is being written, or not there yet."""
    file = trial.nodes.seen(HOST, trial.nodes.disk / "mlflow") / "mlflow.db"
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=1.0)) as database:
            return database.execute(question, values).fetchall()
    except sqlite3.OperationalError:
        return []


def has_beyond(trial: Trial, made: int) -> bool:
    """Whether the server has a step that was made after the fault."""
    time.sleep(0.2)  # a reader keeps a writer waiting
    found = _asked(trial, "select max(step) from metrics where key = 'loss'")
    return bool(found) and (found[0][0] or 0) > made + 1


def settle(trial: Trial) -> bool:
    """Once the server is back, `kto-dist track` sends what the job could not. Whether that was needed."""
    for thread in threading.enumerate():
        if thread.name == _BACK:
            thread.join()
    state = json.loads((trial.run(RANK_0) / ".mlflow" / "state.json").read_text())
    if state["status"] and not (trial.run(RANK_0) / ".mlflow" / "spool.jsonl").exists():
        return False  # all has arrived
    said = trial.nodes.folder / "said-by-track"
    trial.said.append(said)
    words = [sys.executable, "-m", "kto_dist.commands.cli", "track", str(trial.nodes.disk / "run")]
    if status := trial.nodes.popen(RANK_0, words, said).wait(_SECONDS_TO_TRACK):
        raise RuntimeError(f"`kto-dist track` ends with status {status}")
    return True


def judge(trial: Trial) -> str:
    """What the server lacks, has twice or out of order; and then its end."""
    settle(trial)
    lines = [json.loads(line) for line in (trial.run(RANK_0) / "metrics.jsonl").read_text().splitlines()]
    runs = _asked(trial, "select run_uuid, status from runs")
    if [status for _, status in runs] != ["FINISHED"]:
        return f"MLflow has the runs {runs}"
    wrong = []
    for name in sorted({name for line in lines for name in line} - {"step"}):
        wanted = [(line["step"], float(line[name])) for line in lines if name in line]
        found = _asked(
            trial, "select step, value from metrics where run_uuid = ? and key = ? order by rowid", runs[0][0], name
        )
        if found != wanted:
            wrong.append(f"{name}: {len(found)} points for {len(wanted)}, or in another order")
    _stop(trial)
    return "; ".join(wrong)


def serve(folder: Path) -> None:
    """One process; MLflow's own command starts several, which would be killed one by one."""
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = "*"
    import logging

    from mlflow.server import app
    from mlflow.server.handlers import _get_tracking_store
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    _get_tracking_store()  # makes the database
    server = make_server("0.0.0.0", PORT, app, threaded=True)
    print("listens", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

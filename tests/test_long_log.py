"""What `benchmarks/long_log.py` makes of its logs, and of its measurements."""

import json
import os
from collections import Counter

import long_log
import long_log_table
import numpy as np

from kto_dist.base.console import Console
from kto_dist.training.prepare import prepare


def test_a_log_has_several_answers_a_prompt_far_apart(tmp_path):
    long_log.write_log(4000, 500, tmp_path / "log.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    counts = Counter(row["prompt"] for row in rows)
    assert len(rows) == 4000 and len(counts) > 900 and min(counts.values()) == long_log.ANSWERS
    assert rows[0]["prompt"] == rows[1000]["prompt"] != rows[1]["prompt"]
    assert 0.5 < sum(row["label"] for row in rows) / 4000 < 0.7
    assert all(8 <= len(row["prompt"].split()) <= 24 for row in rows)
    words = {word for row in rows for word in (row["prompt"] + row["completion"]).split()}
    assert words <= {f"w{number}" for number in range(500)} and len(words) > 400  # those that the model knows


def test_made_tokens_are_rows_as_a_log_would_give(tmp_path, tiny_model):
    long_log.write_log(50, 30, tmp_path / "log.jsonl")
    config = long_log.config_of(tiny_model, tmp_path, 1)
    made = long_log.make_tokens(config, 2500)
    found = prepare(config, Console()).train
    assert len(found) == made["rows"] == 2500
    assert int((found.prompt_lengths + found.completion_lengths).sum()) == made["tokens"]
    same = np.flatnonzero(found.prompt_group == found.prompt_group[0])
    assert len(same) == long_log.ANSWERS
    assert all((found.prompt(int(row)) == found.prompt(0)).all() for row in same)
    assert found.report.desirable.kept == int(found.desirable.sum()) and found.report.duplicates == 0


def test_memory_is_read_of_any_process_and_of_none_that_has_ended():
    own, whole = long_log.memory_of(os.getpid())
    assert 2**20 < own < whole and long_log.memory_of(2**22 + 1) == (0, 0)


def test_the_table_has_a_column_a_log_and_no_speed_of_made_tokens():
    memory = {"peak_bytes": 2**29, "peak_bytes_with_files": 2**30, "worker_bytes": 0}
    line = {
        "rows": 1000,
        "made": False,
        "log_bytes": 2**30,
        "tokenise": {"seconds": 2.0, "tokens": 5_000_000, "bytes": 2**31, **memory},
        "plan": {"steps": 15, "pairs": 2000, "open_seconds": 1, "pairs_seconds": 2, "keys_seconds": 3, **memory},
        "data": {"seconds_per_step": 0.0042, **memory},
        "train": {"first_step_seconds": 61.0, "seconds_per_step": 0.1, **memory},
    }
    frame = {"device": "d", "date": "t", "versions": {}, "settings": {"workers": 2, "global_batch": 64}}
    table = long_log_table.long_log({**frame, "results": [line, {**line, "rows": 10**6, "made": True}]})
    assert "1,000 rows | 1,000,000 rows, made as tokens |" in table
    assert "| tokenise: rows/s | 500 |  |" in table and "| a step's data | 4.2 ms | 4.2 ms |" in table
    assert "| find the pairs of all steps | 2,000 of 15 steps in 2.0 s |" in table

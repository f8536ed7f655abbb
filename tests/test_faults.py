"""The sweep of faults counts what became of runs, and disturbs as it says."""

import random
from pathlib import Path

import fault_kinds
import faults
import figure_tables


def test_every_verdict_is_counted_once_and_what_was_lost_is_named():
    verdicts = [("survived", ""), ("near", ""), ("told", "error: x"), ("lost", "weights differ by 1")]
    (line, other) = faults.count(
        [*(("kill", verdict, steps) for steps, verdict in enumerate(verdicts)), ("cut", verdicts[0], 5)]
    )
    assert {name: line[name] for name in ("injected", "survived", "exact", "told", "lost")} == {
        "injected": 4,
        "survived": 2,
        "exact": 1,
        "told": 1,
        "lost": 1,
    }
    assert (line["steps_lost"], line["most_steps_lost"], line["notes"]) == (6, 3, ["weights differ by 1"])
    settings = {"steps": 10, "checkpoint_every": 2}
    said = figure_tables.faults_short({"results": [line, other], "settings": settings})
    assert said.startswith("5 faults of 2 kinds") and "sentence: 1; lost: 1." in said and "At most 5 steps" in said


def test_a_damage_is_one_bit_or_a_missing_end(tmp_path: Path):
    file, content = tmp_path / "file", bytes(range(256))
    for seed in range(20):
        file.write_bytes(content)
        fault_kinds.flip(file, random.Random(seed))
        pairs = zip(content, file.read_bytes(), strict=True)
        assert sum((a ^ b).bit_count() for a, b in pairs) == 1
        file.write_bytes(content)
        fault_kinds.cut_short(file, random.Random(seed))
        assert content.startswith(file.read_bytes()) and file.stat().st_size < len(content)

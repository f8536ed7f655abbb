"""The sweep of faults counts what became of runs, and disturbs as it says."""

import json
import random
from pathlib import Path

import fault_kinds
import faults
import figure_tables
import pytest
import records


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


def test_below_the_table_stands_what_was_refused_and_what_was_not_tried():
    content = json.loads((records.ROOT / "benchmarks" / "results" / "cpu-faults.json").read_text())
    zero = dict.fromkeys(("injected", "survived", "exact", "told", "lost", "steps_lost", "most_steps_lost"), 1)
    lines = [{"fault": kind.name, **zero, "told": 0} for kind in fault_kinds.KINDS]
    whole = figure_tables.faults({**content, "results": lines})
    assert "\n- Refused with a sentence: no run.\n" in whole and whole.endswith("which the system does not allow.")
    some = figure_tables.faults({**content, "results": [lines[0] | {"told": 2}, *lines[2:]]})
    assert f"\n- Refused with a sentence: {lines[0]['fault']} (2).\n" in some
    assert some.endswith(f"does not allow; {lines[1]['fault']}.")


class Played:
    """A run that makes so many steps between two looks at it: no machine is too busy to look in time."""

    def __init__(self, file: Path, steps: float):
        self.file, self.steps, self.looks = file, steps, 0

    def runs(self) -> bool:
        done = min(faults.STEPS, int(self.looks * self.steps))
        self.looks += 1
        self.file.unlink(missing_ok=True)
        self.file.write_text("".join(f'{{"step": {step + 1}, "loss": 0.5}}\n' for step in range(done)))
        return True


@pytest.mark.parametrize("steps", (2.5, 0.7, 0.2))
def test_moments_are_spread_over_all_steps_of_a_run_however_fast_it_is(tmp_path: Path, steps: float):
    """They once were seconds, and came after the end of a run that was faster than the one that was timed."""
    pace = faults.Pace(begin=0.002, step=0.002, end=0.004)
    trial = faults.Trial(folder=tmp_path, ranks=1, draw=random.Random(0), pace=pace)
    trial.output.mkdir(parents=True)
    found = []
    for _ in range(80):
        assert trial.wait_for_a_moment(Played(trial.output / "metrics.jsonl", steps))
        found.append(trial.steps_done())
        (trial.output / "metrics.jsonl").unlink()
    assert min(found) <= steps + 1 and max(found) == faults.STEPS
    assert sum(2 <= number < faults.STEPS for number in found) > 20


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

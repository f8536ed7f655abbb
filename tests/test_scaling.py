"""What `benchmarks/scaling.py` makes of its measurements, and of the planner's figures."""

import json
from pathlib import Path
from typing import Any

import peaks
import pytest
import scaling
import scaling_cases
import scaling_curves
import scaling_runs
import scaling_table
import torch
from click.testing import CliRunner


def line(case: str, seconds: float, computed: float, collectives: float = 0.0, **changes: object) -> dict[str, object]:
    about = {"case": case, "ranks": 1, "checkpoints": False, "memory": False, "bytes": 2**30, "computed_bytes": 2**29}
    return {**about, "seconds_per_step": seconds, "turns": [seconds], "as_computed": (computed, collectives), **changes}


def planned(line: dict[str, object], factor: float) -> tuple[float, float]:
    computed, collectives = line["as_computed"]
    return factor * (computed - collectives) + collectives, collectives


def test_a_run_at_one_rank_calibrates_the_others_and_what_two_ranks_take_beyond_it_is_no_compute():
    lines = [
        line("one rank", 2.0, 1.0),
        line("one rank, half the batch", 1.2, 0.5),
        line("two ranks, strong", 1.5, 0.9, 0.4, ranks=2),
        line("two nodes, weak", 2.5, 1.3, 0.3, ranks=2, turns=[2.4, 2.5, 2.75]),
        line("one rank, a checkpoint a step", 2.75, 1.0, checkpoints=True),
        line("ZeRO 3", 2.2, 1.0),
        line("two ranks, ZeRO 3, weak", 2.75, 1.3, 0.3, ranks=2),
    ]
    scaling.calibrate(lines, planned)
    assert [found["calibrated_seconds"] for found in lines] == pytest.approx([2.0, 1.0, 1.4, 2.3, 2.0, 2.0, 2.3])
    assert [found["computed_seconds"] for found in lines[:3]] == [1.0, 0.5, 0.9]
    assert lines[2]["no_compute"] == pytest.approx(1 - 1.2 / 1.5) and "no_compute" not in lines[0]
    assert lines[3]["no_compute"] == pytest.approx(1 - 2.0 / 2.5)
    assert lines[4]["checkpoint_seconds"] == pytest.approx(0.75)
    assert lines[6]["no_compute"] == pytest.approx(1 - 2.2 / 2.75)  # beside one rank of the same stage
    table = scaling_table.times({"device": "d", "date": "t", "settings": {"model": "tiny"}, "results": lines})
    assert (
        "| tiny | one rank | 2.000 | 1.00 |  |  |" in table
        and "| two nodes, weak | 2.500 (2.400 to 2.750) | 0.92 | 20% |" in table
    )


def test_runs_for_memory_are_no_times_and_stand_in_a_table_of_their_own():
    held, alone = line("ZeRO 2", 9.0, 1.0, memory=True), line("one rank", 2.0, 1.0)
    scaling.calibrate([alone], planned)
    files = [
        {"device": "d", "date": "t", "settings": {"model": name}, "results": found}
        for name, found in (("tiny", [held, alone]), ("135m", [{**held, "case": "ZeRO 3", "computed_bytes": 2**30}]))
    ]
    table = scaling_table.memory(*files)
    assert "| ZeRO 2 | 1,024 | 0.50 |  |  |" in table and "| ZeRO 3 |  |  | 1,024 | 1.00 |" in table
    assert "one rank" not in table and "ZeRO" not in scaling_table.times(*files)
    shown = scaling_table.gist(files[0])
    assert "1,024.0 MiB, computed 0.50 of it" in shown[0] and "2.0000 s, computed 1.00 of it" in shown[1]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Runs that were started: their names. They leave figures, and train nothing."""
    names: list[str] = []

    def run(config: Any, case: Any, folder: Path, steps: int, limit: float) -> dict[str, Any]:
        names.append(case.name)
        return {"seconds": [0.5] * (steps - 1), "peak_bytes": 2**24 if case.memory else None, "held_bytes": None}

    monkeypatch.setattr(scaling_runs, "run", run)
    monkeypatch.setattr(scaling_runs, "prepare", lambda: None)
    monkeypatch.setattr(scaling.machine, "has_gpu", lambda: False)
    return names


def test_parts_add_up_and_figures_are_computed_anew_without_a_run(tmp_path, ran):
    file = tmp_path / "found.json"
    words = ["--json", str(file), "--random-folder", str(tmp_path / "model"), "--steps", "2", "--global-batch", "4"]

    def scale(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(scaling.main, [*words, *more])
        assert done.exit_code == 0, done.output
        return json.loads(file.read_text())

    memory = ["--only", "memory", "--stages", "1,2", "--adapter-stages", ""]
    scale(*memory, "--case", "ZeRO 2")
    assert ran == ["ZeRO 2"]
    scale(*memory, "--most", "2")
    assert ran == ["ZeRO 2", "ZeRO 1", "ZeRO 1, checkpointing"]
    found = scale(*memory)
    assert ran[3:] == ["ZeRO 2, checkpointing"] and found["rates"] == {}
    assert all(each["computed_bytes"] > 0 and "computed_seconds" not in each for each in found["results"])
    # the name of a run for its time may be that of one for its memory
    found = scale("--only", "time", "--case", "ZeRO 2", "--case", "one rank")
    assert ran[4:] == ["one rank", "ZeRO 2"] and list(found["rates"]) == ["1"]
    assert [each["calibrated_seconds"] for each in found["results"][4:]] == pytest.approx([0.5, 0.5])
    before = found["results"]
    found["results"] = [{**each, "computed_bytes": 0.0, "seconds_per_step": 1.0} for each in before]
    file.write_text(json.dumps(found))
    found = scale("--again")
    assert len(ran) == 6 and found["results"][0]["computed_bytes"] == before[0]["computed_bytes"]
    assert found["results"][4]["calibrated_seconds"] == pytest.approx(1.0)
    other = CliRunner().invoke(scaling.main, [*words, *memory, "--max-length", "128"])
    assert other.exit_code == 1 and "another max_length" in other.output


def test_turns_alternate_and_the_median_of_their_medians_counts(tmp_path, ran, monkeypatch):
    speeds = iter([1.0, 4.0, 3.0, 5.0, 2.0, 9.0])

    def run(config: Any, case: Any, *_: object) -> dict[str, Any]:
        ran.append(case.name)
        speed = next(speeds)
        return {"seconds": [speed, speed, 99.0], "peak_bytes": None, "held_bytes": None}

    monkeypatch.setattr(scaling_runs, "run", run)
    file = tmp_path / "found.json"
    words = ["--json", str(file), "--only", "time", "--case", "one rank", "--case", "ZeRO 1", "--global-batch", "4"]
    for turns in ("1", "3"):  # the second start goes on
        done = CliRunner().invoke(scaling.main, [*words, "--turns", turns])
        assert done.exit_code == 0, done.output
    assert ran == ["one rank", "ZeRO 1"] * 3
    found = json.loads(file.read_text())["results"]
    assert [(each["case"], each["seconds_per_step"]) for each in found] == [("one rank", 2.0), ("ZeRO 1", 5.0)]
    assert found[1]["calibrated_seconds"] == pytest.approx(2.0, rel=0.2)


def test_memory_is_measured_of_every_way_to_train():
    cases = scaling_cases.memory_cases((0, 2), (3,), 16)
    assert [case.name for case in cases] == [
        "ZeRO 0, fp32",
        "ZeRO 0, fp32, checkpointing",
        "ZeRO 2",
        "ZeRO 2, checkpointing",
        "LoRA, ZeRO 3",
        "LoRA, ZeRO 3, checkpointing",
    ]
    config = scaling_cases.config_of(cases[-1], Path("m"), Path("t"), Path("f"), 64, 512)
    assert (config.adapter.type, config.deepspeed.zero_stage, config.model.gradient_checkpointing) == ("lora", 3, True)
    assert scaling_cases.config_of(cases[0], Path("m"), Path("t"), Path("f"), 64, 512).train.dtype == "fp32"


def test_a_peak_is_of_the_tensors_that_live_and_of_those_that_come_and_go():
    old, empty = torch.ones(2**22), torch.empty(2**26)
    others = peaks.Meter()
    others.begin()
    before = others.bytes() - 2**24  # whatever else this process holds
    assert before < empty.nbytes  # nothing was written to it
    meter = peaks.Meter(untouched=[2**26])
    meter.begin()
    first = torch.ones(2**23)
    del first
    second, bucket = torch.ones(2**22), torch.empty(2**24)
    # 16 MiB that lived, and 32 at the most beside them; `bucket` was named
    assert meter.bytes() - before == pytest.approx(48 * 2**20, rel=0.02)
    assert old.numel() + empty.numel() + second.numel() + bucket.numel()


def test_of_a_buffer_that_was_there_what_the_steps_write_to_counts():
    buffer = torch.ones(2**24)  # whoever had this memory before
    meter = peaks.Meter(untouched=[2**26])
    meter.begin()
    held = meter.held
    buffer[: 2**22] = 1.0
    assert meter.bytes() - held == pytest.approx(2**24, rel=0.02)
    assert not buffer[2**23]


def test_curves_say_that_they_are_computed_and_what_they_assume(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_curves, "GPUS", (1, 8, 4096))
    monkeypatch.setattr(scaling_curves, "KINDS", ("H100", "MI300X"))
    content = scaling_curves.curves()
    assert (
        content["computed"]
        and {"busy", "H100 matmul", "MI300X attention"} <= set(content["assumptions"])
        and json.dumps(content)
    )
    rates = {(found["gpu"], found["gpus"]): found["tokens_per_second_and_gpu"] for found in content["results"]}
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert "Computed, not measured" in scaling_table.curves({**content, "date": "t"})
    scaling_curves.draw(content, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000

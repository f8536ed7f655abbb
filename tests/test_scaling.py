"""What `benchmarks/scaling.py` makes of its measurements, and of the planner's figures."""

import json
from pathlib import Path

import peaks
import pytest
import scaling
import scaling_table
import torch


def line(case: str, seconds: float, computed: float, collectives: float = 0.0, **changes: object) -> dict[str, object]:
    about = {"case": case, "ranks": 1, "checkpoints": False, "memory": False, "bytes": 2**30, "computed_bytes": 2**29}
    times = {"seconds_per_step": seconds, "computed_seconds": computed, "computed_collectives": collectives}
    return {**about, **times, **changes}


def test_a_run_at_one_rank_calibrates_the_others_and_what_two_ranks_take_beyond_it_is_no_compute():
    lines = scaling.calibrated(
        [
            line("one rank", 2.0, 1.0),
            line("one rank, half the batch", 1.2, 0.5),
            line("two ranks, strong", 1.5, 0.9, 0.4, ranks=2),
            line("two nodes, weak", 2.5, 1.3, 0.3, ranks=2),
            line("one rank, a checkpoint a step", 2.75, 1.0, checkpoints=True),
        ]
    )
    assert [found["calibrated_seconds"] for found in lines] == pytest.approx([2.0, 1.0, 1.4, 2.3, 2.0])
    assert lines[2]["no_compute"] == pytest.approx(1 - 1.2 / 1.5) and "no_compute" not in lines[0]
    assert lines[3]["no_compute"] == pytest.approx(1 - 2.0 / 2.5)
    assert lines[4]["checkpoint_seconds"] == pytest.approx(0.75)
    table = scaling_table.times({"device": "d", "date": "t", "settings": {"model": "tiny"}, "results": lines})
    assert "| tiny | one rank | 2.000 | 1.00 |  |  |" in table and "| two nodes, weak | 2.500 | 0.92 | 20% |" in table


def test_runs_for_memory_are_no_times_and_stand_in_a_table_of_their_own():
    held = line("ZeRO 2", 9.0, 1.0, memory=True)
    lines = scaling.calibrated([held, line("one rank", 2.0, 1.0)])
    assert "calibrated_seconds" not in lines[0] and lines[1]["calibrated_seconds"] == 2.0
    files = [
        {"device": "d", "date": "t", "settings": {"model": name}, "results": found}
        for name, found in (("tiny", lines), ("135m", [{**held, "case": "ZeRO 3", "computed_bytes": 2**30}]))
    ]
    table = scaling_table.memory(*files)
    assert "| ZeRO 2 | 1,024 | 0.50 |  |  |" in table and "| ZeRO 3 |  |  | 1,024 | 1.00 |" in table
    assert "one rank" not in table and "ZeRO" not in scaling_table.times(*files)


def test_memory_is_measured_of_every_way_to_train():
    cases = scaling.memory_cases((0, 2), (3,), 16)
    assert [case.name for case in cases] == [
        "ZeRO 0, fp32",
        "ZeRO 0, fp32, checkpointing",
        "ZeRO 2",
        "ZeRO 2, checkpointing",
        "LoRA, ZeRO 3",
        "LoRA, ZeRO 3, checkpointing",
    ]
    config = scaling.config_of(cases[-1], Path("m"), Path("t"), Path("f"), 64, 512)
    assert (config.adapter.type, config.deepspeed.zero_stage, config.model.gradient_checkpointing) == ("lora", 3, True)
    assert scaling.config_of(cases[0], Path("m"), Path("t"), Path("f"), 64, 512).train.dtype == "fp32"


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


def test_curves_say_that_they_are_computed_and_what_they_assume(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "GPUS", (1, 8, 4096))
    monkeypatch.setattr(scaling, "KINDS", ("H100", "MI300X"))
    content = scaling.curves()
    assert content["computed"] and content["assumptions"]["matmul"] and json.dumps(content)
    rates = {(found["gpu"], found["gpus"]): found["tokens_per_second_and_gpu"] for found in content["results"]}
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert "Computed, not measured" in scaling_table.curves({**content, "date": "t"})
    scaling.draw(content, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000

"""What `benchmarks/scaling.py` makes of its measurements, and of the planner's figures."""

import json

import pytest
import scaling
import scaling_table


def line(case: str, seconds: float, computed: float, collectives: float = 0.0, **changes: object) -> dict[str, object]:
    about = {"case": case, "ranks": 1, "checkpoints": False, "bytes": 2**30, "computed_bytes": 2**29}
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
    table = scaling_table.scaling({"device": "d", "date": "t", "results": lines})
    assert "| one rank | 1.00 | 0.50 | 2.000 | 1.00 |  |  |" in table


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

"""What a log file gets instead of bars, and the seconds of each phase."""

import pytest

from kto_dist.base.console import Console


def test_a_log_file_gets_lines_while_the_work_goes_on_not_one_bar_at_its_end(capsys):
    now = iter([0.0, 0.5, 3.0, 11.0, 12.0, 13.0])
    with Console(clock=lambda: next(now)).steps("training", 0, 5) as show:
        for step in range(1, 6):
            show(step, f"loss {step}")
    # the first, the one more than ten seconds later, and the last
    assert capsys.readouterr().out.splitlines() == [
        "training: 1 of 5  loss 1",
        "training: 3 of 5  loss 3",
        "training: 5 of 5  loss 5",
    ]


def test_the_last_line_comes_once_however_often_the_end_is_told(capsys):
    with Console().progress("reference") as show:
        for done in (10, 20, 20):
            show(done, 20, 1.0, 1.0, 0.0)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "reference: 10 of 20",
        "reference: 20 of 20",
    ]


@pytest.mark.parametrize("terminal", (False, True))
def test_progress_tells_both_rates_and_the_time_that_is_left_as_handed_in(capsys, monkeypatch, terminal):
    """Rows are scored longest first, so what is left is not what the share of rows says."""
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")  # whatever runs the tests
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with Console().progress("reference") as show:
        show(250, 1000, 12.34, 5678.9, 3725.4)
    said = capsys.readouterr().out
    assert ("\x1b[" in said) == terminal
    for part in ("reference", "12.3 rows/s", "5,679 tokens/s", "1:02:05"):
        assert part in said
    assert ("250/1000" if terminal else "250 of 1,000") in said


def test_work_that_is_never_needed_shows_nothing(capsys):
    with Console().progress("reference"):
        pass
    assert capsys.readouterr().out == ""


def test_the_seconds_of_a_phase_add_up_over_its_visits():
    now = iter([0.0, 0.0, 5.0, 5.0, 7.0, 7.0, 8.0])
    console = Console(clock=lambda: next(now))
    for name in ("training", "evaluation", "training"):
        console.phase(name)
    console.end()
    assert console.seconds == {"training": pytest.approx(6.0), "evaluation": pytest.approx(2.0)}

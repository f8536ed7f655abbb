"""The page and plots of a run's folder: complete, safe to open, and made of whatever is there."""

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import browser
import pytest

from kto_dist.record.plots import PLOTS
from kto_dist.record.report import read_steps, show, write_report

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>window.pwned = 1</script>"
SPENT = {"seconds": 18.0, "tokens": 540, "mfu": 0.4}


def metrics(step: int) -> dict:
    record = {
        "step": step,
        "loss": 0.5 - step / 1000,
        "kl": 0.0,
        "kl_raw": -0.1,
        "grad_norm": 2.0,
        "learning_rate": 1e-6,
    }
    record |= {
        "rewards/desirable": step / 100,
        "rewards/margin": step / 50,
        "accuracy/all": 0.5,
        "accuracy/desirable": 0.6,
        "rewards/chosen": step / 100,
        "accuracy/pairs": 0.7,
    }
    return record | {"loss/desirable": 0.4, "tokens_per_second": 3000.0}


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(step: int) -> dict:
    return {"step": step, "loss": 0.5 - step / 1000, "accuracy/all": 0.5 + step / 500, "auc": 0.75, "rows": 64}


def sure(low: float, high: float, prompts: int = 200) -> dict:
    return {"value": (low + high) / 2, "low": low, "high": high, "method": "bootstrap", "prompts": prompts}


def last_evaluation() -> dict:
    beside = {
        "intervals": {"accuracy/all": sure(0.66, 0.74), "auc": sure(0.71, 0.79)},
        "reliability": [{"chance": 0.3, "desirable": 0.4, "low": 0.2, "high": 0.6, "rows": 32}],
        "histogram": {"edges": [-1.0, 0.0, 1.0], "desirable": [10, 22], "undesirable": [20, 12]},
        "slices": {"model": {"v<1>": {"rows": 40, "accuracy/all": sure(0.5, 0.7), "auc": 0.6}}},
    }
    return {**evaluation(100), **beside}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "first"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{**metrics(step), **SPENT} for step in range(1, 101)])
    write_lines(run / "health.jsonl", [{"step": 60, "rule": "flat", "stop": False, "message": f"step 60: {EVIL} " * 9}])
    write_lines(run / "heldout.jsonl", [evaluation(0), last_evaluation()])
    (run / "config.yaml").write_text("tracking:\n  uri: http://me:secret@host/\n")
    summary = {
        "training": {"loss": 0.40012345},
        "heldout": {"before": evaluation(0), "after": last_evaluation()},
        "data": {"train": {"desirable": 9000, "undesirable": 30, "fingerprint": "beef"}},
        "reference": {"fingerprint": "f00d", "scored": 12, "hits": 0},
        "world_size": 2,
        "seconds": {"reference": 360.0, "training": 50.0},
        "resumed_from": 90,
        "versions": {"python": "3.12", "version.torch": "2.9", "git_commit": "abc", "git_dirty": "true"},
        "export": "runs/first/export",
        "mlflow": {"uri": "http://me:secret@host/", "run_id": "r1"},
        "samples": [
            {"prompt": EVIL, "before": "No & never", "after": "Yes", "approved_before": False, "approved_after": True},
            {"prompt": "bare", "after": None},
        ],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(run)
    assert page == run / "report.html"
    return run, page.read_text(encoding="utf-8")


def test_every_plot_is_a_picture_in_the_folder_and_in_the_page(full: tuple[Path, str]) -> None:
    run, page = full
    names = {plot.name for plot in PLOTS}
    assert {path.stem for path in (run / "plots").iterdir()} == names
    assert all(path.read_bytes().startswith(PNG) for path in (run / "plots").iterdir())
    assert page.count("data:image/png;base64,") == 2 * len(names)  # light and dark
    assert all(plot.title in page for plot in PLOTS)
    assert page.count("How to read this:") == len(names)


def test_the_page_needs_nothing_from_elsewhere(full: tuple[Path, str]) -> None:
    sources = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'>\s]{0,30})""", full[1])
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in full[1] and "@import" not in full[1]


def test_text_of_the_model_is_escaped(full: tuple[Path, str]) -> None:
    assert EVIL not in full[1]
    assert "&lt;script&gt;" in full[1] and "No &amp; never" in full[1]


def test_passwords_are_masked(full: tuple[Path, str]) -> None:
    assert "secret" not in full[1]
    assert full[1].count("http://***@host/") == 2


def test_heldout_figures_stand_before_after_and_change(full: tuple[Path, str]) -> None:
    row = re.search(r"<th>accuracy/<wbr>all</th>(.*?)</tr>", full[1], re.S)
    assert row and re.findall(r">([^<>]+)<", row[1]) == ["0.5", "0.7", "0.66 to 0.74", "+0.2"]


def test_figures_before_training_have_their_intervals_too(tmp_path: Path) -> None:
    before = {**evaluation(0), "intervals": {"accuracy/all": sure(0.44, 0.56)}}
    write_lines(tmp_path / "heldout.jsonl", [before, last_evaluation()])
    row = re.search(r"<th>accuracy/<wbr>all</th>(.*?)</tr>", write_report(tmp_path).read_text(encoding="utf-8"), re.S)
    assert row and re.findall(r">([^<>]+)<", row[1]) == ["0.5", "0.44 to 0.56", "0.7", "0.66 to 0.74", "+0.2"]


def test_what_matters_stands_first_in_a_sentence_with_its_interval(full: tuple[Path, str]) -> None:
    found = re.search(r'id="verdict">(.*?)</div>', full[1], re.S)
    assert found and full[1].index('id="verdict"') < full[1].index("<table>")
    assert "accuracy on held-out thumbs 0.50 → 0.70 (0.66 to 0.74), AUC 0.75 → 0.75 (0.71 to 0.79)." in found[1]


def test_what_rules_of_health_said_is_a_timeline(tmp_path: Path) -> None:
    lines = [{"step": step, "rule": "flat", "stop": step == 9, "message": f"step {step}: {EVIL}"} for step in (3, 9)]
    write_lines(tmp_path / "health.jsonl", lines)
    write_lines(tmp_path / "metrics.jsonl", [{"step": step} for step in (1, 12)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    found = page[page.index('id="health"') :]
    assert re.findall(r"<th[^>]*>(warned|stopped)</th><td>(step \d)", found) == [
        ("warned", "step 3"),
        ("stopped", "step 9"),
    ]
    assert re.findall(r'<i class="(\w+)" style="left:([\d.]+)%"', found) == [("warned", "25.0"), ("stopped", "75.0")]
    assert EVIL not in page and "Watch: the run was stopped at step 9 (flat); health warned (flat)." in page


def test_a_page_says_what_the_run_cost(full: tuple[Path, str]) -> None:
    found = full[1][full[1].index('id="cost"') : full[1].index('id="again"')]
    rows = dict(re.findall(r"<tr><th>([^<]*)</th><td[^>]*>([^<]*)</td></tr>", found))
    # 100 steps of 18 s, of which the summary knows the last 50 s alone, and 360 s of the reference: 2 devices
    assert (rows["device hours"], rows["hours"], rows["devices"]) == ("1.2", "0.6", "2")
    assert (rows["tokens trained on"], rows["tokens / s while training"]) == ("54,000", "30")
    assert rows["mfu (share of the devices&#39; peak)"] == "0.4"
    phases = re.findall(r'<th>(\w+)</th><td><i style="width:([\d.]+)%"></i></td><td[^>]*>([\d,.]+)<', found)
    assert phases == [("training", "83.3", "1800"), ("reference", "16.7", "360")]
    assert "It went on from step 90" in found


def test_a_page_says_how_to_do_it_again(full: tuple[Path, str]) -> None:
    run, page = full
    found = page[page.index('id="again"') :]
    assert f"kto-dist train {run}/config.yaml train.output={run}-again\n" in found
    assert "git checkout abc   # which had changes" in found
    for what, value in (("torch", "2.9"), ("python", "3.12"), ("rows, tokenised", "beef"), ("reference", "f00d")):
        assert re.search(rf"<th>{what}</th><td>{value}</td>", found)


def test_a_run_that_goes_on_has_its_hours_and_no_devices(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{**metrics(step), "seconds": 18.0} for step in (1, 2)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"<th>hours</th><td[^>]*>0.01</td>", page) and "device hours" not in page
    assert 'id="again"' not in page


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WHY_NOT)
@pytest.mark.parametrize("width", (360, 412, 1200))
def test_in_a_browser_nothing_overflows_runs_or_fails(tmp_path: Path, full: tuple[Path, str], width: int) -> None:
    seen = browser.look(full[0] / "report.html", tmp_path, width)
    assert seen.visible == width and seen.needed <= width and not seen.too_wide, seen.too_wide
    assert not seen.scrolled
    assert seen.loaded == seen.pictures == len(PLOTS)
    assert not seen.pwned and not seen.console


def test_slices_stand_with_their_intervals(full: tuple[Path, str]) -> None:
    row = re.search(r"<th>v&lt;1&gt;</th>(.*?)</tr>", full[1], re.S)
    assert row and re.findall(r">([^<>]+)<", row[1]) == ["40", "0.6", "0.50 to 0.70", "0.6"]


def test_samples_stand_side_by_side_with_their_verdicts(full: tuple[Path, str]) -> None:
    assert len(re.findall(r'class="card sample"', full[1])) == 2
    assert full[1].count("✗ not approved") == 1
    assert full[1].count("✓ approved") == 1


def test_nested_facts_are_listed_by_dotted_name(full: tuple[Path, str]) -> None:
    for key, value in (("train.desirable", "9,000"), ("fingerprint", "f00d"), ("loss", "0.4001")):
        assert re.search(rf"<th>{key}</th><td[^>]*>{value}</td>", full[1])


def test_an_empty_folder_makes_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "no recorded steps yet" in page
    assert "<img" not in page


def test_one_step_makes_plots(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [metrics(1)])
    assert "1 recorded step," in write_report(tmp_path).read_text(encoding="utf-8")
    of_evaluations = {"histogram", "reliability"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {plot.name for plot in PLOTS} - of_evaluations


def test_a_metric_that_was_never_recorded_has_no_plot(tmp_path: Path) -> None:
    # apo_zero_unpaired has no z0
    records = [{"step": step, "loss": 0.5, "grad_norm": math.nan} for step in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", records)
    write_report(tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_evaluations_stand_in_for_a_summary_of_a_run_that_still_goes(tmp_path: Path) -> None:
    write_lines(tmp_path / "heldout.jsonl", [evaluation(0), evaluation(50), evaluation(100)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"<th>accuracy/<wbr>all</th><td[^>]*>0.5</td><td[^>]*>0.7</td>", page)


@pytest.mark.parametrize(
    "summary",
    [
        "not json",
        "[1, 2]",
        {"heldout": None, "samples": None, "data": []},
        {"heldout": {"before": None, "after": {"loss": 0.1, "note": "text"}}},
        {"heldout": {"loss": 0.2}, "samples": ["text", {"prompt": [{"role": "user", "content": "hi"}]}]},
        {"training": {"loss": math.nan, "list": [1, {"a": 2}], "empty": {}}, "seconds": 12.5, "done": True},
    ],
)
def test_an_odd_summary_still_makes_a_page(tmp_path: Path, summary: object) -> None:
    (tmp_path / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_repeated_step_counts_once_and_a_cut_off_line_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1, "loss": 9}, {"step": 2, "loss": 9}, {"step": 3, "loss": 3}, {"step": 2, "loss": 2}])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [(record["step"], record["loss"]) for record in read_steps(path)] == [(1, 9), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (-0.0, "0"),
        (1234567, "1,234,567"),
        (0.000012345, "1.234e-05"),
        (12345.6, "12,346"),
        ("", "–"),
    ],
)
def test_values_are_shown_for_people(value: object, shown: str) -> None:
    assert show(value) == shown


def test_a_failed_write_leaves_the_last_page_whole(tmp_path: Path) -> None:
    before = write_report(tmp_path).read_bytes()
    (tmp_path / "summary.json").write_text('{"done": true}')

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes a file
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "report.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "summary.json", "plots"}


def test_a_report_leaves_pyplot_and_mlflow_alone() -> None:
    code = "import sys, kto_dist.record.report; print([n for n in ('matplotlib.pyplot', 'mlflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

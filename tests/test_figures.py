"""Tables of figures in the documents are those of the results, and what became slower is said."""

import json
from pathlib import Path

import figure_tables
import figures
import pytest
import records
import trainers

DOCUMENTS = {str(path.relative_to(records.ROOT)): path for path in figures.documents()}
RESULTS = sorted(figures.RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_figures_of_a_document_are_those_of_its_results(name):
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    assert figures.rewritten(text) == text, "run `make figures`"


def test_every_result_that_makes_a_table_is_shown_in_a_document():
    shown = set().union(*(figures.shown_in(path.read_text(encoding="utf-8")) for path in DOCUMENTS.values()))
    tables = {file.stem for file in RESULTS if json.loads(file.read_text()).get("benchmark") in figures.KINDS}
    assert tables <= shown


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_result_says_where_when_and_with_what_it_was_measured(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["device"] and content["date"] and content["versions"] and "commit" in content["code"]


def feedback(folder: Path, seconds: float, **changes: object) -> dict:
    """Writes a result of mining where the one before stands."""
    content = records.frame("feedback", {}) | {
        "threads": 2,
        "memory_mebibytes": 4096,
        "results": [{"rows": 1000, "seconds": seconds, "log_bytes": 2**30, "peak_bytes": 2**30}],
        **changes,
    }
    records.write_json(folder / "cpu-feedback.json", content)
    return json.loads((folder / "cpu-feedback.json").read_text())


def earlier(folder: Path, seconds: float, **changes: object) -> None:
    """As another process wrote it."""
    content = feedback(folder / "elsewhere", seconds, date="2026-01-02", **changes)
    (folder / "cpu-feedback.json").write_text(json.dumps(content))


TEXT = "before\n<!-- figures: feedback cpu-feedback -->\n{}<!-- end -->\nafter\n"


def test_a_figure_that_somebody_typed_is_put_back(tmp_path):
    feedback(tmp_path, 20.0)
    written = figures.rewritten(TEXT.format(""), tmp_path)
    assert "| 1,000 | 1.00 GiB | 20 | 50 | 1.00 GiB |" in written
    assert written.startswith("before\n<!-- figures") and written.endswith("<!-- end -->\nafter\n")
    assert figures.rewritten(written.replace("| 50 |", "| 60 |"), tmp_path) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("feedback cpu", "feedbag cpu"), "no figures of kind feedbag"),
        (TEXT.replace("cpu-feedback", "gpu-feedback"), "no result gpu-feedback: there are cpu-feedback"),
        (TEXT.replace("<!-- end -->", ""), "no end"),
    ],
)
def test_a_block_that_cannot_be_written_is_refused(tmp_path, text, message):
    feedback(tmp_path, 20.0)
    with pytest.raises(figures.FigureError, match=message):
        figures.rewritten(text.format(""), tmp_path)


def test_a_loss_above_five_per_cent_on_the_same_device_is_marked_with_its_date(tmp_path):
    earlier(tmp_path, 20.0)
    content = feedback(tmp_path, 25.0)
    assert records.losses(content) == {("1000",): pytest.approx(0.2)}
    written = figures.rewritten(TEXT.format(""), tmp_path)
    assert "| 25 ▼ 20% |" in written and "than on 2026-01-02" in written


@pytest.mark.parametrize(
    ("benchmark", "name"), [("demo", "cpu-demo"), ("profile", "nvidia-h200-profile"), ("sweep", "cpu-sweep")]
)
def test_results_of_one_figure_and_of_sweeps_are_marked_as_well(tmp_path, benchmark, name):
    content = json.loads((figures.RESULTS / f"{name}.json").read_text())
    content.pop("previous", None)
    file = tmp_path / f"{name}.json"
    block = f"<!-- figures: {benchmark} {name} -->\n<!-- end -->\n"
    faster = json.loads(json.dumps(content))
    if benchmark == "demo":
        faster["seconds"]["all"] *= 0.8
    elif benchmark == "profile":
        faster["seconds_per_step"] *= 0.8
    else:
        faster["results"][0]["seconds"] *= 0.8
    file.write_text(json.dumps(faster | {"date": "2026-01-02"}))
    assert "▼" not in figures.rewritten(block, tmp_path)
    records.write_json(file, content)
    written = figures.rewritten(block, tmp_path)
    assert written.count("▼ 20%") == 1 and "▼: so much slower than on 2026-01-02." in written


@pytest.mark.parametrize(
    ("before", "change"),
    [(24.5, {}), (30.0, {}), (20.0, {"device": "another"}), (20.0, {"settings": {"rows": 1}})],
    ids=["4 % more", "faster", "another device", "another job"],
)
def test_what_is_within_five_per_cent_or_of_another_device_or_job_is_not_marked(tmp_path, before, change):
    earlier(tmp_path, before, **change)
    assert records.losses(feedback(tmp_path, 25.0)) == {}


def test_a_run_that_writes_its_result_again_and_again_is_compared_with_the_run_before(tmp_path):
    earlier(tmp_path, 20.0)
    feedback(tmp_path, 30.0)
    assert records.losses(feedback(tmp_path, 25.0)) == {("1000",): pytest.approx(0.2)}


def test_a_table_of_adapters_says_so_and_who_holds_the_base_in_bf16():
    assert trainers.names_for("none") == ("kto_dist", "trl", "bare") and "trl-bf16" in trainers.names_for("lora")
    line = {
        "rows_per_second": 2.0,
        "tokens_per_second": 9.0,
        "seconds_per_step": 1.0,
        "peak_bytes": 2**30,
        "runs": [2.0],
    }
    results = [
        line | {"phase": phase, "implementation": name}
        for phase in ("training", "reference")
        for name in ("kto_dist", "trl-bf16")
    ]
    settings = {"model": "135m", "log": "mixed", "dtype": "bf16", "global_batch": 8, "repeats": 1, "steps": 2}
    settings |= {"training_tokens": 100, "training_rows": 10}
    content = records.frame("throughput", settings) | {"results": results}
    assert "TRL, no master weights" in figure_tables.throughput(content)
    content["settings"] |= {"adapter": "lora", "rank": 16}
    text = figure_tables.throughput(content)
    assert "LoRA of rank 16 on all layers but the head" in text and "| TRL, base in bf16 | 2.00 |" in text


def test_losses_of_others_are_not_marked():
    lines = [
        {"implementation": name, "phase": "training", "rows_per_second": 1.0}
        for name in ("kto_dist", "kto_dist-sdpa", "trl", "bare")
    ]
    before = {f"training {line['implementation']}": 2.0 for line in lines}
    content = {"benchmark": "throughput", "results": lines, "previous": {"date": "2026-01-02", "values": before}}
    assert set(records.losses(content)) == {("training", "kto_dist"), ("training", "kto_dist-sdpa")}


def test_a_result_of_other_code_is_called_outdated(tmp_path):
    content = feedback(tmp_path, 20.0)
    assert records.outdated(content) is None
    content["code"]["digests"]["kernels"] = "other"
    assert records.outdated(content) is None
    content["code"]["digests"]["feedback"] = "other"
    assert records.outdated(content) == "feedback"


def test_rows_of_several_lengths_make_a_table_and_a_picture(tmp_path):
    lines = [
        {
            "rows": kind,
            "tokens_per_row": tokens,
            "phase": "training",
            "implementation": name,
            "rows_per_second": 1000 / tokens,
            "peak_bytes": tokens * 2**20,
        }
        for kind, tokens in (("short-chats", 128), ("long-answers", 512))
        for name in ("kto_dist", "trl")
    ]
    settings = {"model": "135m", "dtype": "bf16", "global_batch": 8}
    content = records.frame("lengths", settings) | {"results": lines}
    assert "| long answers | 512 | 1.95 | 0.5 | 1.95 | 0.5 |" in figure_tables.lengths(content)
    figure_tables.draw_lengths(content, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

"""A mined dataset trains a better model than the log it came of, and the run keeps the audit of its data.

Two tiny models start from the same weights and take as many steps of as many rows: one on the log as it is, a row a
vote, the other on the dataset that `mine` makes of it with its defaults. Both are scored on answers of another draw,
labelled by the rule that is the truth of the generator. In the log, eight of 68 users give half of the votes and press
the opposite thumb; the others slip 15 % of the time.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from audits import mining_config
from feedback_log import Generated, generate
from ranks import run_ranks
from tiny import write_jsonl
from tiny_runs import tiny_config, train_all

from kto_dist.base.files import sha256_of
from kto_dist.feedback import mine

LOG: dict[str, Any] = {"votes": 2500, "prompts": 100, "users": 60, "noise": 0.15}
CRITICS: dict[str, Any] = {"critics": 8, "critic_votes": 350, "contrary": True}


def as_rows(log: Generated, truth: bool) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
            "label": log.good[row["response"]] if truth else row["feedback"] == "up",
        }
        for row in log.rows
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder, and the summaries of the runs on the raw log and on the dataset."""
    folder = tmp_path_factory.mktemp("trained")
    log = generate(**LOG, **CRITICS, seed=1)
    mine(mining_config(folder, log.write(folder / "log.jsonl"), audit={"min_alpha": 0.9}))
    other = generate(votes=300, prompts=60, noise=0.0, seed=2)
    settings = {
        "data__heldout": str(write_jsonl(folder / "heldout.jsonl", as_rows(other, truth=True))),
        "train__max_steps": 30,
        "train__global_batch": 32,
        "train__tokens_per_microbatch": 4096,
    }
    raw = write_jsonl(folder / "raw.jsonl", as_rows(log, truth=False))
    mlflow = {"tracking__enabled": True, "tracking__uri": f"sqlite:///{folder / 'mlflow.db'}"}
    configs = [
        tiny_config(folder, tiny_model, raw, train__output=str(folder / "on-log"), **settings),
        tiny_config(
            folder,
            tiny_model,
            folder / "mined" / "train.parquet",
            train__output=str(folder / "on-dataset"),
            **settings,
            **mlflow,
        ),
    ]
    ((on_log, on_dataset),) = run_ranks(train_all, 1, configs)
    return folder, on_log, on_dataset


def test_cleaning_restores_held_out_accuracy(trained):
    _, on_log, on_dataset = trained
    before, after = (run["heldout"]["after"] for run in (on_log, on_dataset))
    # over four seeds of the log, AUC was 0.09 to 0.46 before and 0.85 to 0.90 after; balanced accuracy 0.18 to 0.46
    # before and 0.74 to 0.79 after
    assert after["auc"] > 0.75 and before["auc"] < 0.65, (before["auc"], after["auc"])
    assert balanced(after) > balanced(before) + 0.1, (balanced(before), balanced(after))


def balanced(figures: dict[str, float]) -> float:
    """Accuracy that a guess of the commoner class does not raise."""
    return (figures["accuracy/desirable"] + figures["accuracy/undesirable"]) / 2


def test_the_run_keeps_the_audit_of_its_data(trained):
    from mlflow import MlflowClient

    folder, _, on_dataset = trained
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(on_dataset["mlflow"]["run_id"])
    kept = {Path(entry.path).name: entry.path for entry in client.list_artifacts(run.info.run_id, "audit")}
    assert set(kept) == {"audit.json", "report.html"}
    for name, path in kept.items():
        copy = client.download_artifacts(run.info.run_id, path, str(folder))
        assert Path(copy).read_bytes() == (folder / "mined" / name).read_bytes()


def test_run_and_dataset_lead_to_the_audit_by_fingerprint(trained):
    from mlflow import MlflowClient

    folder, _, on_dataset = trained
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(on_dataset["mlflow"]["run_id"])
    fingerprint = on_dataset["data"]["train"]["fingerprint"]
    file = sha256_of(folder / "mined" / "train.parquet")
    (training,) = [entry for entry in run.inputs.dataset_inputs if entry.dataset.name == "training"]
    tags = {tag.key: tag.value for tag in training.tags}
    assert run.data.tags["dataset_fingerprint"] == tags["digest"] == fingerprint
    assert run.data.tags["audit.files"] == tags["audit.files"] == file
    described = json.loads((folder / "mined" / "audit.json").read_text())["files"]
    assert file in {entry["sha256"] for entry in described}
    found = client.search_runs([run.info.experiment_id], f"tags.`audit.files` = '{file}'")
    assert [entry.info.run_id for entry in found] == [run.info.run_id]


def test_the_summary_says_what_the_audit_found(trained):
    _, on_log, on_dataset = trained
    assert on_log["data"]["audits"] == []
    (audit,) = on_dataset["data"]["audits"]
    assert any("Krippendorff" in line and "wanted: 0.9" in line for line in audit["failed"])

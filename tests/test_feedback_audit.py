"""The audit recovers what is known of a generated log, and its files are the same however the log is read."""

import base64
import json
import re
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audits import SALT, mining_config
from feedback_log import START, Generated, generate

from kto_dist.base.files import sha256_of
from kto_dist.feedback import audit_log, mine


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Generated, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mined")
    log = generate(
        critics=4,
        critic_votes=80,
        noise=0.1,
        exact_copies=0.05,
        drift=-0.4,
        models={"v1": -0.15, "v2": 0.15},
        seed=3,
    )
    mine(mining_config(folder, log.write(folder / "log.jsonl")))
    return folder / "mined", log, json.loads((folder / "mined" / "audit.json").read_text(encoding="utf-8"))


def once(log: Generated) -> list[dict[str, Any]]:
    """The rows without the copies."""
    return list({(row["user_id"], row["response"]): row for row in log.rows}.values())


def test_copies_are_counted_exactly(mined):
    _, log, found = mined
    step = next(step for step in found["steps"] if step["step"] == "exact_duplicate")
    assert step["up_removed"] + step["down_removed"] == log.exact_copies
    assert found["log"]["votes"] == len(log.rows)
    assert found["log"]["judgements"] == len(log.rows) - log.exact_copies


def test_the_error_rate_of_votes_is_recovered(mined):
    _, log, found = mined
    truth = log.wrong_votes / log.honest_votes
    # without the critics, whose votes are no slips
    assert found["agreement"]["noise_without_critics"] == pytest.approx(truth, abs=0.02)
    assert found["agreement"]["noise"]["value"] > truth + 0.02
    assert (
        found["agreement"]["noise"]["low"] < found["agreement"]["noise"]["value"] < found["agreement"]["noise"]["high"]
    )


def test_exactly_the_critics_are_named(mined):
    _, log, found = mined
    votes = Counter(row["user_id"] for row in once(log))
    downs = Counter(row["user_id"] for row in once(log) if row["feedback"] == "down")
    named = sorted((user["votes"], user["downvotes"]) for user in found["users"]["top"] if user["named"])
    assert named == sorted((votes[user], downs[user]) for user in log.critics)
    assert found["users"]["named"] == 4


def test_critics_are_overruled_by_the_others_and_steer_the_dataset_less(mined):
    _, _, found = mined
    for user in found["users"]["top"]:
        if user["named"]:
            # most answers are good, and nine in ten votes say so
            assert user["overruled"] > 0.5
            assert user["loss_after"] < user["loss_before"] / 2
    assert found["users"]["named_loss_after"] < found["users"]["named_loss_before"] / 2
    assert found["users"]["effective_after"] > found["users"]["effective_before"]


def test_shares_of_users_are_those_counted_by_hand(mined):
    _, log, found = mined
    votes = Counter(row["user_id"] for row in once(log))
    most = max(votes.values())
    assert found["users"]["users"] == len(votes)
    assert found["users"]["top_votes"]["1"] == pytest.approx(most / sum(votes.values()))
    ordered = sorted(votes.values())
    count, total = len(ordered), sum(ordered)
    by_hand = sum((2 * rank - count - 1) * value for rank, value in enumerate(ordered, 1)) / (count * total)
    assert found["users"]["gini_votes"] == pytest.approx(by_hand)


def test_shares_of_downvotes_are_those_counted_by_hand(mined):
    _, log, found = mined
    users = found["users"]
    votes = Counter(row["user_id"] for row in once(log))
    downs = Counter(row["user_id"] for row in once(log) if row["feedback"] == "down")
    assert users["top_downvotes"]["1"] == pytest.approx(max(downs.values()) / downs.total())
    ordered = sorted(downs[user] for user in votes)
    count = len(ordered)
    by_hand = sum((2 * rank - count - 1) * value for rank, value in enumerate(ordered, 1)) / (count * downs.total())
    assert users["gini_downvotes"] == pytest.approx(by_hand) and abs(by_hand - users["gini_votes"]) > 0.02
    # the named are the critics, by a test of its own
    assert users["named_votes"] == pytest.approx(sum(votes[user] for user in log.critics) / votes.total())
    assert users["named_downvotes"] == pytest.approx(sum(downs[user] for user in log.critics) / downs.total())
    assert users["named_downvotes"] > users["named_votes"] + 0.02
    for user in users["top"]:
        assert user["share_of_votes"] == pytest.approx(user["votes"] / votes.total())
        assert user["share_of_downvotes"] == pytest.approx(user["downvotes"] / downs.total())
    # of the others each rate lies near the log's
    others = votes.keys() - log.critics
    rate = sum(downs[user] for user in others) / sum(votes[user] for user in others)
    assert users["usual_down_rate"] == pytest.approx(rate, abs=0.05)


def test_near_copies_are_recovered(tmp_path):
    # long answers: of short ones a sign at the end is much, by the shingles that it changes
    log = generate(votes=2000, prompts=100, words_each=(40, 60), near_copies=0.15, noise=0.0, seed=4)
    # of each pair that was voted on, the one with fewer votes leaves
    votes = Counter(row["response"] for row in log.rows)
    pairs = [(votes[text], votes[f"{text}!"]) for text in votes if f"{text}!" in votes]
    expected = sum(min(pair) for pair in pairs)
    assert log.near_copies - 10 <= len(pairs) <= log.near_copies
    found = mine(mining_config(tmp_path, log.write(tmp_path / "log.jsonl")))
    (step,) = [step for step in found["steps"] if step["step"] == "near_duplicate"]
    assert step["up_removed"] + step["down_removed"] == pytest.approx(expected, rel=0.05)


def test_answers_judged_both_ways_are_those_counted_by_hand(mined):
    _, log, found = mined
    kinds = defaultdict(Counter)
    for row in once(log):
        kinds[row["prompt"], row["response"]][row["feedback"]] += 1
    split = [counts for counts in kinds.values() if len(counts) == 2]
    assert found["conflicts"]["responses"] == found["agreement"]["split"] == len(split)
    assert found["conflicts"]["votes"] == sum(counts.total() for counts in split)
    assert found["agreement"]["responses"] == sum(counts.total() > 1 for counts in kinds.values())
    worst = found["conflicts"]["samples"][0]
    hardest = max(min(counts.values()) for counts in split)
    assert min(worst["votes_up"], worst["votes_down"]) == hardest


def test_drift_is_recovered_by_week_and_by_model(mined):
    _, log, found = mined
    weeks, models = defaultdict(Counter), defaultdict(Counter)
    for row in once(log):
        day = datetime.fromisoformat(row["created_at"][:-1])
        weeks[(day - START).days // 7][row["feedback"]] += 1
        models[row["model"]][row["feedback"]] += 1
    assert [(period["up"], period["down"]) for period in found["drift"]["periods"]] == [
        (weeks[week]["up"], weeks[week]["down"]) for week in sorted(weeks)
    ]
    assert found["drift"]["weeks"]["p_value"] < 1e-6
    # 0.4 of good_share from first to last week, dimmed by slips (0.8) and by the critics
    first, last = found["drift"]["periods"][0]["up_share"], found["drift"]["periods"][-1]["up_share"]
    assert first["value"] - last["value"] == pytest.approx(0.4 * 0.8, abs=0.1)
    assert {group["name"]: (group["up"], group["down"]) for group in found["drift"]["models"]} == {
        name: (counts["up"], counts["down"]) for name, counts in models.items()
    }
    gap = models["v2"]["up"] / models["v2"].total() - models["v1"]["up"] / models["v1"].total()
    assert abs(found["drift"]["by_model"]["largest_gap"]) == pytest.approx(gap)
    assert {check["name"] for check in found["checks"] if check["status"] == "warn"} >= {
        "drift_by_week",
        "drift_by_model",
    }


def test_the_dataset_has_as_many_wrong_labels_as_the_audit_expects_and_fewer_than_the_log(mined):
    folder, log, found = mined
    wrong = total = 0
    for split in ("train", "heldout"):
        for row in pq.read_table(folder / f"{split}.parquet").to_pylist():
            wrong += row["label"] != log.good[row["completion"][0]["content"]]
            total += 1
    assert wrong / total == pytest.approx(found["agreement"]["wrong_labels"], abs=0.02)
    in_log = sum((row["feedback"] == "up") != log.good[row["response"]] for row in log.rows) / len(log.rows)
    assert wrong / total < in_log / 2
    assert found["balance"]["dataset"]["up"] + found["balance"]["dataset"]["down"] == total


def test_wrong_labels_of_a_balanced_dataset_are_those_of_its_rows(tmp_path):
    log = generate(good_share=0.9, votes=3000, prompts=400, seed=5)
    mine(mining_config(tmp_path, log.write(tmp_path / "log.jsonl"), balance={"target_up_share": 0.5}))
    found = json.loads((tmp_path / "mined" / "audit.json").read_text(encoding="utf-8"))
    rows = [row for file in found["files"] for row in pq.read_table(tmp_path / "mined" / file["name"]).to_pylist()]
    assert found["balance"]["dataset"]["up_share"] == pytest.approx(0.5, abs=0.01)
    weight = sum(row["weight"] for row in rows)
    wrong = sum(row["weight"] * (row["label"] != log.good[row["completion"][0]["content"]]) for row in rows)
    assert found["agreement"]["wrong_labels"] == pytest.approx(wrong / weight, abs=0.04)


def test_the_audit_describes_its_files_by_content(mined):
    folder, _, found = mined
    assert {file["name"]: file["sha256"] for file in found["files"]} == {
        path.name: sha256_of(path) for path in folder.glob("*.parquet")
    }


def test_neither_raw_ids_nor_the_salt_are_in_any_output(mined):
    folder, log, _ = mined
    ids = {row["user_id"] for row in log.rows}
    private = [SALT, *ids, *(name.split("@")[0] + "@" for name in ids)]
    for path in folder.iterdir():
        content = shown_by(path)
        assert len(content) > 1000 and not [name for name in private if name in content], path


def shown_by(path: Path) -> str:
    """All text of a file: of Parquet its metadata and values, of a page its pictures too (their letters are paths,
    but names and titles would be text)."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return f"{pq.read_metadata(path).metadata} {table.schema} {table.to_pylist()}"
    text = path.read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", text)
    assert bool(pictures) == (path.suffix == ".html")
    return "\n".join([text, *(base64.b64decode(picture).decode() for picture in pictures)])


def test_a_raw_id_in_any_kind_of_output_would_be_seen(mined, tmp_path):
    secret = "anna@example.org"
    pq.write_table(pa.table({"models": [[secret]]}), tmp_path / "leak.parquet", compression="zstd")
    picture = base64.b64encode(f"<svg><text>{secret}</text></svg>".encode()).decode()
    (tmp_path / "leak.html").write_text(f'<img src="data:image/svg+xml;base64,{picture}">')
    (tmp_path / "leak.json").write_text(secret)
    assert all(secret in shown_by(path) for path in tmp_path.iterdir())


def test_the_same_log_gives_the_same_files_on_any_threads_and_in_any_order_of_files(tmp_path):
    log = generate(votes=1200, prompts=80, critics=2, critic_votes=60, exact_copies=0.05, near_copies=0.1, seed=6)
    lines = log.write(tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = []
    for number in range(3):
        files.append(tmp_path / f"part-{number}.jsonl")
        files[-1].write_text("".join(lines[number::3]), encoding="utf-8")
    outputs = []
    for threads, order in ((1, files), (4, files[::-1])):
        settings = mining_config(
            tmp_path,
            files[0],
            input={"files": [str(file) for file in order]},
            resources={"work": str(tmp_path / "work"), "threads": threads, "memory_mebibytes": 512},
            output={"folder": str(tmp_path / f"mined-{threads}")},
        )
        mine(settings)
        folder = tmp_path / f"mined-{threads}"
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    one, other = outputs
    assert set(one) == {"train.parquet", "heldout.parquet", "audit.json", "report.html"} == set(other)
    assert one["train.parquet"] == other["train.parquet"] and one["heldout.parquet"] == other["heldout.parquet"]
    found = [json.loads(output["audit.json"]) for output in outputs]
    for audit_of_run in found:
        # which files, threads and folder were asked for
        del audit_of_run["settings"]
    assert found[0] == found[1]


def test_every_key_of_the_audit_is_documented(mined):
    text = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")

    def keys(value: Any, free: frozenset[str] = frozenset({"settings", "top_votes", "top_downvotes"})) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        below = (keys(item) for name, item in value.items() if name not in free)
        return set(value).union(*below)

    assert not [name for name in keys(mined[2]) if f"`{name}`" not in text]


def test_an_output_folder_in_the_home_is_found_by_the_audit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    log = generate(votes=300, prompts=20, users=20).write(tmp_path / "log.jsonl")
    audit_log(mining_config(tmp_path, log, output={"folder": "~/mined"}))
    assert (tmp_path / "home" / "mined" / "audit" / "audit.json").is_file() and not (tmp_path / "~").exists()

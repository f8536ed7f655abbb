"""The audit recovers what is known of a generated log, and each threshold that fails says what to do."""

import base64
import json
import re
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from feedback_log import START, Generated, fill, generate, vote

from kto_dist.base.config import build
from kto_dist.base.files import sha256_of
from kto_dist.commands import cli
from kto_dist.data.audited import line_of
from kto_dist.feedback import MiningConfig, audit_log, mine
from kto_dist.feedback.audit import NO_JUDGEMENT, audit
from kto_dist.feedback.findings import Audit
from kto_dist.feedback.report import page, write_audit
from kto_dist.feedback.votes import STEPS

COLUMNS = {
    "prompt": "prompt",
    "response": "response",
    "feedback": "feedback",
    "user": "user_id",
    "time": "created_at",
    "model": "model",
}
SALT = "a-secret-salt"


def mining_config(folder: Path, log: Path, **sections: Any) -> MiningConfig:
    tree: dict[str, Any] = {
        "input": {"files": [str(log)]},
        "columns": COLUMNS,
        "users": {"salt": SALT},
        "output": {"folder": str(folder / "mined")},
        "resources": {"work": str(folder / "work"), "threads": 2},
    }
    return build(
        {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}, kind=MiningConfig
    )


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


@pytest.mark.parametrize("up_share", [0.2, 0.55, 0.9])
def test_the_recommended_weights_are_those_that_auto_chooses(up_share):
    votes = [vote(f"a{n}", n < 200 * up_share, f"u{n % 20}", prompt=f"q{n}", weight=1 - n % 2 / 2) for n in range(200)]
    found = audited(votes, audit=LOOSE).balance
    up, down = (sum(entry["weight"] for entry in votes if entry["label"] == label) for label in (True, False))
    assert (found.train_weight_up, found.train_weight_down) == pytest.approx((up, down))
    # Eq. 8: the rarer class is raised until the ratio is in [1, 1.5]
    raised = {0.2: (down / up, 1.0), 0.55: (1.0, 1.0), 0.9: (1.0, up / down / 1.5)}[up_share]
    assert (found.desirable_weight, found.undesirable_weight) == pytest.approx(raised)
    assert found.weighted_ratio == pytest.approx(raised[0] * up / (raised[1] * down))
    assert 1 - 1e-9 <= found.weighted_ratio <= 1.5 + 1e-9


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


# Small logs as tables.


def config(**sections: Any) -> MiningConfig:
    return build({"input": {"files": ["log.jsonl"]}, "columns": COLUMNS, **sections}, kind=MiningConfig)


def audited(votes: list[dict[str, Any]], **sections: Any) -> Audit:
    with duckdb.connect() as connection:
        fill(connection, votes)
        return audit(connection, config(**sections))


def crowd(
    responses: int = 60, voters: int = 3, users: int = 25, up: float = 0.6, **changes: Any
) -> list[dict[str, Any]]:
    """Users who always agree."""
    return [
        vote(
            f"answer {number:03}",
            number < up * responses,
            f"u{(number * voters + place) % users}",
            prompt=f"question {number}",
            day=(number * 7) % 28,
            model=f"v{number % 2}",
            **changes,
        )
        for number in range(responses)
        for place in range(voters)
    ]


def status(found: Audit) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


LOOSE = {"min_rows": 10}


def test_a_clean_log_passes_every_check():
    found = audited(crowd(responses=100), audit=LOOSE, balance={"deployment_up_share": 0.6})
    assert set(status(found).values()) == {"pass"}, found.checks
    assert len(found.checks) == 10, status(found)
    assert found.agreement.alpha.value == 1 and found.agreement.noise.value == 0 and found.agreement.wrong_labels < 0.01


def failing(found: Audit, name: str) -> str:
    check = next(check for check in found.checks if check.name == name)
    assert check.status == "warn", check
    assert check.remedy and line_of(asdict(check)).endswith(check.remedy)
    return line_of(asdict(check))


def test_too_few_rows_warn():
    line = failing(audited(crowd()), "rows")
    assert "36 thumbs up and 24 thumbs down (wanted of each: 200)" in line


def test_users_who_disagree_warn():
    votes = crowd() + [
        vote(f"answer {number:03}", number >= 36, "odd", prompt=f"question {number}") for number in range(60)
    ]
    found = audited([*votes, *[{**entry, "user_key": "odd2"} for entry in votes[-60:]]], audit=LOOSE)
    assert "alpha of" in failing(found, "agreement") and "(wanted: 0.4)" not in failing(found, "agreement")
    assert "of single votes are wrong" in failing(found, "noise") and "agreement.min_votes" in failing(found, "noise")


def test_a_dominant_user_warns():
    votes = crowd() + [vote(f"more {number}", True, "busy", prompt=f"and {number}") for number in range(60)]
    line = failing(audited(votes, audit=LOOSE), "user_share")
    assert "one user has" in line and "users.max_votes" in line


def test_shares_of_the_loss_are_of_all_votes_also_of_those_without_a_user():
    votes = [vote(f"by {n}", n % 2 == 0, f"u{n % 4}", prompt=f"q{n}") for n in range(40)]
    nameless = [vote(f"nobody's {n}", n % 2 == 0, prompt=f"p{n}") for n in range(960)]
    found = audited(votes + nameless, audit=LOOSE)
    assert found.users.largest_loss_after == pytest.approx(0.01)
    assert [user.loss_before for user in found.users.top] == pytest.approx([0.01] * 4)
    # 4 users of a hundredth, and 960 votes of a thousandth that are each another's
    assert found.users.effective_before == pytest.approx(1 / (4 * 0.01**2 + 960 * 0.001**2), rel=1e-6)
    assert found.users.effective_after == pytest.approx(found.users.effective_before, rel=1e-6)
    assert status(found)["user_share"] == "pass"
    assert found.users.top_votes["1"] == pytest.approx(0.25)


def test_shares_of_the_training_loss_are_of_the_rows_that_are_trained_on():
    votes = [vote(f"by {n}", n % 2 == 0, f"u{n % 5}", prompt=f"q{n}") for n in range(100)]
    with duckdb.connect() as connection:
        fill(connection, votes)
        # all of u0's rows but two are held out
        connection.execute(
            "UPDATE examples SET split = 'heldout' WHERE completion IN "
            "(SELECT 'by ' || n * 5 FROM range(20) t(n) WHERE n >= 2)"
        )
        found = audit(connection, config(audit=LOOSE))
    shares = {user.user: (user.loss_before, user.loss_after) for user in found.users.top}
    assert shares["u0"] == pytest.approx((0.2, 2 / 82), rel=0.02)
    assert shares["u1"] == pytest.approx((0.2, 20 / 82), rel=0.02)
    assert sum(after for _, after in shares.values()) == pytest.approx(1)


def test_critics_share_is_of_all_votes_also_of_those_without_a_user():
    votes = crowd(responses=120, up=0.9) + [
        vote(f"more {number}", False, "sour", prompt=f"and {number}") for number in range(40)
    ]
    alone = audited([dict(entry) for entry in votes], audit=LOOSE).users
    nameless = [vote(f"nobody's {n}", n % 2 == 0, prompt=f"p{n}") for n in range(600)]
    found = audited(votes + nameless, audit=LOOSE)
    assert found.users.named == 1
    assert found.users.named_loss_before < alone.named_loss_before / 3
    # 760 rows of which 40 are sour's, and balance is near enough that all weigh the same
    assert found.users.named_loss_after == pytest.approx(40 / 760, rel=0.01)
    assert status(found)["critics_share"] == "pass"


def test_a_heavy_downvoters_share_warns():
    votes = crowd(responses=120, up=0.9) + [
        vote(f"more {number}", False, "sour", prompt=f"and {number}") for number in range(40)
    ]
    found = audited(votes, audit=LOOSE)
    assert [user.user for user in found.users.top if user.named] == ["sour"]
    assert "1 heavy downvoter holds" in failing(found, "critics_share") and "users.bias" in failing(
        found, "critics_share"
    )


def test_drift_warns_with_its_week_and_model():
    votes = [
        vote(f"a{number}", number % 10 < (8 if number < 200 else 3), f"u{number % 30}", prompt=f"q{number}",
             day=number // 20, model="old" if number < 200 else "new")
        for number in range(400)
    ]  # fmt: skip
    found = audited(votes, audit=LOOSE)
    assert "in the week of 2026-01-" in failing(found, "drift_by_week")
    assert "model version" in failing(found, "drift_by_model") and "50.0 points" in failing(found, "drift_by_model")


def test_a_small_groups_chance_gap_is_not_blamed_for_a_drift_elsewhere():
    def votes(model: str, count: int, up: int) -> list[dict[str, Any]]:
        return [vote(f"{model} {n}", n < up, f"u{n % 30}", prompt=f"q{model}{n}", model=model) for n in range(count)]

    found = audited(votes("old", 600, 360) + votes("new", 600, 432) + votes("rare", 24, 10), audit=LOOSE)
    assert found.drift.by_model.p_value < 0.001
    assert found.drift.by_model.largest_gap_in == "new" and status(found)["drift_by_model"] == "pass"
    rare = next(group for group in found.drift.models if group.name == "rare")
    assert abs(rare.gap) > 0.15


def test_a_ratio_far_from_deployments_warns():
    line = failing(audited(crowd(), audit=LOOSE, balance={"deployment_up_share": 0.9}), "deployment")
    assert "60% of the dataset's rows" in line and "balance.target_up_share to 0.9" in line


def test_length_that_tells_the_classes_apart_warns():
    votes = [
        vote(
            "long " * 30 + str(number) if number % 2 else f"a{number}",
            number % 2 == 0,
            f"u{number % 20}",
            prompt=f"q{number}",
        )
        for number in range(100)
    ]
    line = failing(audited(votes, audit=LOOSE), "length")
    assert "thumbs-down answers are the longer ones 100% of the time" in line


def test_what_the_log_cannot_tell_is_unknown_and_says_what_to_log():
    votes = [vote(f"a{number}", number % 2 == 0, prompt=f"q{number}") for number in range(60)]
    found = audited(votes, audit=LOOSE)
    assert {name for name, state in status(found).items() if state == "unknown"} == {
        "agreement",
        "user_share",
        "drift_by_week",
        "drift_by_model",
    }
    assert found.users is None and found.agreement.alpha is None
    assert "columns.user" in next(line_of(asdict(check)) for check in found.checks if check.name == "user_share")


def test_votes_that_are_no_judgements_count_for_nobody():
    plain = audited(crowd(), audit=LOOSE)
    removed = [
        vote("answer 000", False, "u1", prompt="question 0", removed=step)
        for step in ("empty", "changed_mind", "exact_duplicate")
    ]
    more = audited([*crowd(), *removed], audit=LOOSE)
    assert (more.agreement, more.users, more.conflicts) == (plain.agreement, plain.users, plain.conflicts)
    assert more.log.votes == plain.log.votes + 3 and more.log.judgements == plain.log.judgements


def test_taste_is_that_before_the_cap_and_influence_that_after():
    capped = [
        vote(f"more {number}", False, "sour", prompt=f"and {number}", removed="user_cap" if number >= 5 else None)
        for number in range(40)
    ]
    found = audited([*crowd(), *capped], audit=LOOSE)
    sour = next(user for user in found.users.top if user.user == "sour")
    assert sour.votes == 40 and sour.loss_after < sour.loss_before / 2


def test_a_users_weight_moves_their_share_of_the_loss():
    votes = [
        vote(
            f"a{number}", number % 2 == 0, f"u{number // 10}", prompt=f"q{number}", weight=0.25 if number < 10 else 1.0
        )
        for number in range(100)
    ]
    found = audited(votes, audit=LOOSE)
    shares = {user.user: user.loss_after for user in found.users.top}
    assert shares["u0"] == pytest.approx(0.25 / 9.25) and shares["u1"] == pytest.approx(1 / 9.25)


def test_a_users_second_vote_on_an_answer_is_no_second_voice():
    twice = [vote("a", up, "one", day=day) for day, up in enumerate((True, False))]
    found = audited([*twice, vote("a", True, "two", day=3), *crowd()], audit=LOOSE)
    alone = audited([vote("a", False, "one", day=1), vote("a", True, "two", day=3), *crowd()], audit=LOOSE)
    # the dataset's rows, which here rest on both votes, are the pipeline's business
    assert replace(found.agreement, wrong_labels=None) == replace(alone.agreement, wrong_labels=None)


def test_an_empty_log_and_a_log_of_one_class_have_audits_and_pages(tmp_path):
    for votes in (
        [vote("a", None, removed="no_label")],
        [vote("a", True, "u"), vote("b", True, "v", day=1, model="m")],
    ):
        found = audited(votes)
        assert status(found)["rows"] == "warn"
        write_audit(found, tmp_path)
        assert "</html>" in (tmp_path / "report.html").read_text()
        assert json.loads((tmp_path / "audit.json").read_text())["version"] == 1


def test_the_same_tables_give_the_same_bytes():
    first, second = audited(crowd()), audited(list(reversed(crowd())))
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    assert page(first) == page(second)


def test_an_output_folder_in_the_home_is_found_by_the_audit(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    log = generate(votes=300, prompts=20, users=20).write(tmp_path / "log.jsonl")
    audit_log(mining_config(tmp_path, log, output={"folder": "~/mined"}))
    assert (tmp_path / "home" / "mined" / "audit" / "audit.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("step", STEPS)
def test_each_step_takes_judgements_or_what_is_none(step):
    # what looks at one vote or one answer comes first; what weighs them against others comes last
    later = ("near_duplicate", "user_cap", "conflict", "balance", "stratify")
    assert (step in NO_JUDGEMENT) == (step not in later)
    found = audited([*crowd(), vote("answer 000", False, "odd", prompt="question 0", removed=step)], audit=LOOSE)
    assert found.log.judgements == 180 + (step in later)


def test_the_audit_command_says_each_check_and_writes_no_dataset(tmp_path):
    log = generate(votes=600, prompts=40, critics=3, critic_votes=60, users=30).write(tmp_path / "log.jsonl")
    settings = mining_config(tmp_path, log).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    done = CliRunner().invoke(
        cli.main, ["audit", str(tmp_path / "mine.yaml"), "audit.max_critics_share=0", "audit.min_rows=10"]
    )
    assert done.exit_code == 0, done.output
    assert "warning: 3 heavy downvoters hold" in done.output and "ok: the dataset has" in done.output
    assert f"report: {tmp_path / 'mined' / 'audit' / 'report.html'}" in done.output
    assert sorted(path.name for path in (tmp_path / "mined").rglob("*") if path.is_file()) == [
        "audit.json",
        "report.html",
    ]
    assert json.loads((tmp_path / "mined" / "audit" / "audit.json").read_text())["files"] == []


def test_rows_that_could_not_be_read_are_told_by_reason(tmp_path):
    log = generate(votes=300, prompts=20, users=20).write(tmp_path / "log.jsonl")
    row = {"prompt": "p", "response": "r", "feedback": "up", "created_at": "2026-01-05T00:00:00Z"}
    bad = [
        "{",
        "no JSON",
        json.dumps({**row, "created_at": "some day"}),
        json.dumps({**row, "created_at": "never"}),
        "[",
    ]
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in bad)
    settings = mining_config(tmp_path, log, input={"on_bad_row": "skip"})
    (tmp_path / "mine.yaml").write_text(json.dumps(settings.model_dump(mode="json", exclude_defaults=True)))
    done = CliRunner().invoke(cli.main, ["audit", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 0, done.output
    assert "left out: 5 rows that could not be read: broken JSON (3), time (2)" in done.output
    folder = tmp_path / "mined" / "audit"
    found = json.loads((folder / "audit.json").read_text(encoding="utf-8"))["log"]
    assert (found["unreadable"], found["unreadable_by_reason"]) == (5, {"broken JSON": 3, "time": 2})
    assert "broken JSON (3), time (2)." in (folder / "report.html").read_text(encoding="utf-8")


def test_a_wrong_setting_of_the_audit_is_an_error_with_its_rule(tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps({"input": {"files": ["x"]}, "columns": COLUMNS}))
    done = CliRunner().invoke(cli.main, ["audit", str(tmp_path / "mine.yaml"), "audit.min_alpha=2"])
    assert done.exit_code == 2 and "audit.min_alpha (2)" in done.output and "Krippendorff" in done.output

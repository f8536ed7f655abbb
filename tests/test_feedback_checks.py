"""Each check of the audit looks at what it names, and one that fails says what to do."""

import json
import re
from dataclasses import asdict, replace
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from audits import COLUMNS, audited, config, crowd, mining_config
from click.testing import CliRunner
from feedback_log import fill, generate, vote

from kto_dist.commands import cli
from kto_dist.data.audited import line_of
from kto_dist.feedback.audit import NO_JUDGEMENT, audit
from kto_dist.feedback.findings import Audit
from kto_dist.feedback.report import page, write_audit
from kto_dist.feedback.votes import STEPS


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


def test_a_gap_beyond_the_limit_that_chance_may_make_is_not_called_fine():
    votes = [
        vote(f"a{n}", n % 2 == 0 if n < 40 else n % 3 > 0, f"u{n}", prompt=f"q{n}", model="old" if n < 40 else "new")
        for n in range(70)
    ]
    [check] = [check for check in audited(votes, audit=LOOSE | {"max_drift": 0.05}).checks
               if check.name == "drift_by_model"]  # fmt: skip
    assert check.status == "unknown" and "by chance" in check.message and check.remedy


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


def test_mining_ends_with_the_files_that_it_wrote_and_their_rows(tmp_path):
    log = generate(votes=600, prompts=40, users=30).write(tmp_path / "log.jsonl")
    settings = mining_config(tmp_path, log).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    done = CliRunner().invoke(cli.main, ["mine", str(tmp_path / "mine.yaml"), "split.heldout=0.2"])
    assert done.exit_code == 0, done.output
    *said, train, heldout, report = done.output.splitlines()
    # steps with what they took, and the others in a line
    table = said[: next(place for place, line in enumerate(said) if line.startswith("steps that took nothing: "))]
    steps = {step["step"]: step for step in json.loads((tmp_path / "mined" / "audit.json").read_text())["steps"]}
    idle = [name for name, step in steps.items() if not any(step[f"{k}_removed"] for k in ("up", "down", "unlabelled"))]
    assert said[len(table)] == f"steps that took nothing: {', '.join(idle)}" and idle
    assert [line.split()[0] for line in table] == ["step", *(name for name in steps if name not in idle)]
    assert all(re.search(r"-\d", line) for line in table[1:]) and len(table) > 1
    for line, split in ((train, "train"), (heldout, "heldout")):
        path = tmp_path / "mined" / f"{split}.parquet"
        assert line == f"{split}: {path} ({pq.read_metadata(path).num_rows:,} rows)"
    assert report.startswith("report: ")


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

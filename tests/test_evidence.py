"""The evidence: rows as each question asks for them, figures as an evaluation has them, and going on after a stop."""

import json
from collections import Counter
from dataclasses import asdict

import click
import evidence
import evidence_rows as rows
import evidence_tables
import numpy as np
import pytest
import records
from click.testing import CliRunner
from evidence_runs import Job

from kto_dist.evaluation import kept
from kto_dist.evaluation.figures import compare, findings


@pytest.fixture(scope="module")
def log():
    return rows.read(records.ROOT / "launch" / "demo" / "thumbs.jsonl")


def test_held_out_prompts_are_never_trained_on_and_their_labels_are_what_was_meant(log):
    train, heldout = rows.split(log, 50)
    assert len({rows.question(row) for row in heldout}) == 50
    assert not {rows.question(row) for row in heldout} & {rows.question(row) for row in train}
    assert len(train) + len(heldout) == len(log)
    assert rows.wrong(heldout) == 0 < rows.wrong(train)


def test_nine_of_ten_desirable_rows_leave_and_no_other(log):
    left = rows.fewer_good(log, 0.9, seed=1)
    before, after = (Counter(row["label"] for row in some) for some in (log, left))
    assert after[True] == before[True] - round(0.9 * before[True])
    assert after[False] == before[False]
    assert [row for row in log if row in left] == left


@pytest.mark.parametrize("share", (0.0, 0.2))
def test_each_answer_has_three_voters_who_flip_the_stated_share(log, share):
    votes = rows.flipped(log[:400], share, seed=0)
    by_answer = Counter((rows.question(row), row["completion"][0]["content"]) for row in votes)
    assert set(by_answer.values()) == {rows.VOTERS}
    assert all(len({votes[at + one]["user"] for one in range(3)}) == 3 for at in range(0, len(votes), 3))
    assert rows.wrong(votes) == pytest.approx(share, abs=0.04)


def test_a_few_users_cast_half_of_the_votes_and_dislike_most_of_what_they_like(log):
    votes = rows.downvoted(log, seed=0)
    critics = {f"u{user:03d}" for user in range(rows.CRITICS)}
    theirs = [row for row in votes if row["user"] in critics]
    assert len(theirs) / len(votes) == pytest.approx(rows.CRITICS_SHARE, abs=0.05)
    meant = [row for row in theirs if rows.liked(row)]
    assert np.mean([not row["label"] for row in meant]) == pytest.approx(rows.CRITICAL, abs=0.08)
    assert rows.wrong(row for row in votes if row["user"] not in critics) == 0
    assert not any(row["label"] for row in votes if not rows.liked(row))


def test_cleaning_mends_flipped_votes_and_shrinking_takes_weight_from_heavy_downvoters(log, tmp_path):
    votes = rows.flipped(log[:300], 0.2, seed=0)
    cleaned = rows.mined_rows(rows.mined(rows.write(tmp_path / "flipped.jsonl", votes), tmp_path / "flipped"))
    assert rows.wrong(cleaned) < rows.wrong(votes) - 0.05
    file = rows.write(tmp_path / "downvoted.jsonl", rows.downvoted(log[:300], seed=0))

    def weight_of_the_mistaken(**users):
        found = rows.mined_rows(rows.mined(file, tmp_path / "downvoted", **users))
        mistaken = sum(row["weight"] for row in found if bool(row["label"]) != rows.liked(row))
        return mistaken / sum(row["weight"] for row in found)

    assert weight_of_the_mistaken() < 0.5 * weight_of_the_mistaken(volume=0.0, bias=0.0)


def test_there_are_at_most_24_runs_and_every_question_is_about_some_of_them():
    assert len(evidence.names()) == len(set(evidence.names())) <= 24
    for question in evidence.QUESTIONS:
        assert set(question.arms.values()) | set(sum(question.pairs, ())) <= set(evidence.RUNS)
    asked = set().union(*(question.arms.values() for question in evidence.QUESTIONS))
    assert asked == set(evidence.RUNS)


# ---- results ----


def made_up(arm, seed, heldout, shift=2.0):
    draw = np.random.default_rng([seed, len(arm)])
    ratios = draw.normal(size=len(heldout.desirable)) * 3 + shift * heldout.desirable
    return {
        "arm": arm,
        "seed": seed,
        "ratios": " ".join(f"{ratio:.3f}" for ratio in ratios),
        "desirable": 0.3,
        "wrong_labels": 0.1,
        "rows": 100,
        "class_weights": {"desirable": 2.0, "undesirable": 1.0},
        "kl_raw": "0 1 -1 -1",
        "step_seconds": 1.5,
        "seconds": {"training": 3.0, "all": 6.0},
    }


@pytest.fixture(scope="module")
def heldout():
    draw = np.random.default_rng(3)
    prompts = np.repeat(np.arange(60), 4)
    return evidence.Heldout(desirable=draw.random(prompts.size) < 0.4, prompts=prompts)


def as_evaluated(run, heldout):
    """What the package makes of the same log-ratios."""
    ratios = evidence.numbers(run["ratios"])
    table = kept.of(
        logps=ratios,
        ref_logps=np.zeros(ratios.size),
        tokens=np.ones(ratios.size),
        sign=np.where(heldout.desirable, 1.0, -1.0),
        prompts=heldout.prompts,
    )
    return kept.paired(table, heldout.pairs)


def test_figures_intervals_and_differences_of_one_seed_are_those_of_an_evaluation(heldout):
    runs = [made_up("few good, weighed", 0, heldout), made_up("kto", 0, heldout, shift=4.0)]
    first, second = (as_evaluated(run, heldout) for run in runs)
    line = next(line for line in evidence.results_of(runs, heldout) if line["arm"] == "few good, weighed")
    difference = next(line for line in evidence.results_of(runs, heldout) if "minus" in line)
    own, both = findings(first), compare(first, second)
    for name, theirs in (
        ("auc", "auc"),
        ("pairs", "accuracy/pairs"),
        ("good", "rewards/desirable"),
        ("bad", "rewards/undesirable"),
        ("margin", "rewards/margin"),
    ):
        assert line[name]["value"] == pytest.approx(own.figures[theirs], abs=1e-4)
        assert line[name]["low"] == pytest.approx(own.intervals[theirs].low, abs=1e-4), name
        assert difference[name]["high"] == pytest.approx(both[theirs].high, abs=1e-4), name
    classes = (own.figures["accuracy/desirable"], own.figures["accuracy/undesirable"])
    assert line["accuracy"]["value"] == pytest.approx(np.mean(classes), abs=1e-4)


def test_an_arms_figure_is_the_mean_over_its_seeds_and_a_difference_is_over_the_seeds_of_both(heldout):
    runs = [made_up("kto", seed, heldout, shift=1.0 + seed) for seed in (0, 1, 2)]
    runs += [made_up("trl", seed, heldout) for seed in (0, 1)]
    found = evidence.results_of(runs, heldout)
    own = {line["arm"]: line for line in found if "minus" not in line}
    assert own["kto"]["auc"]["value"] == pytest.approx(np.mean(own["kto"]["auc_by_seed"]), abs=1e-4)
    (apart,) = (line for line in found if "minus" in line)
    assert (apart["arm"], apart["minus"], apart["seeds"]) == ("kto", "trl", [0, 1])
    wanted = np.mean(own["kto"]["auc_by_seed"][:2]) - np.mean(own["trl"]["auc_by_seed"])
    assert apart["auc"]["value"] == pytest.approx(wanted, abs=2e-4)


def test_every_table_can_be_made_of_all_runs_and_of_few(heldout):
    settings = {"steps": 4, "global_batch": 8, "lr": 1e-3, "beta": 0.1, "dtype": "bf16"}
    held = {name: " ".join(map(str, getattr(heldout, name).astype(int))) for name in ("desirable", "prompts")}
    content = records.frame("evidence", settings | {"heldout_prompts": 60}) | {"heldout": held}
    for chosen in (evidence.names(), [("kto", 0)]):
        runs = [made_up(arm, seed, heldout) for arm, seed in chosen]
        content |= {"runs": runs, "results": evidence.results_of(runs, heldout)}
        texts = {name: table(content) for name, table in evidence_tables.KINDS.items()}
        assert f"{len(chosen)}{'' if len(chosen) == 24 else ' of 24'} runs" in texts["evidence"]
    assert "| all rows | 100 (30%) | 2 : 1 | 0." in texts["evidence-imbalance"]
    assert "| `kto` | 75% | 0." in texts["evidence-z0"] and "apo" not in texts["evidence-z0"]


# ---- going on ----


def test_a_run_that_is_done_is_not_run_again_and_each_is_written_as_it_ends(tmp_path, monkeypatch, heldout):
    (tmp_path / "config.json").write_text("{}")
    begun = []

    def run(name, seed, *rest):
        if len(begun) == 2:
            raise click.ClickException("killed")
        begun.append((name, seed))
        held = {name: " ".join(map(str, getattr(heldout, name).astype(int))) for name in ("desirable", "prompts")}
        return made_up(name, seed, heldout) | {"heldout": held}

    monkeypatch.setattr(evidence, "run", run)
    file = tmp_path / "found.json"
    words = ["--model", str(tmp_path), "--json", str(file)]
    assert CliRunner().invoke(evidence.main, words).exit_code == 1
    assert [(run["arm"], run["seed"]) for run in json.loads(file.read_text())["runs"]] == evidence.names()[:2]
    begun.clear()
    done = CliRunner().invoke(evidence.main, [*words, "--most", "1"])
    assert done.exit_code == 0, done.output
    assert begun == [evidence.names()[2]]
    assert "3 runs are done, 21 are left" in done.output
    other = CliRunner().invoke(evidence.main, [*words, "--lr", "1e-3"])
    assert other.exit_code == 1 and "has runs with another lr" in other.output


# ---- the peer ----


@pytest.mark.soak
def test_where_z0_plays_no_part_trl_takes_the_same_steps(tmp_path, tiny_model, tiny_log):
    lines = tiny_log.read_text().splitlines(keepends=True)
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    train.write_text("".join(lines[:60]))
    heldout.write_text("".join(lines[60:]))
    worker, found = evidence.Worker(tmp_path / "worker.log"), {}
    for trainer in ("kto_dist", "trl"):
        job = Job(
            model=str(tiny_model),
            train=str(train),
            heldout=str(heldout),
            folder=str(tmp_path / trainer),
            store=str(tmp_path / "store"),
            cache=str(tmp_path / "tokenised"),
            loss="apo_zero_unpaired",
            weigh=True,
            trainer=trainer,
            dtype="fp32",
            seed=0,
            steps=7,  # of one epoch: TRL takes its rows in eights, whatever a step at an epoch's end has
            global_batch=8,
            lr=1e-3,
            beta=0.2,
            max_length=96,
        )
        given, taken = tmp_path / f"{trainer}.json", tmp_path / f"{trainer}-found.json"
        records.write_json(given, asdict(job))
        found[trainer] = worker.run(given, taken)
    worker.end()
    ours, theirs = found["kto_dist"], found["trl"]
    assert ours["class_weights"]["desirable"] != ours["class_weights"]["undesirable"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and ours["loss"][-1] < 0.9 * ours["loss"][0]
    ratios = {name: evidence.numbers(run["ratios"]) for name, run in found.items()}
    assert np.abs(ratios["trl"]).mean() > 1
    assert np.abs(ratios["kto_dist"] - ratios["trl"]).max() < 0.02 * np.abs(ratios["trl"]).max()

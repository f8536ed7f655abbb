"""Each rule over many steps speaks once when its trouble is there; sound runs hear nothing; rules of the user's own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sound_runs
from ranks import run_ranks
from tiny import write_jsonl
from tiny_runs import tiny_config, train_all

from kto_dist.base.errors import UserError
from kto_dist.base.exits import Stopped
from kto_dist.training.config import HealthConfig
from kto_dist.training.health import Monitor
from kto_dist.training.trends import AFTER, STRETCH, own_rules


def steps(count: int = 400, seed: int = 0, **changes: Any) -> list[dict[str, float]]:
    """A sound run with the noise of small batches; a metric of `changes` (a slash is __) is a function of the step."""
    rng = random.Random(seed)
    found = []
    for step in range(1, count + 1):
        done = step / count
        line = {
            "loss": 0.5 - 0.1 * done,
            "loss/desirable": 0.5 - 0.1 * done,
            "loss/undesirable": 0.5 - 0.1 * done,
            "rewards/desirable": 0.5 * done,
            "rewards/undesirable": -0.8 * done,
            "saturated/all": 0.2 * done,
            "grad_norm": 3.0,
            "kl_raw": 1.0,
            "rows/all": 16.0,
            "rows/desirable": 10.0,
            "rows/contradicted": 0.2,
            "loss/contradicted": 0.5,
        }
        line |= {name.replace("__", "/"): change(step) for name, change in changes.items()}
        line = {name: value * rng.uniform(0.9, 1.1) for name, value in line.items()}
        found.append({"step": step, **line})
    return found


def said(lines: list[dict[str, float]], audited: float | None = 0.6, **limits: Any) -> list[tuple[int, str]]:
    monitor = Monitor(HealthConfig(**limits), audited=audited)
    return [(int(line["step"]), item.rule) for line in lines for item in monitor.check(int(line["step"]), line)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lr", (0.3, 1.0, 3.0))
def test_sound_runs_hear_nothing(seed, lr):
    losses = dict.fromkeys(("loss", "loss__contradicted"), lambda step: 0.5 - lr * step / 3000)
    falling = {**losses, "grad_norm": lambda step: 2 + lr}
    assert said(steps(600, seed, **falling)) == []


@pytest.mark.parametrize("name", sound_runs.RUNS)
def test_a_sound_run_as_it_was_recorded_hears_nothing(name):
    lines = sound_runs.recorded(name)
    assert len(lines) == sound_runs.STEPS > AFTER + STRETCH
    assert said(lines, audited=None) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", sound_runs.RUNS)
def test_a_sound_run_as_it_is_trained_hears_nothing(tmp_path, tiny_model, name):
    log = write_jsonl(tmp_path / "log.jsonl", sound_runs.rows())
    (config,) = run_ranks(sound_runs.train_one, 1, tmp_path, tiny_model, log, name)
    assert not (Path(config.train.output) / "health.jsonl").exists()


TROUBLES = {
    "one_class": {"loss__undesirable": lambda step: 0.5},
    "falling": {"rewards__desirable": lambda step: -step / 150, "rewards__undesirable": lambda step: -step / 75},
    "saturated": {"saturated__all": lambda step: 0.95 if step > 80 else 0.1},
    "spike": {"grad_norm": lambda step: 200.0 if step in (90, 91) else 2.0},
    "contradicted": {"rows__contradicted": lambda step: 3.0, "loss__contradicted": lambda step: 0.9},
}


@pytest.mark.parametrize("rule", TROUBLES)
def test_each_trouble_is_told_once_by_its_rule(rule):
    # means of noisy steps: one class stands still to 1 % in most draws, not in all
    found = [said(steps(seed=seed, **TROUBLES[rule])) for seed in range(9)]
    assert {name for each in found for _, name in each} == {rule}
    assert all(len(each) <= 1 for each in found) and sum(map(len, found)) >= 4


def test_a_class_mix_unlike_the_audits_is_told_once_with_both_shares():
    assert said(steps(), audited=0.3) == [(STRETCH, "class_mix")]
    monitor = Monitor(HealthConfig(), audited=0.3)
    ((item,),) = [found for line in steps() if (found := monitor.check(int(line["step"]), line))]
    assert "62% of the rows" in item.message.replace("63%", "62%") and "the audit of the data says 30%" in item.message


@pytest.mark.parametrize("audited", (None, 0.6, 0.7))
def test_a_class_mix_that_is_not_known_or_about_the_same_is_left_in_peace(audited):
    assert said(steps(), audited=audited) == []


def test_a_few_rows_of_another_mix_are_chance():
    lines = [{"step": step, "rows/all": 1.0, "rows/desirable": float(step % 10 < 3)} for step in range(60)]
    assert said(lines, audited=0.5) == []


def test_contradictory_rows_are_told_by_their_share_of_the_loss():
    monitor = Monitor(HealthConfig())
    lines = steps(60, **TROUBLES["contradicted"])
    (item,) = [item for line in lines for item in monitor.check(int(line["step"]), line)]
    assert "19% of the rows and have 3" in item.message and "kto-dist mine" in item.message


def test_what_one_rule_has_told_another_one_does_not_tell_again():
    everything_falls = {"kl_raw": lambda step: -1.0, "kl_clamped": lambda step: 1.0, **TROUBLES["falling"]}
    lines = [{**line, "kl_clamped": 1.0} for line in steps(**everything_falls)]
    assert [rule for _, rule in said(lines)] == ["clamped"]


def test_a_flat_loss_is_told_when_there_was_time_to_learn():
    flat = [{"step": step, "loss": 0.5} for step in range(1, 600)]
    assert said(flat) == [(AFTER, "flat")]


def test_of_a_run_that_goes_on_the_steps_before_count():
    flat = [{"step": step, "loss": 0.5} for step in range(1, AFTER + 1)]
    monitor = Monitor(HealthConfig(), past=flat[:-1])
    assert [item.rule for item in monitor.check(AFTER, flat[-1])] == ["flat"]


def test_a_long_run_takes_no_more_memory():
    monitor = Monitor(HealthConfig())
    for step in range(1, 1000):
        monitor.check(step, {"step": step, "loss": 1 / step})
    assert len(monitor.past) == STRETCH + AFTER and monitor.past[0]["step"] == 1 and monitor.past[-1]["step"] == 999


RULE = """
def longer(now, past):
    if now["step"] >= 3:
        return f"seen {len(past)} steps before"

def stops(now, past):
    return ("enough", True) if now["step"] == 2 else None

def wrong(now, past):
    return 7

def broken(now, past):
    return now["nothing"]

text = "no function"
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RULE)
    return tmp_path / "mine.py"


def test_a_rule_of_ones_own_sees_the_metrics_and_speaks_once(rules):
    monitor = Monitor(HealthConfig(rules=[f"{rules}:longer"]))
    found = [monitor.check(step, {"step": step}) for step in range(1, 6)]
    assert [len(each) for each in found] == [0, 0, 1, 0, 0]
    assert found[2][0].message == "step 3: seen 2 steps before" and not found[2][0].stop


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "must read module:function"),
        ("nowhere.at.all:rule", "nowhere.at.all cannot be imported"),
        ("FILE:nothing", "has no function nothing"),
        ("FILE:text", "has no function text"),
    ],
)
def test_a_rule_that_is_not_there_is_a_mistake(rules, name, message):
    with pytest.raises(UserError, match=message):
        own_rules([name.replace("FILE", str(rules))])


@pytest.mark.parametrize(
    ("function", "message"), [("wrong", "must return None, a text"), ("broken", "failed: KeyError: 'nothing'")]
)
def test_a_rule_that_fails_says_so(rules, function, message):
    with pytest.raises(UserError, match=message):
        Monitor(HealthConfig(rules=[f"{rules}:{function}"])).check(1, {"step": 1})


def stopped_by(config: Any) -> str:
    try:
        train_all([config])
    except Stopped as stop:
        return str(stop)
    return "nothing"


def test_a_rule_of_ones_own_stops_the_run_on_all_ranks_and_is_kept(tmp_path, tiny_model, tiny_log, rules):
    config = tiny_config(tmp_path, tiny_model, tiny_log, health__rules=[f"{rules}:stops"])
    assert run_ranks(stopped_by, 2, config) == ["step 2: enough"] * 2
    (line,) = (tmp_path / "run" / "health.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "rule": f"{rules}:stops", "stop": True, "message": "step 2: enough"}

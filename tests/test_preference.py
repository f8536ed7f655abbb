"""Pairs of a good and a bad answer: what thumbs give by each rule, what the data holds, and what is left."""

import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_jsonl
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.commands.cli import main
from kto_dist.data.examples import Examples
from kto_dist.data.preference import preferences

RULES = ("all", "one", "best")


def examples_of(rows):
    """Of (prompt, answer, desirable, weight, pair); prompt and answer are a token."""
    tokens = pa.list_(pa.int32())
    prompts, answers, desirable, weights, pairs = zip(*rows, strict=True) if rows else [[]] * 5
    table = pa.table(
        {
            "prompt_ids": pa.array([[prompt] for prompt in prompts], tokens),
            "completion_ids": pa.array([[answer] for answer in answers], tokens),
            "desirable": pa.array(desirable, pa.bool_()),
            "weight": pa.array(weights, pa.float64()),
            "prompt_group": pa.array(prompts, pa.int64()),
            "pair": pa.array(pairs, pa.int64()),
        }
    )
    return Examples(table, fingerprint="", report=None)


LOG = [
    # prompt 1: two good, two bad; 2 a good one alone; 3 a bad one alone; 4 one answer, rated both ways
    (1, 10, True, 1.0, None),
    (1, 11, False, 1.0, None),
    (1, 12, True, 3.0, None),
    (1, 13, False, 2.0, None),
    (2, 14, True, 1.0, None),
    (3, 15, False, 1.0, None),
    (4, 16, True, 1.0, None),
    (4, 16, False, 1.0, None),
    # a pair of the data, beside a thumb of the same prompt
    (5, 17, False, 1.0, 0),
    (5, 18, True, 1.0, 0),
    (5, 19, False, 1.0, None),
]


@pytest.mark.parametrize(
    ("rule", "wanted", "by_rule"),
    [
        ("all", [[0, 1], [0, 3], [2, 1], [2, 3], [9, 8]], 0),
        ("one", [[0, 1], [2, 3], [9, 8]], 0),
        ("best", [[2, 3], [9, 8]], 2),
    ],
)
def test_each_rule_makes_its_pairs_and_counts_what_it_leaves(rule, wanted, by_rule):
    found = preferences(examples_of(LOG), rule)
    assert found.pairs.tolist() == wanted
    assert (found.given, found.prompts, found.no_bad, found.twins, found.by_rule) == (1, 2, 1, 2, by_rule)
    assert found.no_good == 2  # rows 5 and 10


logs = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans(), st.sampled_from([0.5, 1.0, 2.0]), st.none()),
    max_size=30,
)


@pytest.mark.parametrize("rule", RULES)
@given(rows=logs)
def test_every_row_is_used_or_left_for_a_reason(rule, rows):
    found = preferences(examples_of(rows), rule)
    left = found.no_bad + found.no_good + found.by_rule + found.twins
    assert found.used + left == len(rows)
    for chosen, rejected in found.pairs.tolist():
        assert rows[chosen][0] == rows[rejected][0]
        assert rows[chosen][1] != rows[rejected][1]
        assert rows[chosen][2] and not rows[rejected][2]
    rows_in_pairs = found.pairs.ravel().tolist()
    if rule != "all":
        assert len(rows_in_pairs) == len(set(rows_in_pairs))
    if rule == "best":
        assert len(found.pairs) == found.prompts


def test_a_pair_of_the_data_with_one_answer_twice_is_left_out():
    found = preferences(examples_of([(1, 10, True, 1.0, 0), (1, 10, False, 1.0, 0)]), "all")
    assert (len(found.pairs), found.given, found.twins) == (0, 0, 2)


def test_the_command_says_what_each_rule_uses_and_leaves(tmp_path, tiny_model):
    rows = [
        {"prompt": f"question {row // 3}", "completion": f"answer {row}", "label": row % 3 > 0} for row in range(12)
    ]
    rows += [{"prompt": "alone", "completion": "answer", "label": True}]
    rows += [{"prompt": "given", "chosen": "yes", "rejected": "no"}]
    log = write_jsonl(tmp_path / "log.jsonl", rows[:-1])
    heldout = write_jsonl(tmp_path / "heldout.jsonl", rows[-1:])
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(tmp_path, tiny_model, log, data__heldout=str(heldout))))
    done = CliRunner().invoke(main, ["pairs", str(config)])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines() if line.startswith("data.")]
    assert [line[:4] for line in lines] == [
        ["data.train", "all", "8", "4"],
        ["data.train", "one", "4", "4"],
        ["data.train", "best", "4", "4"],
        *(["data.heldout", rule, "1", "1"] for rule in RULES),
    ]
    assert lines[1][4:] == ["8", "(62%)", "13", "1", "0", "4", "0"]

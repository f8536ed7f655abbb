"""Tokenised rows as every rank opens them: cut to fit, views into the file, and fit to train on or refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import DataReport, check, fit, load
from kto_dist.data.tokenise import prepare
from tests.tiny import thumbs, tiny_tokenizer, write_jsonl

CHAT = {
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "yes"}],
}
TEXT = {"prompt": "hi", "completion": "yes"}


@pytest.fixture
def make(tmp_path):
    """Rows -> the training split, through files."""

    def make(*rows, **settings):
        log = write_jsonl(tmp_path / "log.jsonl", [{"label": bool(i % 2), **row} for i, row in enumerate(rows)])
        config = DataConfig(train=str(log), cache=str(tmp_path / "cache"), workers=1, **settings)
        return load(prepare(config, tiny_tokenizer())[0])

    return make


# Cutting.

LENGTHS = st.integers(0, 60)
LIMITS = st.integers(2, 50).flatmap(lambda longest: st.tuples(st.just(longest), st.integers(1, longest - 1)))


@given(prompt=LENGTHS, completion=LENGTHS, limits=LIMITS)
def test_a_cut_pair_fits_and_loses_no_more_than_it_must(prompt, completion, limits):
    longest, prompt_limit = limits
    p, c = fit(prompt, completion, longest, prompt_limit)
    assert 0 <= p <= prompt and 0 <= c <= completion
    assert p + c == min(prompt + completion, longest) or (p == min(prompt, prompt_limit) and p + c <= longest)
    assert p >= min(prompt, prompt_limit)
    assert c == completion or p == min(prompt, prompt_limit)
    assert c > 0 or completion == 0


@given(pairs=st.lists(st.tuples(LENGTHS, LENGTHS), max_size=9), limits=LIMITS)
def test_cutting_arrays_is_cutting_each_pair(pairs, limits):
    prompts, completions = np.array(pairs, np.int32).reshape(-1, 2).T
    together = np.stack(fit(prompts, completions, *limits)).T.tolist()
    assert together == [list(fit(*pair, *limits)) for pair in pairs]


# What is on disk.


def test_the_log_can_be_had_back(make):
    examples = make(CHAT, {**TEXT, "weight": 0.5, "label": True}, max_length=2, max_prompt_length=1)
    assert examples.original(0) == (tuple(CHAT["prompt"]), tuple(CHAT["completion"]))
    assert examples.original(1) == ("hi", "yes")
    assert [examples.prompt_text(row) for row in (0, 1)] == ["user: hi", "hi"]
    assert [examples.completion_text(row) for row in (0, 1)] == ["yes", "yes"]
    assert examples.weights.tolist() == [1.0, 0.5]
    assert examples.desirable.tolist() == [False, True]


def test_the_arrays_have_the_types_that_they_promise(make):
    examples = make(*thumbs(20, 5))
    assert examples.prompt(3).dtype == examples.completion(3).dtype == np.int32
    assert examples.prompt_lengths.dtype == examples.completion_lengths.dtype == np.int32
    assert (examples.desirable.dtype, examples.weights.dtype) == (np.bool_, np.float64)
    assert examples.prompt_group.dtype == np.int64


def test_tokens_are_views_into_the_file(make):
    tokens = make(TEXT).prompt(0)
    assert not tokens.flags.owndata and not tokens.flags.writeable


def test_the_report_counts_what_is_there(make, tmp_path):
    examples = make(*thumbs(200, 20), max_length=24, max_prompt_length=8)
    report = examples.report
    for counts, mask in ((report.desirable, examples.desirable), (report.undesirable, ~examples.desirable)):
        assert counts.kept == mask.sum()
        assert counts.prompt_tokens == examples.prompt_lengths[mask].sum()
        assert counts.completion_tokens == examples.completion_lengths[mask].sum()
    assert report.rows_read == 200
    assert report.completion_lengths["max"] == examples.completion_lengths.max()
    assert report.prompt_lengths["p50"] == np.quantile(examples.prompt_lengths, 0.5, method="nearest")
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_report_says_what_was_skipped(make):
    examples = make(TEXT, {**TEXT, "label": "maybe"}, TEXT, on_bad_row="skip")
    lines = "\n".join(examples.report.lines())
    assert "2 rows read, 1 skipped" in lines
    assert "unknown label: 1" in lines and "log.jsonl:2" in lines and "'maybe'" in lines


# What can train.


@pytest.mark.parametrize("label, absent", [(True, "undesirable"), (False, "desirable")])
def test_a_log_of_one_class_cannot_train(make, label, absent):
    examples = make(*({**row, "label": label} for row in thumbs(10, 5)))
    with pytest.raises(UserError, match=f"data.train has 10 rows and not one {absent}"):
        check(examples, needs_pairs=False)


def test_one_prompt_cannot_train_where_pairs_are_needed(make):
    examples = make(TEXT, TEXT, {**TEXT, "completion": "no"})
    with pytest.raises(UserError, match=r"one and the same prompt.*apo_zero_unpaired"):
        check(examples, needs_pairs=True)
    check(examples, needs_pairs=False)
    check(make(TEXT, {**TEXT, "prompt": "there"}), needs_pairs=True)

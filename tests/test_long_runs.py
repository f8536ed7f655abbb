"""Runs that will not end in anybody's time say so while they are young."""

import pytest
from tiny import thumbs, tiny_tokenizer, write_jsonl

from kto_dist.data.batch import Plan
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import load
from kto_dist.data.tokenise import prepare
from kto_dist.reference.pairs import wanted_pairs
from kto_dist.training.figures import long_way


class Told(Exception):
    pass


def test_a_billion_steps_are_told_while_their_pairs_are_drawn(tmp_path):
    log = write_jsonl(tmp_path / "log.jsonl", thumbs(20, 5))
    data = DataConfig(train=str(log), cache=str(tmp_path / "cache"), workers=1)
    examples = load(prepare(data, tiny_tokenizer())[0])
    plan = Plan(
        seed=0,
        rows=len(examples),
        global_batch=8,
        epochs=1.0,
        max_steps=10**9,
        kl_pairs_per_step=None,
        max_length=data.max_length,
        prompt_limit=data.prompt_limit,
    )

    def say(text: str) -> None:
        raise Told(text)

    with pytest.raises(Told, match=r"drawing the KL pairs of 1,000,000,000 steps takes about [\d,]+ minutes"):
        wanted_pairs(plan, examples, say)


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [
        (10**9, 0.5, "at 0.5 s a step the 1,000,000,000 steps that are left take about 16 years"),
        (10**6, 1.0, "at 1 s a step the 1,000,000 steps that are left take about 12 days"),
        (10**5, 1.0, None),
    ],
)
def test_steps_that_take_days_are_told_with_their_rate(steps, seconds, said):
    assert long_way(steps, seconds) == said

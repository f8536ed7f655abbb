"""Whole passes over a store: other texts never meet each other's numbers, and where the store lies doesn't matter."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from reference_runs import logps_of_pairs, scored_and_found
from small_disk import remount
from tiny import CHAT_TEMPLATE, save_tiny, thumbs, tiny_tokenizer, write_jsonl
from tiny_runs import tiny_config, train_all
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from kto_dist.base.errors import UserError
from kto_dist.store.tools import summarise, verify
from kto_dist.training.config import Config


def _other_template(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("\n", " ")
    tokenizer.save_pretrained(folder)


def _other_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    letters = sorted(token for token in vocabulary if vocabulary[token] > 1)
    turned = dict(zip(letters, [vocabulary[token] for token in letters[1:] + letters[:1]], strict=True))
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab={**vocabulary, **turned}, merges=[])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def _before_and_after(model: Path, change: str, first: Config, second: Config, fresh: Config):
    assert scored_and_found(first)[1] == 0
    if change == "template":
        _other_template(model)
    elif change == "tokenizer":
        _other_tokenizer(model)
    return *scored_and_found(second), logps_of_pairs(second), logps_of_pairs(fresh)


@pytest.mark.parametrize("change", ("template", "tokenizer", "max_length"))
def test_another_text_is_scored_anew_and_an_equal_one_never_wrongly(tmp_path, change):
    """The manifest names neither tokenizer nor template nor length: the tokens do."""
    model = save_tiny(tmp_path / "model")
    log = write_jsonl(
        tmp_path / "log.jsonl",
        [
            {
                **row,
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in thumbs(40, 12)
        ],
    )
    changes = {"data__max_length": 48} if change == "max_length" else {}
    first, second, fresh = (
        tiny_config(tmp_path, model, log, train__max_steps=2, reference__store=str(tmp_path / store), **settings)
        for store, settings in (("store", {}), ("store", changes), ("fresh", changes))
    )
    ((scored, found, shared, own),) = run_ranks(_before_and_after, 1, model, change, first, second, fresh)
    # rows that are short enough for both lengths have the same tokens, and are found
    assert scored and bool(found) == (change == "max_length")
    assert np.allclose(shared, own, rtol=1e-6, atol=0)
    assert len(summarise(second.reference.store)) == 1


def test_a_run_whose_pairs_are_all_there_trains_from_a_read_only_store(tmp_path, tiny_model, tiny_log, small_disk):
    store = str(small_disk / "store")
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__store=store, train__max_steps=1)
    run_ranks(scored_and_found, 1, config)
    remount(small_disk, "ro")
    (summaries,) = run_ranks(train_all, 1, [config])
    assert summaries[0]["reference"]["scored"] == 0
    more = tiny_config(tmp_path, tiny_model, tiny_log, reference__store=store, train__max_steps=2)
    with pytest.raises(UserError, match=r"reference.store \(.*store\) lacks pairs of this run, but cannot be written"):
        run_ranks(scored_and_found, 2, more)
    tracked = more.model_copy(
        update={
            "train": more.train.model_copy(update={"output": str(tmp_path / "new" / "run")}),
            "tracking": more.tracking.model_copy(update={"enabled": True}),
        }
    )
    with pytest.raises(UserError, match="cannot be written"):
        run_ranks(train_all, 1, [tracked])
    assert not (tmp_path / "new").exists()


def _on_s3(environment: dict[str, str], config: Config) -> tuple[int, int, float]:
    os.environ.update(environment)
    scored, found = scored_and_found(config)
    return scored, found, float(logps_of_pairs(config).sum())


def test_ranks_share_a_store_on_s3(tmp_path, tiny_model, tiny_log, s3):
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__store="s3://bucket/shared/reference")
    first = run_ranks(_on_s3, 2, environment, config)
    assert first[0][0] and not first[0][1] and first[0][2] == first[1][2]
    assert not (tmp_path / "s3:").exists() and not Path("s3:").exists()
    scored, found, total = run_ranks(_on_s3, 1, environment, config)[0]
    assert (scored, found) == (0, first[0][0]) and total == first[0][2]


def test_two_jobs_at_once_on_one_store_both_get_right_values_and_leave_a_whole_one(tmp_path, tiny_model, tiny_log):
    alone = tiny_config(tmp_path / "alone", tiny_model, tiny_log, reference__store=str(tmp_path / "alone" / "store"))
    configs = [
        tiny_config(tmp_path / name, tiny_model, tiny_log, reference__store=str(tmp_path / "store")) for name in "ab"
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda config: run_ranks(logps_of_pairs, 1, config)[0], configs))
    # what stands there by now serves a third one whole, and every rank with the same numbers
    again, expected = zip(*run_ranks(_values_of, 2, [configs[0], alone]), strict=True)
    for result in (*results, *again):
        assert np.allclose(result, expected[0], rtol=1e-6, atol=0)
    assert (again[0] == again[1]).all()
    (verdict,) = verify(tmp_path / "store")
    assert verdict.good and verdict.difference < 1e-4


def _values_of(configs: list[Config]) -> list[np.ndarray]:
    return [logps_of_pairs(config) for config in configs]

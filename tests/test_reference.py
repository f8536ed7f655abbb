"""The reference pass and its store: right values, computed once, whole shards, memory given back."""

import importlib
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ranks import run_ranks
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM

from kto_dist.config import Config
from kto_dist.console import Console
from kto_dist.prepare import prepare, score_reference
from kto_dist.reference import wanted_pairs


def scored_and_found(config: Config) -> tuple[int, int]:
    """On every rank: how many pairs a pass scores, and how many it finds in the store."""
    outcome = importlib.import_module("kto_dist.precompute").precompute(config)
    return outcome.pairs - outcome.hits, outcome.hits


def logps_of_pairs(config: Config) -> np.ndarray:
    prepared = prepare(config, Console())
    return score_reference(prepared, Console()).train(*wanted_pairs(prepared.plan, prepared.train))


@pytest.mark.parametrize("packing", (False, True))
@pytest.mark.parametrize("stage", (0, 3))
def test_scores_are_the_log_probs_of_the_model_itself(tmp_path, tiny_model, tiny_log, stage, packing):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__zero_stage=stage, train__packing=packing)
    found = run_ranks(logps_of_pairs, 2, config)
    prepared = prepare(config, Console())
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    for place, (j, k) in enumerate(zip(*wanted_pairs(prepared.plan, prepared.train), strict=True)):
        if place % 10:
            continue
        prompt, completion = prepared.train.prompt(j), prepared.train.completion(k)
        ids = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
        assert found[0][place] == pytest.approx(expected, rel=1e-5)
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"train__lr": 1e-6, "train__output": "elsewhere", "train__tokens_per_microbatch": 512},
        {"kto__beta": 0.5, "kto__desirable_weight": 3.0, "kto__undesirable_weight": 1.0},
        {"reference__tokens_per_batch": 128, "deepspeed__zero_stage": 3, "reference__zero_stage": 3},
        {"kto__loss": "apo_zero_unpaired"},
    ],
)
@pytest.mark.parametrize("world", (1, 2))
def test_a_change_that_leaves_the_pairs_alone_scores_nothing(tmp_path, tiny_model, tiny_log, changes, world):
    first = tiny_config(tmp_path, tiny_model, tiny_log)
    scored, found = run_ranks(scored_and_found, 2, first)[0]
    assert scored and not found
    scored, found = run_ranks(scored_and_found, world, tiny_config(tmp_path, tiny_model, tiny_log, **changes))[0]
    assert not scored and found


def test_added_rows_cost_only_the_new_pairs(tmp_path, tiny_model):
    rows = thumbs(60, 20)
    # no z0, so the pairs are the rows themselves
    changes = {"kto__loss": "apo_zero_unpaired", "train__max_steps": None, "train__epochs": 1.0}
    log = write_jsonl(tmp_path / "log.jsonl", rows[:48])
    run_ranks(scored_and_found, 1, tiny_config(tmp_path, tiny_model, log, **changes))
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    scored, found = run_ranks(scored_and_found, 1, tiny_config(tmp_path, tiny_model, log, **changes))[0]
    assert (scored, found) == (12, 48)


def test_a_renamed_model_is_the_same_reference_and_a_changed_one_is_not(tmp_path, tiny_log):
    model = save_tiny(tmp_path / "model")
    run_ranks(scored_and_found, 1, tiny_config(tmp_path, model, tiny_log))
    moved = model.rename(tmp_path / "moved")
    assert run_ranks(scored_and_found, 1, tiny_config(tmp_path, moved, tiny_log))[0][0] == 0
    lm = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    lm.save_pretrained(moved)
    assert run_ranks(scored_and_found, 1, tiny_config(tmp_path, moved, tiny_log))[0][1] == 0


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize("damage", ("truncated", "flipped", "deleted"))
def test_a_damaged_shard_is_found_and_its_pairs_are_scored_again(tmp_path, tiny_model, tiny_log, damage, world):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    (before,) = run_ranks(logps_of_pairs, 1, config)
    (shard,) = (tmp_path / "store").glob("*/*.parquet")
    content = bytearray(shard.read_bytes())
    if damage == "deleted":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert run_ranks(scored_and_found, world, config)[0][1] == 0
    for again in run_ranks(logps_of_pairs, world, config):
        assert again == pytest.approx(before, rel=1e-6)


def _die_after_a_window(config: Config) -> None:
    module = importlib.import_module("kto_dist.reference")
    module.WINDOW = 32
    add, windows = module.Store.add, []

    def deadly(*arguments):
        if windows:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*arguments)
        windows.append(1)

    module.Store.add = deadly
    scored_and_found(config)


def test_a_killed_pass_goes_on_where_it_was(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(_die_after_a_window, 1, config)
    scored, found = run_ranks(scored_and_found, 1, config)[0]
    assert found == 32 and scored


def _with_a_store_of_its_own(config: Config) -> tuple[int, int, float]:
    rank = os.environ["RANK"]
    changed = config.reference.model_copy(update={"store": f"{config.reference.store}-{rank}"})
    own = config.model_copy(update={"reference": changed})
    scored, found = scored_and_found(own)
    return scored, found, float(logps_of_pairs(own).sum())


def test_hosts_need_no_shared_file_system(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    (scored, _, first), (_, _, second) = run_ranks(_with_a_store_of_its_own, 2, config)
    assert scored and first == second
    shards = [list(Path(f"{tmp_path}/store-{rank}").glob("*/*.parquet")) for rank in (0, 1)]
    assert [len(files) for files in shards] == [1, 1]
    # each host holds what it scored, and together they miss nothing
    again = run_ranks(_with_a_store_of_its_own, 2, config)
    assert [(scored, total) for scored, _, total in again] == [(0, first), (0, first)]


def _memory(config: Config) -> dict[str, int]:
    process = psutil.Process()
    module = importlib.import_module("kto_dist.prepare")
    prepared = prepare(config, Console())
    seen = {"before": process.memory_info().rss}

    class Watched(module.Reference):
        def close(self):
            seen["loaded"] = process.memory_info().rss
            super().close()

    module.Reference = Watched
    score_reference(prepared, Console())
    seen["after"] = process.memory_info().rss
    return seen


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (3, "none"), (3, "cpu")])
def test_the_reference_leaves_memory_when_it_has_scored(tmp_path, tiny_log, stage, offload):
    # 380 MB of weights: large against the tens of MB by which an allocator's leftovers differ from pass to pass
    model = save_tiny(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    config = tiny_config(
        tmp_path, model, tiny_log, reference__zero_stage=stage, reference__offload=offload, train__max_steps=1
    )
    warm_up = tiny_config(
        tmp_path,
        model,
        tiny_log,
        reference__store=str(tmp_path / "other"),
        reference__zero_stage=stage,
        train__max_steps=1,
    )
    (seen,) = run_ranks(_memory_of_second_pass, 1, warm_up, config)
    size = (model / "model.safetensors").stat().st_size
    assert seen["loaded"] - seen["before"] > 0.8 * size
    assert seen["after"] - seen["before"] < 0.15 * size


def _memory_of_second_pass(warm_up: Config, config: Config) -> dict[str, int]:
    """The first pass of a process leaves behind what libraries load on first use; the second shows the model alone."""
    scored_and_found(warm_up)
    return _memory(config)

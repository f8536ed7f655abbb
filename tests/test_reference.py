"""The reference's log-probs: the right values, computed once, whatever the policy's settings are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from reference_runs import logps_of_pairs, scored_and_found, with_forward
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.reference import logps
from kto_dist.reference.pairs import wanted_pairs
from kto_dist.reference.setup import local_folder
from kto_dist.training.config import Config
from kto_dist.training.prepare import prepare


@pytest.mark.parametrize(
    ("stage", "packing", "offload"), [(0, False, "none"), (0, True, "none"), (3, True, "none"), (3, False, "cpu")]
)
def test_scores_are_the_log_probs_of_the_model_itself(tmp_path, tiny_model, tiny_log, stage, packing, offload):
    settings = {"reference__zero_stage": stage, "reference__packing": packing, "reference__offload": offload}
    config = tiny_config(tmp_path, tiny_model, tiny_log, **settings)
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
    ("changes", "world"),
    [
        ({"reference__tokens_per_batch": 128, "deepspeed__zero_stage": 3, "reference__zero_stage": 3}, 1),
        ({"reference__packing": True, "reference__logits_mebibytes": 1}, 2),
        ({"objective__loss": "apo_zero_unpaired"}, 1),
    ],
)
def test_a_change_that_leaves_the_pairs_alone_scores_nothing(tmp_path, tiny_model, tiny_log, changes, world):
    first = tiny_config(tmp_path, tiny_model, tiny_log)
    scored, found = run_ranks(scored_and_found, 2, first)[0]
    assert scored and not found
    scored, found = run_ranks(scored_and_found, world, tiny_config(tmp_path, tiny_model, tiny_log, **changes))[0]
    assert not scored and found


def test_added_rows_cost_only_the_new_pairs(tmp_path, tiny_model):
    rows = thumbs(60, 20)
    # no z0, so the pairs are the rows themselves
    changes = {"objective__loss": "apo_zero_unpaired", "train__max_steps": None, "train__epochs": 1.0}
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
    for shard in (tmp_path / "store").glob("*/*.parquet"):
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


# Every setting of the policy that does not decide which pairs there are, with another value than the default.
POLICY = {
    "adapter__type": "lora",
    "model__gradient_checkpointing": True,
    "model__trust_remote_code": True,
    "objective__beta": 0.5,
    "objective__desirable_weight": 3.0,
    "objective__undesirable_weight": 2.0,
    "objective__sft_weight": 0.5,
    "train__output": "elsewhere",
    "train__tokens_per_microbatch": 100,
    "train__packing": True,
    "train__lr": 1e-6,
    "train__deterministic": True,
    "train__profile": True,
    "train__schedule": "linear",
    "train__warmup": 3.0,
    "train__betas": (0.8, 0.9),
    "train__eps": 1e-3,
    "train__weight_decay": 0.1,
    "train__clip": 0.5,
    "train__dtype": "bf16",
    "train__logits_mebibytes": 1,
    "train__logits_dtype": "fp32",
    "deepspeed__zero_stage": 3,
    "deepspeed__offload_optimizer": "cpu",
    "deepspeed__offload_parameters": "cpu",
    "deepspeed__nvme_path": "/disk",
    "deepspeed__config": "options.json",
    "tracking__experiment": "other",
    "tracking__run_name": "other",
    "tracking__log_model": True,
    "tracking__register_as": "other",
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 1,
    "checkpoint__background": True,
    "checkpoint__resume": False,
    "evaluate__every_steps": 1,
    "evaluate__tokens": 500,
    "health__max_kl": 1.0,
    "health__patience": 1,
    "health__on_trouble": "warn",
    "cluster__timeout": 60.0,
    "cluster__grace": 60.0,
    "cluster__min_nodes": 2,
}
# These are about rows and pairs, about where MLflow is, or (loss: tested above) leave pairs out.
NOT_POLICY = {
    "model__path",
    "model__gguf_file",
    "objective__loss",
    "objective__kl_pairs_per_step",
    "train__global_batch",
}
NOT_POLICY |= {"objective__router_loss"}  # of mixtures of experts alone: tests/test_router.py
NOT_POLICY |= {"objective__pairs", "objective__label_smoothing"}  # of dpo alone: tests/test_dpo.py
NOT_POLICY |= {"model__kernels"}  # the reference follows it, so that step 0 holds: tests/test_layer_kernels.py
NOT_POLICY |= {
    "train__epochs",
    "train__max_steps",
    "train__seed",
    "tracking__enabled",
    "tracking__uri",
    "tracking__report",
}
NOT_POLICY |= {"checkpoint__best", "train__stop_after"}  # with held-out rows alone: tests/test_best.py
# with a type alone; what a run starts from is a part of its reference: tests/test_adapter_runs.py
NOT_POLICY |= {f"adapter__{name}" for name in ("rank", "alpha", "targets", "start", "merged")}
NOT_POLICY |= {"health__rules"}  # a user's own code: tests/test_trends.py
NOT_POLICY |= {
    f"judge__{name}"  # of answers alone: tests/test_judges.py
    for name in (
        *("by", "function", "command", "base_url", "model", "key", "instructions", "max_tokens", "parallel"),
        "cache",
    )
}
NOT_POLICY |= {
    f"answers__{name}"  # with held-out rows alone: tests/test_samples.py
    for name in (
        *("while_training", "in_evaluate", "max_tokens", "temperature", "top_p", "batch", "cache", "model_url"),
        *("model_name", "reference_url", "reference_name", "key", "every_steps"),
    )
}
# The reference follows them unless it has its own.
NOT_POLICY |= {"model__attention", "model__quantization"}


def test_every_setting_of_the_policy_is_tried_below():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    every = {f"{name}__{key}" for name, kind in sections.items() for key in kind.model_fields}
    mine = {name for name in every if name.startswith(("reference__", "data__"))}
    assert every - mine - NOT_POLICY == set(POLICY)


def _changed_one_by_one(config: Config, settings: dict) -> list[str]:
    """The settings with which something is scored again."""
    guilty = []
    for name, value in settings.items():
        section, key = name.split("__")
        part = getattr(config, section).model_copy(update={key: value})
        if scored_and_found(config.model_copy(update={section: part}))[0]:
            guilty.append(name)
    return guilty


def test_no_setting_of_the_policy_makes_the_reference_score_again(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    run_ranks(scored_and_found, 1, config)
    assert run_ranks(_changed_one_by_one, 1, config, POLICY) == [[]]


def test_settings_of_the_policy_change_no_value_in_any_bit(tmp_path, tiny_model, tiny_log):
    before = tiny_config(tmp_path, tiny_model, tiny_log)
    # each of them as far as it concerns a pass; a config that DeepSpeed would have to read is not written for it, and
    # fp32 logits cannot be had from bf16 on the CPU
    others = ("tracking", "deepspeed__config", "train__logits_dtype")
    settings = {key: value for key, value in POLICY.items() if not key.startswith(others)}
    after = tiny_config(tmp_path, tiny_model, tiny_log, **settings, reference__store=str(tmp_path / "other"))
    assert (run_ranks(logps_of_pairs, 1, before)[0] == run_ranks(logps_of_pairs, 1, after)[0]).all()


def _values_and_tokens(config: Config) -> tuple[np.ndarray, int]:
    """And how many tokens the model has read since it was checked, but for the first of each row: padding has no
    position of its own."""
    read = []

    def counting(forward):
        def counted(**batch):
            if batch["position_ids"] is not None:
                read.append(int((batch["position_ids"] > 0).sum()))
            return forward(**batch)

        return counted

    def forgotten(check):
        def checked(*arguments, **settings):
            result = check(*arguments, **settings)
            read.clear()
            return result

        return checked

    logps.check_scoring, logps.sharing_is_exact = forgotten(logps.check_scoring), forgotten(logps.sharing_is_exact)
    return logps_of_pairs(config, engine=with_forward(counting)), sum(read)


@pytest.mark.parametrize("stage", (0, 3))
def test_shared_prompts_give_the_same_values_from_fewer_tokens(tmp_path, tiny_model, tiny_log, stage):
    found = {}
    for share in (False, True):
        config = tiny_config(
            tmp_path,
            tiny_model,
            tiny_log,
            reference__share_prefixes=share,
            reference__store=str(tmp_path / f"store-{share}"),
            reference__zero_stage=stage,
        )
        ranks = run_ranks(_values_and_tokens, 2, config)
        assert (ranks[0][0] == ranks[1][0]).all()
        found[share] = ranks[0][0], sum(read for _, read in ranks)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][1] < 0.9 * found[False][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference__share_prefixes": True, "reference__attention": "eager"}, "share_prefixes is true.*use auto"),
        ({"reference__device": "cuda"}, "reference.device .cuda. needs a GPU.*use auto"),
    ],
)
def test_what_the_reference_cannot_do_is_refused_before_it_is_loaded(tmp_path, tiny_model, tiny_log, changes, message):
    if torch.cuda.is_available() and "reference__device" in changes:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        run_ranks(scored_and_found, 1, tiny_config(tmp_path, tiny_model, tiny_log, **changes))


@pytest.mark.parametrize(
    "policy", [{"train__dtype": "bf16", "train__logits_dtype": "fp32"}, {"objective__desirable_weight": 0.001}]
)
def test_what_this_machine_or_the_loss_makes_of_the_policy_is_nothing_to_the_reference(
    tmp_path, tiny_model, tiny_log, policy
):
    """fp32 logits of a bf16 model are a GPU's; the reference pass runs where there is none."""
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, **policy)
    assert run_ranks(scored_and_found, 1, config)[0][0] > 0


def test_without_z0_held_out_rows_are_scored_alone(tmp_path, tiny_model, tiny_log):
    changes = {
        "objective__loss": "apo_zero_unpaired",
        "data__heldout": 0.3,
        "train__max_steps": None,
        "train__epochs": 1.0,
    }
    scored, _ = run_ranks(scored_and_found, 1, tiny_config(tmp_path, tiny_model, tiny_log, **changes))[0]
    assert scored == len(tiny_log.read_text().splitlines())


@pytest.mark.parametrize("safe", (True, False))
def test_weights_in_the_older_format_are_fetched_only_where_there_are_no_others(tmp_path, safe):
    asked = []

    def download(path, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        for name in ("model.safetensors",) if safe else ("pytorch_model.bin",):
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    assert local_folder("some/model", None, fetch=download) == tmp_path
    assert len(list(tmp_path.iterdir())) == 1
    assert any(pattern.startswith("pytorch") for pattern in asked) != safe

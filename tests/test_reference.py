"""The reference pass and its store: right values, computed once, whole shards, memory given back."""

import importlib
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from ranks import run_ranks
from tiny import save_tiny, thumbs, write_jsonl
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.reference.scores import lazily, score_reference
from kto_dist.reference.scoring import Outcome, Scorer, wanted_pairs
from kto_dist.training.config import Config
from kto_dist.training.prepare import find, prepare, wanted


def scored_and_found(config: Config) -> tuple[int, int]:
    """On every rank: how many pairs a pass scores, and how many it finds in the store."""
    outcome = importlib.import_module("kto_dist.training.precompute").precompute(config)
    return outcome.pairs - outcome.hits, outcome.hits


def logps_of_pairs(config: Config) -> np.ndarray:
    prepared = prepare(config, Console())
    return score_reference(wanted(prepared), *find(prepared, Console()), Console()).train(
        *wanted_pairs(prepared.plan, prepared.train)
    )


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
        ({"kto__loss": "apo_zero_unpaired"}, 1),
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
    "model__gradient_checkpointing": True,
    "kto__beta": 0.5,
    "kto__desirable_weight": 3.0,
    "kto__undesirable_weight": 2.0,
    "train__output": "elsewhere",
    "train__tokens_per_microbatch": 100,
    "train__packing": True,
    "train__lr": 1e-6,
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
    "checkpoint__resume": False,
    "evaluate__every_steps": 1,
    "health__max_kl": 1.0,
    "health__patience": 1,
    "health__on_trouble": "warn",
}
# These are about rows and pairs, about where MLflow is, or (loss: tested above) leave pairs out.
NOT_POLICY = {"model__path", "model__gguf_file", "kto__loss", "kto__kl_pairs_per_step", "train__global_batch"}
NOT_POLICY |= {"train__epochs", "train__max_steps", "train__seed", "tracking__enabled", "tracking__uri"}
# The reference follows them unless it has its own.
NOT_POLICY |= {"model__attention"}


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
    module = importlib.import_module("kto_dist.reference.scoring")
    score, read = module.completion_logps, []
    module.completion_logps = lambda forward, batch, *more: (read.append(batch.tokens), score(forward, batch, *more))[1]
    try:
        return logps_of_pairs(config), sum(read)
    finally:
        module.completion_logps = score


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
        found[share] = ranks[0][0], sum(tokens for _, tokens in ranks)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][1] < 0.85 * found[False][1]


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


def _with_a_full_disk_on_one_rank(config: Config) -> str:
    module = importlib.import_module("kto_dist.reference.scoring")

    def full(*arguments):
        raise UserError("reference.store is full: free some space")

    if os.environ["RANK"] == "1":
        module.Store.add = full
    try:
        scored_and_found(config)
    except UserError as error:
        return str(error)
    return "nothing"


def test_trouble_of_one_rank_with_its_store_ends_all_of_them_with_its_message(tmp_path, tiny_model, tiny_log):
    said = run_ranks(_with_a_full_disk_on_one_rank, 2, tiny_config(tmp_path, tiny_model, tiny_log), timeout=60)
    assert said == ["reference.store is full: free some space"] * 2


@pytest.mark.parametrize(
    "policy", [{"train__dtype": "bf16", "train__logits_dtype": "fp32"}, {"kto__desirable_weight": 0.001}]
)
def test_what_this_machine_or_the_loss_makes_of_the_policy_is_nothing_to_the_reference(
    tmp_path, tiny_model, tiny_log, policy
):
    """fp32 logits of a bf16 model are a GPU's; the reference pass runs where there is none."""
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, **policy)
    assert run_ranks(scored_and_found, 1, config)[0][0] > 0


def test_hosts_may_differ_in_what_the_policy_alone_uses(tmp_path, tiny_model, tiny_log):
    configs = [
        tiny_config(tmp_path / name, tiny_model, tiny_log, train__dtype=dtype, train__max_steps=1)
        for name, dtype in (("a", "fp32"), ("b", "bf16"))
    ]
    assert run_ranks(_as_hosts, 2, configs, timeout=60) == ["nothing", "nothing"]


def test_without_z0_held_out_rows_are_scored_alone(tmp_path, tiny_model, tiny_log):
    changes = {"kto__loss": "apo_zero_unpaired", "data__heldout": 0.3, "train__max_steps": None, "train__epochs": 1.0}
    scored, _ = run_ranks(scored_and_found, 1, tiny_config(tmp_path, tiny_model, tiny_log, **changes))[0]
    assert scored == len(tiny_log.read_text().splitlines())


def _with_weights_that_change(config: Config, other: Path) -> str:
    """What is said when another model lies in the folder by the time that the weights are loaded."""
    module = importlib.import_module("kto_dist.reference.scores")

    class Late(module.Reference):
        def __init__(self, *arguments, **settings):
            (other / "model.safetensors").replace(Path(config.model.path) / "model.safetensors")
            super().__init__(*arguments, **settings)

    module.Reference, real = Late, module.Reference
    try:
        scored_and_found(config)
    except UserError as error:
        return str(error)
    finally:
        module.Reference = real
    return "nothing"


def test_weights_that_change_while_they_are_loaded_are_not_scored_under_their_old_name(tmp_path, tiny_log):
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "other", seed=1)
    config = tiny_config(tmp_path, model, tiny_log)
    (said,) = run_ranks(_with_weights_that_change, 1, config, other)
    assert said.startswith(f"the weights in model.path ({model}) changed while they were loaded")
    assert not list((tmp_path / "store").rglob("*.parquet"))


def _terminated(config: Config) -> None:
    module = importlib.import_module("kto_dist.reference.scoring")
    score = module.completion_logps

    def end(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    module.completion_logps = end
    scored_and_found(config)


def test_a_pass_that_is_terminated_ends_its_mlflow_run(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__enabled=True)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_terminated, 1, config)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kto").experiment_id])
    assert run.info.status == "KILLED"


def _progress_of(config: Config) -> tuple[list[dict], int]:
    module = importlib.import_module("kto_dist.reference.scoring")
    module.FIRST_SHARD = module.LARGEST_SHARD = 8
    seen: list = []
    prepared = prepare(config, Console())
    scores = score_reference(wanted(prepared), *find(prepared, Console()), Console(), seen.append)
    return [asdict(progress) for progress in seen], scores.outcome.scored_once


@pytest.mark.parametrize("share", (False, True))
def test_progress_ends_at_the_last_pair_and_never_runs_backwards(tmp_path, tiny_model, tiny_log, share):
    # micro-batches of several pairs and one in a list of its own: ranks are never equally far
    config = tiny_config(
        tmp_path, tiny_model, tiny_log, reference__share_prefixes=share, data__heldout=0.3, train__max_steps=3
    )
    for seen, scored in run_ranks(_progress_of, 2, config):
        steps = [point["before"] + point["done"] for point in seen]
        assert steps == sorted(steps) and steps[-1] == scored
        assert len({point["before"] for point in seen}) == 2
        assert seen[-1]["done"] == seen[-1]["total"] and seen[-1]["seconds_left"] == 0
        assert all(point["done"] <= point["total"] and point["seconds_left"] >= 0 for point in seen)
        assert all(point["rows_per_second"] > 0 and point["tokens_per_second"] > 0 for point in seen)
        # where ranks have met, what is done is known exactly
        assert len(set(steps)) > 5


def _sizes_of_windows(config: Config, seconds_a_pair: float, seconds_a_forward: float) -> list[int]:
    """How many pairs of all ranks are between two meetings, by a clock that only the model moves."""
    module = importlib.import_module("kto_dist.reference.scoring")
    clock, sizes = [0.0], []
    score, begin = module.completion_logps, module._Meter.begin

    def slow(forward, batch, *more):
        clock[0] += seconds_a_forward + seconds_a_pair * batch.lengths.numel()
        return score(forward, batch, *more)

    module.completion_logps = slow
    module.time.monotonic, real = lambda: clock[0], module.time.monotonic
    module._Meter.begin = lambda meter, rows: (sizes.append(rows), begin(meter, rows))[1]
    try:
        logps_of_pairs(config)
    finally:
        module.time.monotonic = real
    return sizes


def test_a_slow_reference_has_shards_of_few_pairs(tmp_path, tiny_model, tiny_log):
    settings = {"reference__share_prefixes": False, "reference__packing": False, "train__max_steps": 2}
    # a micro-batch of one or two of the longer pairs
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=96, **settings)
    (sizes,) = run_ranks(_sizes_of_windows, 1, config, 20.0, 0.0)
    # 20 s a pair: three a minute; the first window is made before the rate is known
    assert sizes[0] == 16 and sizes[1:4] == [3, 3, 3]


def test_where_a_forward_has_a_price_of_its_own_a_shard_is_a_whole_micro_batch(tmp_path, tiny_model, tiny_log):
    settings = {"reference__share_prefixes": False, "reference__packing": False, "train__max_steps": 5}
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=256, **settings)
    (sizes,) = run_ranks(_sizes_of_windows, 1, config, 0.0, 100.0)
    # rows of at most 59 tokens, the longest first: four a micro-batch, and more of the shorter ones
    assert sizes[0] == 16 and min(sizes[1:-1]) >= 4 and sizes[-2] > sizes[1]


def test_a_precompute_is_an_mlflow_run_with_its_throughput(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__enabled=True, data__heldout=0.3)
    (scored, found), _ = run_ranks(scored_and_found, 2, config)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kto").experiment_id])
    assert run.info.run_name == "precompute-run" and run.info.status == "FINISHED"
    assert run.data.tags["job"] == "precompute" and run.data.params["kto.beta"] == "0.1"
    metrics = run.data.metrics
    assert (metrics["reference/scored"], metrics["reference/from_store"]) == (scored, found)
    assert metrics["reference/rows_per_second"] > 0 and metrics["reference/tokens_per_second"] > 0
    assert metrics["reference/seconds_left"] == 0 and metrics["reference/share_done"] == 1
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "reference/share_done")]
    assert steps == sorted(steps) and steps[-1] <= scored


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
    assert all(shards) and len(shards[0]) == len(shards[1])
    # each host holds what it scored, and together they miss nothing
    again = run_ranks(_with_a_store_of_its_own, 2, config)
    assert [(scored, total) for scored, _, total in again] == [(0, first), (0, first)]


def _with_a_rank_that_differs(config: Config, trouble: str) -> tuple[str, list[bool | None], int]:
    """What was said, whether prompts were shared, and how many references were loaded but not closed."""
    module = importlib.import_module("kto_dist.reference.scores")
    still_open, shared, second = [], [], os.environ["RANK"] == "1"

    class Watched(module.Reference):
        def __init__(self, *arguments, **settings):
            if trouble == "loading" and second:
                raise UserError("the weights are damaged")
            super().__init__(*arguments, **settings)
            still_open.append(self)

        def close(self, **settings):
            super().close(**settings)
            still_open.remove(self)

    def failing(*_, **__):
        raise UserError("packing does not work")

    module.Reference, scorer = Watched, module.Scorer
    module.Scorer = lambda **facts: (shared.append(facts["share_prefixes"]), scorer(**facts))[1]
    if second and trouble == "checking":
        module.check_scoring = failing
    if second and trouble == "sharing":
        module.sharing_is_exact = lambda *_: False
    try:
        scored_and_found(config)
        said = ""
    except UserError as error:
        said = str(error)
    return said, shared, len(still_open)


@pytest.mark.parametrize(
    ("trouble", "share", "said", "shared"),
    [
        ("loading", "auto", "the weights are damaged", []),
        ("checking", "auto", "packing does not work", []),
        ("sharing", True, "reference.share_prefixes is true, but completions of one prompt see each other", []),
        ("sharing", "auto", "", [False]),
    ],
)
def test_one_ranks_trouble_with_its_model_is_everyones_and_leaves_none_in_memory(
    tmp_path, tiny_model, tiny_log, trouble, share, said, shared
):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, reference__share_prefixes=share)
    for message, decided, still_open in run_ranks(_with_a_rank_that_differs, 2, config, trouble, timeout=60):
        assert message.startswith(said) and bool(message) == bool(said)
        assert decided == shared and still_open == 0


@pytest.mark.parametrize("error", (None, UserError("full"), KeyboardInterrupt()))
def test_an_error_in_a_pass_closes_the_reference_without_waiting_for_other_ranks(error):
    closed = []

    class Loaded:
        def close(self, *, wait: bool = True):
            closed.append(wait)

    def one_pass():
        with lazily(lambda: Scorer(reference=Loaded(), share_prefixes=None)) as engine:
            assert engine() is engine()
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            one_pass()
    else:
        one_pass()
    assert closed == [error is None]


def test_rates_count_pairs_with_equal_tokens_once():
    outcome = Outcome(pairs=10, hits=2, scored_once=4, scored_tokens=40, scoring_seconds=2.0, seconds=3.0, shared=False)
    figures = (outcome + outcome).figures()
    assert (figures["reference/scored"], figures["reference/rows_per_second"]) == (16, 2.0)
    assert figures["reference/tokens_per_second"] == 20.0


def _as_hosts(configs: list[Config]) -> str:
    """Every rank is a host of its own, with files and settings of its own."""
    os.environ["LOCAL_RANK"] = "0"
    try:
        scored_and_found(configs[int(os.environ["RANK"])])
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("the reference's weights", {}),
        ("what data.train gives as tokens", {}),
        ("reference.dtype", {"reference__dtype": "bf16"}),
        ("reference.attention", {"reference__attention": "eager"}),
        ("reference.packing", {"reference__packing": True}),
        ("reference.share_prefixes", {"reference__share_prefixes": True}),
    ],
)
def test_hosts_that_differ_are_refused_before_anything_is_stored(tmp_path, tiny_model, tiny_log, what, changes):
    """`auto` may pick differently on hosts with different devices, and a copy of a model may be an older one."""
    model, log = tiny_model, tiny_log
    if what == "the reference's weights":
        model = save_tiny(tmp_path / "model", seed=1)
    elif what == "what data.train gives as tokens":
        log = write_jsonl(tmp_path / "log.jsonl", thumbs(60, 20, seed=7))
    plain = {"reference__share_prefixes": False, "reference__packing": False}
    configs = [
        tiny_config(tmp_path / "a", tiny_model, tiny_log, **plain),
        tiny_config(tmp_path / "b", model, log, **{**plain, **changes}),
    ]
    said = run_ranks(_as_hosts, 2, configs, timeout=60)
    assert said[0] == said[1] and said[0].startswith(f"{what} differs between hosts (rank 0: ")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("safe", (True, False))
def test_weights_in_the_older_format_are_fetched_only_where_there_are_no_others(tmp_path, monkeypatch, safe):
    module, asked = importlib.import_module("kto_dist.reference.setup"), []

    def download(path, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        for name in ("model.safetensors",) if safe else ("pytorch_model.bin",):
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert module.local_folder("some/model", None) == tmp_path
    assert len(list(tmp_path.iterdir())) == 1
    assert any(pattern.startswith("pytorch") for pattern in asked) != safe


def _memory(config: Config) -> dict[str, int]:
    process = psutil.Process()
    module = importlib.import_module("kto_dist.reference.scores")
    prepared = prepare(config, Console())
    seen = {"before": process.memory_info().rss}

    class Watched(module.Reference):
        def close(self, **settings):
            seen["loaded"] = process.memory_info().rss
            super().close(**settings)

    module.Reference = Watched
    score_reference(wanted(prepared), *find(prepared, Console()), Console())
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


def _allocated(config: Config) -> dict[str, int]:
    module = importlib.import_module("kto_dist.reference.scores")
    prepared = prepare(config, Console())
    seen = {"before": torch.cuda.memory_allocated()}

    class Watched(module.Reference):
        def close(self, **settings):
            seen["loaded"] = torch.cuda.memory_allocated()
            super().close(**settings)

    module.Reference = Watched
    score_reference(wanted(prepared), *find(prepared, Console()), Console())
    return {**seen, "after": torch.cuda.memory_allocated()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="allocated bytes are those of a GPU")
def test_the_reference_leaves_the_gpus_memory_when_it_has_scored(tmp_path, tiny_log):
    model = save_tiny(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)
    (seen,) = run_ranks(_allocated, 1, tiny_config(tmp_path, model, tiny_log, train__max_steps=1))
    size = (model / "model.safetensors").stat().st_size
    assert seen["loaded"] - seen["before"] > 0.8 * size
    # a matmul's workspace stays for the process
    assert seen["after"] - seen["before"] < 0.15 * size


@pytest.mark.soak
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_reference_whose_weights_lie_on_a_disk_scores_alike_and_leaves_the_disk_empty(tmp_path, tiny_log, ranks):
    """Soak, because DeepSpeed compiles its asynchronous I/O first, which takes minutes once."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio and its headers (apt-get install libaio-dev)")
    disk = tmp_path / "disk"
    disk.mkdir()
    # DeepSpeed keeps parameters of less than 100,000 numbers in memory
    model = save_tiny(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=2)
    plain, swapped = (
        tiny_config(tmp_path, model, tiny_log, reference__store=str(tmp_path / name), **settings)
        for name, settings in (
            ("plain", {}),
            ("swapped", {"reference__offload": "nvme", "reference__nvme_path": str(disk)}),
        )
    )
    expected = run_ranks(logps_of_pairs, ranks, plain)
    found = run_ranks(_with_files_seen, ranks, swapped, disk, timeout=600)
    assert all(np.allclose(own, other, rtol=1e-5, atol=1e-5) for (own, _), other in zip(found, expected, strict=True))
    assert all(seen > 1e6 for _, seen in found) and not any(disk.iterdir())


def _with_files_seen(config: Config, disk: Path) -> tuple[np.ndarray, int]:
    """Values, and how many bytes lay on the disk when the reference was loaded."""
    module = importlib.import_module("kto_dist.reference.scores")
    seen = [0]

    class Watched(module.Reference):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            seen[0] = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())

    module.Reference, real = Watched, module.Reference
    try:
        return logps_of_pairs(config), seen[0]
    finally:
        module.Reference = real


def _memory_of_second_pass(warm_up: Config, config: Config) -> dict[str, int]:
    """The first pass of a process leaves behind what libraries load on first use; the second shows the model alone."""
    scored_and_found(warm_up)
    return _memory(config)


def _warnings_of_rank_0(config: Config) -> list[str]:
    """What is told where the store of rank 1 alone has something to say."""
    module, said = importlib.import_module("kto_dist.reference.scores"), []

    class Talking(module.Store):
        def __init__(self, *arguments, warn, **settings):
            super().__init__(*arguments, warn=warn, **settings)
            warn("of everyone")
            if os.environ["RANK"] == "1":
                warn("of rank 1")

    module.Store, real, console = Talking, module.Store, Console()
    console.warn = said.append
    try:
        prepared = prepare(config, Console())
        score_reference(wanted(prepared), *find(prepared, Console()), console)
    finally:
        module.Store = real
    return said


def test_what_another_ranks_store_has_to_say_is_told_once(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    assert run_ranks(_warnings_of_rank_0, 2, config)[0] == ["of everyone", "of rank 1"]

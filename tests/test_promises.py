"""The promises of the design, on whole runs: the batch decides, step 0, killed anywhere, completion rows only."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from tiny_runs import TIMED, metrics_of, tiny_config, train_all, train_and_die_after, weights_of
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.data.batch import microbatches, step_kl_pairs, step_rows
from kto_dist.training.config import Config
from kto_dist.training.loop import train
from kto_dist.training.prepare import prepare, prepare_training
from kto_dist.training.step import StepResult

WORLDS = (1, 2, 4)
STAGES = (0, 2, 3)
TOKENS = (96, 200, 4096)
PACKING = (False, True)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trajectories(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_log: Path
) -> dict[tuple[int, int, int, bool], Config]:
    """Five steps in every combination of world size, ZeRO stage, tokens a micro-batch and packing."""
    folder = tmp_path_factory.mktemp("trajectories")
    configs = {}
    for world, stage, tokens, packing in itertools.product(WORLDS, STAGES, TOKENS, PACKING):
        configs[world, stage, tokens, packing] = tiny_config(
            folder,
            tiny_model,
            tiny_log,
            train__output=str(folder / f"{world}-{stage}-{tokens}-{packing}"),
            train__tokens_per_microbatch=tokens,
            train__packing=packing,
            deepspeed__zero_stage=stage,
        )
    for world in WORLDS:
        run_ranks(train_all, world, [config for key, config in configs.items() if key[0] == world], timeout=900)
    return configs


# the first of them waits for all trajectories, two minutes where another file of tests has a core
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_batch_decides_not_the_cluster(trajectories, world, stage, tokens, packing):
    plain, config = trajectories[1, 0, 4096, False], trajectories[world, stage, tokens, packing]
    for expected, found in zip(metrics_of(plain), metrics_of(config), strict=True):
        for name in ("loss", "kl_raw", "grad_norm", "rewards/desirable", "rewards/undesirable"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6), (expected["step"], name)
    expected, found = weights_of(plain), weights_of(config)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.norm(found[name] - tensor) <= TOLERANCE * torch.norm(tensor), name


def test_a_micro_batch_is_never_cut_the_same_way_for_two_numbers_of_tokens(trajectories):
    # otherwise the comparison above would compare a run with itself
    first = {tokens: _microbatches_of_first_step(trajectories[1, 0, tokens, True]) for tokens in TOKENS}
    assert len(set(first.values())) == len(TOKENS)


def _microbatches_of_first_step(config: Config) -> int:
    prepared = prepare_training(config, Console())
    rows = step_rows(prepared.plan, 0)
    return len(microbatches(prepared.train, rows, rows, prepared.cutting, rank=0, ranks=1))


@pytest.mark.parametrize("world", (1, 2))
def test_before_the_first_update_the_policy_is_the_reference(trajectories, world):
    first = metrics_of(trajectories[world, 2, 4096, False])[0]
    weights = json.loads((Path(trajectories[world, 2, 4096, False].train.output) / "summary.json").read_text())
    weights = weights["data"]["class_weights"]
    expected = sum(weights[name] * 0.5 * first[f"rows/{name}"] for name in weights) / first["rows/all"]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["kl_raw"] == pytest.approx(0, abs=1e-5)
    for name in ("desirable", "undesirable"):
        assert first[f"rewards/{name}"] == pytest.approx(0, abs=1e-5)


def test_an_fp32_policy_may_have_a_bf16_reference(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, reference__dtype="bf16")
    run_ranks(train_all, 1, [config])
    assert abs(metrics_of(config)[0]["kl_raw"]) < 0.5


def test_at_step_0_no_row_ranks_above_another_however_the_precision_rounds(tmp_path, tiny_model, tiny_log):
    precision = {"train__dtype": "bf16", "reference__dtype": "bf16"}
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1, data__heldout=0.3, **precision)
    ((summary,),) = run_ranks(train_all, 1, [config])
    before, after, step = *summary["heldout"].values(), metrics_of(config)[0]
    assert {before["auc"], before["accuracy/all"], before["accuracy/desirable"], step["accuracy/all"]} == {0.5}
    assert after["auc"] not in (0.5, None)  # and after an update all differences count


@pytest.mark.parametrize("world", (1, 2))
def test_a_doctored_store_is_refused_before_the_first_update(tmp_path, tiny_model, tiny_log, world):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    run_ranks(train_all, 1, [config])
    shards = sorted((tmp_path / "store").glob("*/*.parquet"))
    assert shards
    for shard in shards:
        table = pq.read_table(shard)
        # one value, and by less than a nat: what a store of a slightly different model would hold
        wrong = table["logp"].to_numpy() - 0.5
        data = pa.BufferOutputStream()
        pq.write_table(table.set_column(1, table.field("logp"), pa.array(wrong)), data)
        content = data.getvalue().to_pybytes()
        shard.unlink()
        (shard.parent / f"{hashlib.sha256(content).hexdigest()}.parquet").write_bytes(content)
    shutil.rmtree(config.train.output)
    with pytest.raises(UserError, match=r"before the first update the policy must equal its reference.*delete"):
        run_ranks(train_all, world, [config])


def test_a_policy_with_dropout_is_refused_before_the_first_update(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=1)
    with pytest.raises(UserError, match="Scored twice it has two log-probs: the policy is random"):
        run_ranks(_train_with_dropout, 1, config)


def _is_head(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and module.out_features == 258


def _train_with_dropout(config: Config) -> None:
    def leaky(module, inputs):
        # where there are gradients: an earlier check, which needs none, would notice as well
        if _is_head(module) and torch.is_grad_enabled():
            return (torch.nn.functional.dropout(inputs[0], 0.1), *inputs[1:])
        return None

    with register_module_forward_pre_hook(leaky):
        train_all([config])


@pytest.mark.parametrize(("world", "stage", "dtype"), [(1, 0, "fp32"), (2, 2, "fp32"), (2, 3, "fp32"), (2, 2, "bf16")])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, tiny_model, tiny_log, world, stage, dtype):
    shared = {
        "deepspeed__zero_stage": stage,
        "train__dtype": dtype,
        "reference__dtype": dtype,
        "train__lr": 1e-4,
        "train__max_steps": 8,
    }
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **shared)
    broken = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "broken"), checkpoint__every_steps=3, **shared
    )
    run_ranks(train_all, world, [whole])
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, world, broken, 5)
    assert len(metrics_of(broken)) == 5
    run_ranks(train_all, world, [broken])
    for expected, found in zip(metrics_of(whole), metrics_of(broken), strict=True):
        for name in expected.keys() - TIMED:
            assert found[name] == expected[name], (expected["step"], name)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(weights_of(broken)[name], tensor), name


@pytest.mark.parametrize("stage", (pytest.param(2, marks=pytest.mark.soak), 3))
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, tiny_model, tiny_log, stage):
    shared = {"train__max_steps": 6, "deepspeed__zero_stage": stage}
    whole = tiny_config(tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "whole"), **shared)
    moved = tiny_config(
        tmp_path, tiny_model, tiny_log, train__output=str(tmp_path / "moved"), checkpoint__every_steps=3, **shared
    )
    run_ranks(train_all, 1, [whole])
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train_and_die_after, 2, moved, 4)
    run_ranks(train_all, 1, [moved])
    for expected, found in zip(metrics_of(whole), metrics_of(moved), strict=True):
        for name in ("loss", "kl_raw", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-6)


@pytest.mark.parametrize("packing", PACKING)
def test_only_completion_rows_reach_the_head_and_padding_reaches_nothing_when_packed(
    tmp_path, tiny_model, tiny_log, packing
):
    config = tiny_config(tmp_path, tiny_model, tiny_log, train__max_steps=2, train__packing=packing)
    (rows_at_head, positions), prepared = run_ranks(_rows_of_second_step, 1, config)[0], prepare(config, Console())
    rows = step_rows(prepared.plan, 1)
    prompts, completions = step_kl_pairs(prepared.plan, 1, rows, prepared.train.prompt_group)
    examples = prepared.train
    assert rows_at_head == examples.completion_lengths[rows].sum() + examples.completion_lengths[completions].sum()
    tokens = (
        examples.prompt_lengths[rows].sum()
        + examples.completion_lengths[rows].sum()
        + examples.prompt_lengths[prompts].sum()
        + examples.completion_lengths[completions].sum()
    )
    assert (positions == tokens) if packing else (positions > tokens)


def _rows_of_second_step(config: Config) -> tuple[int, int]:
    """Rows at the LM head and positions in the decoder; before the first step the model is checked."""
    rows, positions = [], []

    def counting(module, inputs):
        if _is_head(module):
            rows.append(inputs[0].shape[:-1].numel())
        elif isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            positions.append(inputs[0].shape[:-1].numel())

    def stepped(result: StepResult) -> None:
        if result.step == 1:
            rows.clear()
            positions.clear()

    with register_module_forward_pre_hook(counting):
        train(config, watch=stepped)
    return sum(rows), sum(positions)

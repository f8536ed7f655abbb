"""The fused head inside DeepSpeed: sharded and tied weights, several micro-batches a step, sequences cut in pieces."""

import pytest
import torch
from kto_kernels import logits, reference
from ranks import run_ranks
from tiny import save_tiny
from tiny_runs import metrics_of, tiny_config, train_all, weights_of

from kto_dist.objective import objective


def train_with_the_definition(configs):
    """On every rank: with whole logits and autograd in the fused head's place."""
    objective.kto_head = lambda *arguments, budget, logits_dtype, **options: reference.kto_head(*arguments, **options)
    return train_all(configs)


def train_in_pieces(configs):
    """On every rank: a chunk holds 20 rows, where completions have up to 40."""
    logits.DEFAULT_BUDGET["cpu"] = 20 * 258 * 4
    return train_all(configs)


@pytest.fixture(scope="module", params=(False, True), ids=("untied", "tied"))
def unsharded(request, tmp_path_factory, tiny_log):
    folder = tmp_path_factory.mktemp("unsharded")
    model = save_tiny(folder / "model", tie_word_embeddings=request.param)
    config = tiny_config(folder, model, tiny_log)
    run_ranks(train_with_the_definition, 1, [config])
    return config


@pytest.mark.parametrize("stage", (2, 3))
def test_sharded_training_in_pieces_is_unsharded_training_with_whole_logits(tmp_path, tiny_log, unsharded, stage):
    config = tiny_config(
        tmp_path,
        unsharded.model.path,
        tiny_log,
        deepspeed__zero_stage=stage,
        train__tokens_per_microbatch=96,  # several micro-batches a step, each loss divided by the rows of the step
    )
    run_ranks(train_in_pieces, 2, [config])
    for expected, found in zip(metrics_of(unsharded), metrics_of(config), strict=True):
        for name in ("loss", "kl_raw", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (expected["step"], name)
    expected = weights_of(unsharded)
    for name, tensor in weights_of(config).items():
        assert torch.norm(tensor - expected[name]) <= 1e-4 * torch.norm(expected[name]), name

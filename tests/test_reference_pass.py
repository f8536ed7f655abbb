"""A pass over the pairs: its shards, its progress, its record, and how it ends."""

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from ranks import run_ranks
from reference_runs import fixed, logps_of_pairs, score, scored_and_found, with_forward
from tiny import save_tiny
from tiny_runs import tiny_config

from kto_dist.base.errors import UserError
from kto_dist.model.engines import Reference
from kto_dist.reference.logps import lazily, more_room
from kto_dist.reference.scoring import LoadedReference, Outcome, ShardSize
from kto_dist.training.config import Config
from kto_dist.training.precompute import precompute


def _with_weights_that_change(config: Config, other: Path) -> str:
    """What is said when another model lies in the folder by the time that the weights are loaded."""

    class Late(Reference):
        def __init__(self, *arguments, **settings):
            (other / "model.safetensors").replace(Path(config.model.path) / "model.safetensors")
            super().__init__(*arguments, **settings)

    try:
        score(config, engine=Late)
    except UserError as error:
        return str(error)
    return "nothing"


def test_weights_that_change_while_they_are_loaded_are_not_scored_under_their_old_name(tmp_path, tiny_log):
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "other", seed=1)
    config = tiny_config(tmp_path, model, tiny_log)
    (said,) = run_ranks(_with_weights_that_change, 1, config, other)
    assert said.startswith(f"the weights in model.path ({model}) changed while they were loaded")
    assert not list((tmp_path / "store").rglob("*.parquet"))


def _without_room(config: Config) -> str:
    """What is said when the device is too small for the model."""

    class Large(Reference):
        def __init__(self, *arguments, **settings):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 GiB")

    try:
        score(config, engine=Large)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("stage", "remedy"), [(0, "shard it over several hosts with reference.zero_stage=3"), (3, "use more hosts")]
)
def test_a_model_that_does_not_fit_is_told_with_the_remedy(tmp_path, tiny_model, tiny_log, stage, remedy):
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__zero_stage=stage)
    (said,) = run_ranks(_without_room, 1, config)
    start = f"out of memory while the reference ({tiny_model}) was loaded in float32 onto cpu: "
    # its memory is where offload=cpu would put the weights
    assert said == f"{start}{remedy}, or keep its weights on a disk with reference.offload=nvme"


@pytest.mark.parametrize(("sharded", "remedy"), [(False, "reference.zero_stage=3, or"), (True, "use more devices, or")])
def test_a_model_that_a_gpu_has_no_room_for_may_lie_in_the_hosts_memory(sharded, remedy):
    said = more_room(torch.device("cuda", 0), sharded=sharded)
    assert remedy in said and said.endswith("reference.offload=cpu or nvme")


def _terminated(config: Config) -> None:
    precompute(config, watch=lambda progress: os.kill(os.getpid(), signal.SIGTERM))


def test_a_pass_that_is_terminated_ends_its_mlflow_run(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__enabled=True)
    with pytest.raises(RuntimeError, match="died without a result"):
        run_ranks(_terminated, 1, config)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kto").experiment_id])
    assert run.info.status == "KILLED"


def _progress_of(config: Config) -> tuple[list[dict], int]:
    seen: list = []
    refs = score(config, shard=fixed(8), watch=seen.append)
    return [asdict(progress) for progress in seen], refs.outcome.scored_once


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


def _score_slowly(config: Config, shard: ShardSize, seconds_a_pair: float, seconds_a_forward: float) -> None:
    def slow(forward):
        def waiting(**batch):
            logps = forward(**batch)
            time.sleep(seconds_a_forward + seconds_a_pair * logps.shape[0])
            return logps

        return waiting

    logps_of_pairs(config, shard=shard, engine=with_forward(slow))


def _pairs_of_shards(store: Path) -> list[int]:
    """In the order in which they were written."""
    shards = [pq.read_table(path) for path in store.glob("*/*.parquet")]
    return [len(shard) for shard in sorted(shards, key=lambda shard: int(shard.schema.metadata[b"written"].split()[0]))]


def test_a_slow_reference_has_shards_of_few_pairs(tmp_path, tiny_model, tiny_log):
    settings = {"reference__share_prefixes": False, "reference__packing": False, "train__max_steps": 2}
    # a micro-batch of one or two of the longer pairs
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=96, **settings)
    # 20 ms a pair: at most three in 60 ms; the first shard is made before the rate is known
    run_ranks(_score_slowly, 1, config, ShardSize(first=16, seconds=0.06), 0.02, 0.0)
    sizes = _pairs_of_shards(tmp_path / "store")
    assert sizes[0] == 16 and len(sizes) > 8 and max(sizes[1:4]) <= 3


def test_where_a_forward_has_a_price_of_its_own_a_shard_is_a_whole_micro_batch(tmp_path, tiny_model, tiny_log):
    settings = {"reference__share_prefixes": False, "reference__packing": False, "train__max_steps": 5}
    config = tiny_config(tmp_path, tiny_model, tiny_log, reference__tokens_per_batch=256, **settings)
    run_ranks(_score_slowly, 1, config, ShardSize(first=16, seconds=0.001), 0.0, 0.02)
    sizes = _pairs_of_shards(tmp_path / "store")
    # rows of at most 59 tokens, the longest first: four a micro-batch, and more of the shorter ones
    assert sizes[0] == 16 and min(sizes[1:-1]) >= 4 and sizes[-2] > sizes[1]


def test_a_precompute_is_an_mlflow_run_with_its_throughput(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, tracking__enabled=True, data__heldout=0.3)
    (scored, found), _ = run_ranks(scored_and_found, 2, config)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kto").experiment_id])
    assert run.info.run_name == "precompute-run" and run.info.status == "FINISHED"
    assert run.data.tags["job"] == "precompute" and run.data.params["objective.beta"] == "0.1"
    metrics = run.data.metrics
    assert metrics["reference/from_store"] == found and metrics["reference/repeated"] > 0
    assert metrics["reference/scored"] + metrics["reference/repeated"] == scored
    assert metrics["reference/rows_per_second"] > 0 and metrics["reference/tokens_per_second"] > 0
    assert metrics["reference/seconds_left"] == 0 and metrics["reference/share_done"] == 1
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "reference/share_done")]
    assert steps == sorted(steps) and steps[-1] <= scored


@pytest.mark.parametrize("error", (None, UserError("full"), KeyboardInterrupt()))
def test_an_error_in_a_pass_closes_the_reference_without_waiting_for_other_ranks(error):
    closed = []

    class Loaded:
        def close(self, *, wait: bool = True):
            closed.append(wait)

    def one_pass():
        with lazily(lambda: LoadedReference(engine=Loaded(), share_prefixes=None)) as load:
            assert load() is load()
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
    assert (figures["reference/scored"], figures["reference/rows_per_second"]) == (8, 2.0)
    assert figures["reference/tokens_per_second"] == 20.0 and figures["reference/repeated"] == 8


def test_a_held_out_row_that_is_trained_on_as_well_is_scored_once(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, data__heldout=str(tiny_log), train__epochs=1)
    _, found = run_ranks(scored_and_found, 1, config)[0]
    # the store was empty: all held-out rows were told of what was scored for the training rows
    assert found >= len(Path(tiny_log).read_text().splitlines())

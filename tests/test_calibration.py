"""What `kto-dist plan --measure` measures of a machine, and what the planner makes of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import real_configs
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.cluster import page
from kto_dist.cluster.allreduce import Links
from kto_dist.cluster.hardware import Cluster, calibrated, cluster_of, linked
from kto_dist.cluster.measure import STEPS, Measured, measure, this_machine
from kto_dist.cluster.plan import plan
from kto_dist.cluster.predict import Seconds, factor, load_of, predict
from kto_dist.cluster.rates import Rates, rates
from kto_dist.cluster.workload import Workload, of_means, step_load
from kto_dist.model.adapters import injected, pick_adapter, rehearse
from kto_dist.model.config import AdapterConfig
from kto_dist.model.footprint import Shape, shape_of, with_adapter
from kto_dist.training.config import Config

CONFIG = Config.build(
    {"model": {"path": "m"}, "data": {"train": "t", "max_length": 1024}, "train": {"global_batch": 64}}
)
WAY = replace(real_configs.WAY, zero_stage=2, tokens=16384)
LINKS = Links(latency=60e-6, bandwidth=300e9)


def model(layers: int = 3, device: str = "cpu") -> LlamaForCausalLM:
    with torch.device(device):
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=layers,
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=512,
            )
        )


def workload() -> Workload:
    return of_means(CONFIG, 1000, 100, 150)


def seconds(shape: Shape, on: Cluster, **changes: object) -> Seconds:
    return predict(shape, workload(), on, replace(WAY, **changes)).seconds


def passed(lm: LlamaForCausalLM) -> int:
    """Modules that a forward calls."""
    called = []
    for module in lm.modules():
        module.register_forward_pre_hook(lambda module, arguments: called.append(module))
    lm(torch.zeros(1, 4, dtype=torch.int64))
    return len(called)


def test_modules_are_those_that_a_forward_passes_with_an_adapter_and_without():
    lm = model()
    plain, adapted = shape_of(lm), with_adapter(lm, 4)
    assert plain.modules == passed(model())
    get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear"))
    assert adapted.modules == passed(lm)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_zero_3_takes_the_hosts_time_at_every_module_in_forwards_too(checkpointing):
    few, many = (shape_of(model(layers, "meta")) for layers in (2, 12))
    free = cluster_of("H100", 1)
    free = replace(free, shares=replace(free.shares, hook_seconds=0.0))
    for shape in (few, many):
        without, found = (
            seconds(shape, on, zero_stage=3, checkpointing=checkpointing) for on in (free, cluster_of("H100", 1))
        )
        batches = len(load_of(workload(), free, WAY).batches)
        hooks = cluster_of("H100", 1).shares.hook_seconds * shape.modules * batches
        assert found.forwards - without.forwards == pytest.approx(hooks)
        assert found.survey - without.survey == pytest.approx(hooks)
        assert found.backwards - without.backwards == pytest.approx(hooks * (1 + checkpointing))
    assert seconds(few, free, zero_stage=2) == seconds(few, cluster_of("H100", 1), zero_stage=2)


def test_a_rank_alone_on_a_processor_has_no_work_with_buckets():
    shape, here = shape_of(model(device="meta")), this_machine(Rates(flops=1e11, bandwidth=1e10))
    stage_1, stage_2 = (seconds(shape, here, zero_stage=stage, cpu=True) for stage in (1, 2))
    assert stage_2.backwards == pytest.approx(stage_1.backwards)
    two = this_machine(Rates(flops=1e11, bandwidth=1e10, links=LINKS), 2)
    stage_1, stage_2 = (seconds(shape, two, zero_stage=stage, cpu=True) for stage in (1, 2))
    hooks = (two.shares.host_hooks - two.shares.host_backward) * two.shares.host_seconds * shape.layers
    assert stage_2.backwards - stage_1.backwards > len(load_of(workload(), two, WAY).batches) * hooks


@pytest.mark.parametrize("stage", (2, 3))
def test_the_factor_is_that_with_which_the_measured_seconds_come_out_and_leaves_collectives_alone(stage):
    here, shape = linked(cluster_of("H100", 8), LINKS, 8, 450e9), shape_of(model(device="meta"))
    way = replace(WAY, zero_stage=stage)
    load = load_of(workload(), here, way)
    computed = predict(shape, workload(), here, way).seconds
    found = factor(shape, here, way, load, 3 * computed.total)
    again = predict(shape, workload(), calibrated(here, found), way).seconds
    assert again.total == pytest.approx(3 * computed.total, rel=1e-6)
    if stage == 2:
        assert again.collectives == computed.collectives and found > 3
    # where collectives alone were to take longer, they are not left alone
    slow = linked(here, Links(latency=60.0, bandwidth=300e9), 8, 450e9)
    of_all = predict(shape, workload(), slow, way).seconds.total
    assert factor(shape, slow, way, load, 1.0) == pytest.approx(1.0 / of_all)


def test_links_as_measured_are_those_of_the_collectives_within_a_node_alone():
    assumed = cluster_of("H100", 8)
    found = linked(assumed, LINKS, 8, 450e9)
    assert found.links_measured and not assumed.links_measured
    assert found.reduce(4) == pytest.approx(60e-6, rel=1e-3)
    assert found.reduce(1e12) == pytest.approx(2 * 7 / 8 * 1e12 / 300e9, rel=1e-3)
    between = linked(cluster_of("H100", 16), LINKS, 8, 450e9)
    assert between.gather(1e12) == pytest.approx(15 / 16 * 1e12 / 300e9, rel=1e-3)  # slower than the network
    assert between.shares.alpha_between == assumed.shares.alpha_between
    # of another GPU the same share of what its makers say
    assert linked(cluster_of("B200", 8), LINKS, 8, 450e9).gather(1e12) == pytest.approx(7 / 8 * 1e12 / 600e9, rel=1e-3)


def test_what_several_ranks_at_once_have_of_a_processor_is_what_each_is_computed_with():
    alone = this_machine(Rates(flops=1e11, bandwidth=1e10))
    crowd = this_machine(Rates(flops=6e10, bandwidth=4e9, crowding=1.5, links=Links(latency=1e-3, bandwidth=2e9)), 2)
    assert (crowd.gpu.flops, crowd.gpu.bandwidth, crowd.gpus, crowd.nodes) == (6e10, 4e9, 2, 1)
    assert crowd.gpu.memory == alone.gpu.memory / 2
    assert crowd.shares.host_seconds == 1.5 * alone.shares.host_seconds
    assert crowd.shares.hook_seconds == 1.5 * alone.shares.hook_seconds
    assert crowd.reduce(4) == pytest.approx(1e-3, rel=1e-3) and crowd.reduce(1e12) == pytest.approx(
        1e12 / 2e9, rel=1e-3
    )


def test_two_ranks_of_this_machine_measure_each_other():
    alone, both = rates(1, 1), rates(2, 1)
    assert alone.links is None and alone.flops > 0 < alone.bandwidth and alone.crowding == 1
    assert both.links is not None and 0 < both.links.latency < 1 and both.links.bandwidth > 0
    assert both.flops > 0 < both.bandwidth and both.crowding >= 1


def test_ranks_that_cannot_measure_are_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="2 ranks of this machine could not measure their links: rank 0, 1: no word"):
        rates(2, 1)


def test_it_is_said_what_was_measured_and_what_is_assumed():
    here = linked(cluster_of("H100", 4, 4), LINKS, 4, 450e9)
    found = Measured(here=here, seconds=1.2, computed=1.0, factor=1.25, links=LINKS)
    first, second = page.of_measured(found)
    assert first.startswith("measured here, on 4 H100: 1.2 s a step, 1 computed; compute times below are taken 1.25")
    assert "between 4 ranks: 60 microseconds" in second and "300 GB/s of the maker's 450" in second
    assert "between nodes are assumed" in second
    work, shape = workload(), shape_of(model(device="meta"))
    for cluster, text in (
        (cluster_of("H100", 16), "80% of links of 450 GB/s in a node and 80% of 400 GB/s a node, 5 and 15 micro"),
        (found.applied(cluster_of("H100", 16)), "67% of links of 450 GB/s in a node (as measured) and 80% of 400 GB/s"),
    ):
        assert text in page.below(plan(CONFIG, shape, work, cluster))[-1]
    alone = Measured(here=cluster_of("H100", 1), seconds=1.2, computed=1.0, factor=1.2, links=None)
    assert len(page.of_measured(alone)) == 1 and not alone.applied(cluster_of("H100", 8)).links_measured


def test_what_was_measured_on_another_kind_of_gpu_is_said_to_be():
    shape, work, wanted = shape_of(model(device="meta")), workload(), cluster_of("H100", 16)
    for kind, links, warning in (
        ("A100", LINKS, "measured on A100, planned for H100: that the factor and the links' share of the one"),
        ("A100", None, "measured on A100, planned for H100: that the factor of the one"),
        ("H100", LINKS, None),
    ):
        found = Measured(here=cluster_of(kind, 4, 4), seconds=1.2, computed=1.0, factor=1.25, links=links)
        made = plan(CONFIG, shape, work, wanted, measured=found)
        assert made.cluster.shares.compute == 1.25 and made.cluster.links_measured == (links is not None)
        said = [line for line in page.above(made) if line.startswith("measured on")]
        assert [line[: len(warning or "")] for line in said] == ([] if warning is None else [warning])
        assert f"all compute times 1.25 times, as measured on 4 {kind}" in page.below(made)[-1]
        told = json.loads(json.dumps(page.to_dict(made)))["measured"]
        assert (told["gpu"], told["factor"], told["warning"]) == (kind, 1.25, said[0] if said else None)
    assert page.to_dict(plan(CONFIG, shape, work, wanted))["measured"] is None


@pytest.mark.parametrize("kind", ("lora", "dora"))
@pytest.mark.parametrize("targets", (("q_proj",), ("v_proj", "down_proj"), "all-linear"))
def test_an_adapter_counts_where_it_lies_and_nowhere_else(kind, targets):
    section = AdapterConfig(type=kind, rank=4, targets=targets)
    adapter, lm = pick_adapter(section, base="m", seed=0), model()
    assert adapter is not None
    shape = with_adapter(lm, 4, put_in=rehearse(lm.config, adapter))
    injected(lm, adapter)
    if kind == "lora":  # DoRA calls some of them twice
        assert shape.modules == passed(lm)
    added = [p for p in lm.parameters() if p.requires_grad]
    assert (shape.trained, shape.largest_trained) == (sum(p.numel() for p in added), max(p.numel() for p in added))


def test_padded_rows_are_run_as_wide_as_the_widest_of_their_batch_rounded_up():
    work = workload()
    packed, padded = (step_load(work, 1, 4096, packed=on, multiple=1 if on else 64) for on in (True, False))
    assert padded.tokens == packed.tokens == sum(int(lengths.sum()) for lengths, _ in packed.batches)
    for lengths, _ in (*padded.batches, *padded.kl_batches):
        assert len(set(lengths)) == 1 and lengths[0] % 64 == 0 and lengths.sum() <= 4096
    assert padded.largest > packed.largest * 0.9 and len(padded.batches) >= len(packed.batches)
    shape = shape_of(model(device="meta"))
    wide, narrow = (seconds(shape, cluster_of("H100", 1), packed=on, tokens=4096) for on in (False, True))
    assert wide.forwards > narrow.forwards
    assert (replace(WAY, packed=False).multiple, replace(WAY, packed=False, cpu=True).multiple, WAY.multiple) == (
        64,
        1,
        1,
    )


def test_a_short_run_here_scales_what_is_computed(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log)
    shape = shape_of(LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model)))
    asked = []

    def run(overrides, folder):
        asked.extend(overrides)
        output = Path(next(word for word in overrides if word.startswith("train.output=")).partition("=")[2])
        output.mkdir()
        lines = [{"seconds": 9.0 if step < 3 else 0.5} for step in range(STEPS)]
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    found = measure(config, shape, of_means(config, 80, 20, 20), run)
    assert found.seconds == 0.5 and found.factor == pytest.approx(0.5 / found.computed)
    assert found.here.gpu.name == "cpu" and found.links is None
    applied = found.applied(cluster_of("H100", 8))
    assert applied.shares.compute == found.factor and not applied.links_measured
    assert f"train.max_steps={STEPS}" in asked
    Config.load(_written(tmp_path, config), asked)
    with pytest.raises(UserError, match="ended with status 3"):
        measure(config, shape, of_means(config, 80, 20, 20), lambda overrides, folder: 3)


def _written(folder: Path, config: Config) -> Path:
    path = folder / "given.yaml"
    path.write_text(to_yaml(config))
    return path

"""The planner: its figures beside those that were measured, and that they move as they must."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import real_configs
import torch
import yaml
from click.testing import CliRunner
from tiny_runs import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from kto_dist.base.config import to_yaml
from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.cluster import page
from kto_dist.cluster.hardware import GPUS, Cluster, calibrated, cluster_of
from kto_dist.cluster.plan import method_of, plan, ready_config, shape_for
from kto_dist.cluster.predict import Prediction, Way, predict
from kto_dist.cluster.reference_pass import predict_reference
from kto_dist.cluster.workload import of_means, of_rows, step_load
from kto_dist.commands.cli import main
from kto_dist.data.batch import Cutting, microbatches, step_rows
from kto_dist.model.footprint import (
    Shape,
    activation_bytes,
    backward_bytes,
    budget,
    held,
    shape_of,
    tokens_that_fit,
    with_adapter,
)
from kto_dist.training.config import ADAPTER_LR, Config
from kto_dist.training.prepare import prepare

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SIZES = {
    "1.2b": (16, 2048, 8192, 32, 8, 128256),
    "135m": (30, 576, 1536, 9, 3, 49152),
    "8b": (32, 4096, 14336, 32, 8, 128256),
}


def outline(name: str) -> LlamaForCausalLM:
    layers, hidden, inner, heads, kept, vocabulary = SIZES[name]
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=layers,
                hidden_size=hidden,
                intermediate_size=inner,
                num_attention_heads=heads,
                num_key_value_heads=kept,
                vocab_size=vocabulary,
                tie_word_embeddings=name != "8b",
            )
        )


def config_of(**changes: object) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": "t", "max_length": 1024}, "train": {"global_batch": 64}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section] = {**tree.get(section, {}), key: value}
    return Config.build(tree)


WAY = replace(real_configs.WAY, zero_stage=2, tokens=16384)


def of_benchmark(shape: Shape, way: Way) -> Prediction:
    """The job of benchmarks/throughput.py: 64 rows of 361 tokens a step."""
    workload = of_means(config_of(), 64 * 7, 151, 226)
    return predict(shape, workload, cluster_of("H200", 1), way)


def measured(name: str, implementation: str) -> dict[str, float]:
    lines = json.loads((RESULTS / f"nvidia-h200-{name}.json").read_text())["results"]
    return next(line for line in lines if (line["implementation"], line["phase"]) == (implementation, "training"))


@pytest.mark.parametrize(
    ("model", "file", "implementation", "changes"),
    [
        ("1.2b", "throughput", "kto_dist", {}),
        ("1.2b", "throughput", "kto_dist-stage1", {"zero_stage": 1}),
        ("1.2b", "throughput", "kto_dist-eager", {"fused": False}),
        ("135m", "throughput-135m", "kto_dist", {}),
        ("135m", "throughput-135m", "kto_dist-stage1", {"zero_stage": 1}),
    ],
)
def test_memory_and_time_are_close_to_what_a_gpu_has_shown(model, file, implementation, changes):
    """Runs that the shares of `hardware.Shares` were taken from: what is held is that they still fit together."""
    found = of_benchmark(shape_of(outline(model)), replace(WAY, **changes))
    shown = measured(file, implementation)
    assert found.memory.peak == pytest.approx(shown["peak_bytes"], rel=0.1)
    assert found.seconds.total == pytest.approx(shown["seconds_per_step"], rel=0.1)


def test_memory_moves_the_right_way():
    shape, workload, cluster = shape_of(outline("8b")), of_means(config_of(), 10_000, 200, 300), cluster_of("H100", 64)

    def memory(of: Shape = shape, on: Cluster = cluster, **changes: object):
        return predict(of, workload, on, replace(WAY, **changes)).memory

    plain = memory()
    sharded = memory(zero_stage=3)
    assert sharded.held.weights < plain.held.weights and sharded.held.gathered > 0 == plain.held.gathered
    assert memory(on=cluster_of("B200", 1), zero_stage=3).held.gathered == 0  # a rank alone has them whole
    assert memory(zero_stage=1).held.gradients > plain.held.gradients
    assert memory(on=cluster_of("H100", 8)).held.optimizer == pytest.approx(8 * plain.held.optimizer)
    away = memory(offload_optimizer=True)
    assert away.held.optimizer == 0 and away.host == pytest.approx(16 * shape.trained / 8)
    assert memory(zero_stage=3, offload_parameters=True).held.weights == 0
    assert memory(checkpointing=True).activations < plain.activations / 5
    assert memory(fused=False).activations > plain.activations
    lora, qlora = (with_adapter(outline("8b"), 16, packed=packed) for packed in (False, True))
    assert memory(lora).held.optimizer < plain.held.optimizer / 50
    assert memory(qlora).held.weights < 0.4 * memory(lora).held.weights
    assert memory(lora).held.head < plain.held.head


def test_an_adapters_weights_are_those_that_peft_adds():
    from peft import LoraConfig, get_peft_model

    lm = outline("135m")
    expected = with_adapter(lm, 8).trained
    added = get_peft_model(lm, LoraConfig(r=8, target_modules="all-linear"))
    assert expected == sum(p.numel() for p in added.parameters() if p.requires_grad)


def test_time_moves_the_right_way():
    shape, workload = shape_of(outline("8b")), of_means(config_of(train__global_batch=1024), 100_000, 200, 300)

    def seconds(on: Cluster, of: Shape = shape, **changes: object):
        return predict(of, workload, on, replace(WAY, **changes)).seconds

    one, node, many = (seconds(cluster_of("H100", gpus)) for gpus in (1, 8, 64))
    assert one.collectives == 0 < node.collectives < many.collectives * 8
    assert one.total > node.total > many.total > one.total / 64
    assert seconds(cluster_of("B200", 8)).forwards < node.forwards
    again = seconds(cluster_of("H100", 8), checkpointing=True)
    assert again.backwards == pytest.approx(node.backwards + node.forwards, rel=0.15)
    assert seconds(cluster_of("H100", 8), offload_optimizer=True).offload > 0 == node.offload
    lora = seconds(cluster_of("H100", 8), with_adapter(outline("8b"), 16))
    assert lora.backwards < 0.7 * node.backwards and lora.collectives < node.collectives
    slower = seconds(calibrated(cluster_of("H100", 8), 1.5))
    assert slower.forwards == pytest.approx(1.5 * node.forwards) and slower.collectives == node.collectives
    assert slower.optimizer == pytest.approx(1.5 * node.optimizer)


def test_a_collective_takes_alpha_and_beta_of_its_links():
    inside, between = cluster_of("H100", 8), cluster_of("H100", 16)
    assert cluster_of("H100", 1).gather(1e9) == 0
    share = inside.shares.links
    assert inside.gather(1e12) == pytest.approx(1e12 * 7 / 8 / (450e9 * share), rel=1e-3)
    assert between.gather(1e12) == pytest.approx(1e12 * 15 / 16 / (400e9 * share), rel=1e-3)
    assert inside.gather(0, 10) == pytest.approx(10 * 7 * inside.shares.alpha_inside)
    assert between.gather(0) == pytest.approx(14 * inside.shares.alpha_inside + between.shares.alpha_between)
    assert inside.reduce(1e12) == pytest.approx(2 * inside.gather(1e12), rel=1e-3)
    assert inside.reduce(0) == pytest.approx(2 * 3 * inside.shares.alpha_inside)  # up a tree, and down
    # a ring of thousands takes longer for its messages than for a layer's bytes
    thousands = cluster_of("H100", 4096)
    assert thousands.gather(0) > 10 * thousands.reduce(0) and thousands.gather(4e8) < 1.2 * thousands.gather(0)


def test_at_stage_2_all_ranks_reduce_all_of_a_bucket_and_gather_the_update():
    shape, work, cluster = shape_of(outline("8b")), of_means(config_of(), 10**5, 200, 300), cluster_of("H100", 8)
    found = predict(shape, work, cluster, WAY)
    batches = found.microbatches // 2
    size, buckets = 2 * shape.trained, -(-shape.trained // (5 * 10**8))
    assert found.seconds.collectives == pytest.approx(
        batches * cluster.reduce(size, buckets) + cluster.gather(size, buckets)
    )


@pytest.mark.parametrize("gpus", (1, 8, 64, 4096))
@pytest.mark.parametrize("gpu", GPUS)
def test_there_is_a_plan_for_every_gpu_and_size(gpu, gpus):
    config = config_of(train__global_batch=max(64, 2 * gpus))
    made = plan(config, shape_of(outline("1.2b")), of_means(config, 10**6, 200, 300), cluster_of(gpu, gpus), price=2.0)
    assert made.best is not None and made.best.memory.device <= made.cluster.gpu.memory
    assert 0 < made.best.mfu < 0.7 and made.cost(made.best) == pytest.approx(made.hours(made.best) * gpus * 2.0)
    fits = [not way.trouble for way in made.ways]
    assert fits == sorted(fits, reverse=True)
    json.dumps(page.to_dict(made))
    assert len(page.lines(made)) == len(made.ways) and page.above(made)[0].startswith("computed, not measured")


def test_the_best_way_is_as_fast_as_any_and_asks_for_least():
    config = config_of(train__global_batch=512)
    shape, work = shape_of(outline("8b")), of_means(config, 10**5, 200, 300)
    tight, roomy = (plan(config, shape, work, cluster_of(gpu, gpus)) for gpu, gpus in (("A100", 4), ("B200", 32)))
    assert tight.best.way.zero_stage == 3 or tight.best.way.offload_optimizer
    assert not roomy.best.way.offload_optimizer and not roomy.best.way.offload_parameters
    for made in (tight, roomy):
        fastest = min(way.seconds.total for way in made.ways if not way.trouble)
        assert made.best.seconds.total <= 1.03 * fastest


def test_the_best_way_is_a_config_that_loads(tmp_path):
    config = config_of(train__global_batch=512)
    made = plan(config, shape_of(outline("8b")), of_means(config, 10**5, 200, 300), cluster_of("A100", 8))
    ready = ready_config(config, made, rank=16)
    (tmp_path / "c.yaml").write_text(to_yaml(ready))
    read = Config.load(tmp_path / "c.yaml")
    way = made.best.way
    assert (read.deepspeed.zero_stage, read.train.tokens_per_microbatch) == (way.zero_stage, way.tokens)
    assert read.model.gradient_checkpointing == way.checkpointing and read.train.global_batch == 512
    assert (read.deepspeed.offload_optimizer == "cpu") == way.offload_optimizer


def test_an_adapters_plan_is_a_config_that_trains_one_at_its_own_rate():
    config = config_of()
    made = plan(
        config,
        shape_for(outline("8b"), "lora", 8),
        of_means(config, 1000, 200, 300),
        cluster_of("H100", 1),
        method="lora",
    )
    ready = ready_config(config, made, rank=8)
    own = Config.build({"model": {"path": "m"}, "data": {"train": "t"}, "adapter": {"type": "lora"}})
    assert (ready.adapter.type, ready.adapter.rank, ready.train.lr) == ("lora", 8, own.train.lr)
    assert ready.train.lr != config.train.lr
    given = config_of(adapter__type="dora", adapter__rank=4, train__lr=1e-5)
    assert method_of(given) == "lora" and method_of(config) == "full"
    kept = ready_config(given, made, rank=8)
    assert (kept.adapter.type, kept.adapter.rank, kept.train.lr) == ("dora", 4, 1e-5)
    whole = plan(given, shape_of(outline("1.2b")), of_means(given, 1000, 200, 300), cluster_of("H100", 8))
    assert ready_config(given, whole, rank=8).adapter.type == "none"


def test_what_fits_nowhere_is_said_with_the_least_that_it_takes():
    config = config_of(data__max_length=131072, train__global_batch=2, reference__tokens_per_batch=131072)
    shape = replace(shape_of(outline("8b")), parameters=10**12, trained=10**12)
    made = plan(config, shape, of_means(config, 100, 90_000, 30_000), cluster_of("A100", 1))
    assert made.best is None and all(line[0] == "no" for line in page.lines(made))
    with pytest.raises(
        UserError, match="nothing fits on 1 A100: the least that was found takes .* of 1,863 GiB of a node"
    ):
        ready_config(config, made, rank=16)


def test_a_plan_of_packed_weights_is_a_config_of_an_adapter_beside_them():
    config = config_of()
    made = plan(
        config,
        shape_for(outline("8b"), "qlora", 16),
        of_means(config, 1000, 200, 300),
        cluster_of("H100", 1),
        method="qlora",
    )
    assert made.best is not None and {way.way.zero_stage for way in made.ways} == {1, 2}
    ready = ready_config(config, made, rank=8)
    assert (ready.model.quantization, ready.adapter.type, ready.adapter.rank) == ("nf4", "lora", 8)
    assert ready.reference.zero_stage == 0 and ready.train.lr == ADAPTER_LR


def test_the_planner_and_the_run_start_from_one_estimate():
    lm, cluster = outline("1.2b"), cluster_of("H200", 1)
    sharding = WAY.sharding(1)
    assert tokens_that_fit(lm, sharding, int(cluster.gpu.memory)) == budget(shape_of(lm), sharding, cluster.gpu.memory)
    config = config_of(train__global_batch=4096)
    made = plan(config, shape_of(lm), of_means(config, 10**6, 200, 300), cluster)
    (same,) = [
        way
        for way in made.ways
        if (way.way.zero_stage, way.way.offload_optimizer, way.way.checkpointing) == (2, False, False)
    ]
    assert same.way.tokens == budget(shape_of(lm), sharding, cluster.gpu.memory)


def test_few_completions_need_few_logits():
    shape, sharding = shape_of(outline("1.2b")), replace(WAY, zero_stage=1).sharding(1)
    assert held(shape, sharding, head_rows=10).head == pytest.approx(10 * 128256 * 4 + 8 * shape.head)
    assert held(shape, sharding).head == 2**31 + 8 * shape.head


def test_at_stage_2_gradients_are_collected_where_the_logits_were():
    shape, adapter = shape_of(outline("1.2b")), with_adapter(outline("1.2b"), 16)
    bucket = 2 * 5 * 10**8  # of this size however little is trained
    assert held(shape, WAY.sharding(1)).head == 2**31 + 8 * shape.head
    assert held(adapter, WAY.sharding(1), head_rows=10).head == bucket
    assert held(adapter, replace(WAY, zero_stage=1).sharding(1), head_rows=10).head == 10 * 128256 * 4
    assert held(adapter, replace(WAY, zero_stage=3).sharding(8)).gradients == bucket + 4 * adapter.trained / 8


def test_memory_is_that_of_the_phase_which_takes_most():
    shape, work = shape_of(outline("135m")), of_means(config_of(), 10_000, 2, 2)
    way = replace(WAY, zero_stage=3, checkpointing=True, tokens=1024)
    alone, many = (predict(shape, work, cluster_of("B200", gpus), way).memory for gpus in (1, 8))
    # at ZeRO 3 the bucket laid end to end, and a rank's share in fp32
    assert alone.update == (2 + 4) * shape.trained > alone.activations + alone.held.head
    assert alone.peak == alone.held.rest + alone.update
    assert many.update == (2 + 4 / 8) * shape.trained
    large = predict(shape_of(outline("8b")), work, cluster_of("B200", 8), way).memory
    assert large.backward > (2 + 4 / 8) * 5 * 10**8 == large.update
    assert predict(shape, work, cluster_of("B200", 1), WAY).memory.update == 0
    assert predict(shape, work, cluster_of("B200", 1), replace(WAY, zero_stage=1)).memory.update == 6 * shape.trained
    # gradients come with the first backward, when activations go
    for stage, bf16 in ((0, False), (1, True)):
        once = replace(WAY, zero_stage=stage, bf16=bf16)
        alone, several = (
            predict(shape, work, cluster_of("B200", 1), replace(once, tokens=tokens)).memory for tokens in (16384, 128)
        )
        assert (alone.to_come, several.to_come) == ((2 if bf16 else 4) * shape.trained, 0)
        with_logits = alone.activations + max(alone.held.head, alone.backward)
        assert alone.peak == alone.held.rest + max(with_logits - alone.to_come, alone.update)
        assert several.peak >= several.held.total + several.activations
    # few completions of long prompts: a layer that is made again takes more than logits
    long_rows = of_means(config_of(), 10_000, 900, 2)
    long = predict(shape, long_rows, cluster_of("B200", 1), replace(way, tokens=16384)).memory
    assert long.backward > long.held.head and long.peak == long.held.rest + long.activations + long.backward


def test_a_cpu_keeps_what_its_own_layers_keep():
    shape, lengths = shape_of(outline("135m")), np.array([40, 64, 100, 600])
    gpu, cpu = (replace(WAY, fused=False, cpu=on).sharding(1) for on in (False, True))
    kept = 8 * 576 + 4 * 576 + 4 * 192 + 8 * 1536
    ends, tokens = 4 * 576, 804
    # weights of short sequences, each as long as the next multiple of 32; longer ones keep none
    weights = 2 * 9 * (64**2 + 64**2 + 128**2)
    assert activation_bytes(shape, cpu, lengths) == ends * tokens + 30 * (kept * tokens + weights)
    assert activation_bytes(shape, gpu, lengths) == ends * tokens + 30 * (kept + 5 * 576) * tokens
    assert held(shape, cpu).gradients == 4 * shape.trained
    two = replace(WAY, cpu=True).sharding(2)
    assert held(shape, two, head_rows=100).head == 2 * shape.trained + 2 * shape.head
    # a backward has the gradient of the head's weights, and with checkpointing a layer again, beside gradients
    plain, again = (backward_bytes(shape, replace(cpu, checkpointing=on), lengths, 100) for on in (False, True))
    assert plain == 2 * shape.head + 6 * 1536 * tokens and again == plain + kept * tokens + weights
    long = backward_bytes(shape, cpu, np.array([500, 501, 200]), 100)
    assert long == 2 * shape.head + 2 * 2 * 9 * (2 * 512**2)  # weights of a group at a time


def test_a_cpus_head_takes_narrow_logits_and_blocks_of_wide_ones():
    shape, cpu = shape_of(outline("135m")), replace(WAY, cpu=True).sharding(1)
    assert held(shape, cpu, head_rows=100).head == 100 * 49152 * 2 + 2 * shape.head  # more than the blocks
    frozen = replace(shape, head_trained=False)
    assert held(frozen, cpu, head_rows=2).head == 2 * 49152 * (2 + 3 * 4)
    assert held(frozen, cpu, head_rows=100).head == 100 * 49152 * 2 + 3 * 2**22
    assert held(shape, cpu).head == 2**31 + 6 * shape.head + 3 * 2**22  # several chunks
    assert held(frozen, replace(cpu, bf16=False), head_rows=2).head == 2 * 49152 * 4 * (1 + 2)  # wide already


def test_a_reference_that_is_too_large_for_a_gpu_is_sharded():
    config = config_of()
    work, large = of_means(config, 10_000, 200, 300), replace(shape_of(outline("8b")), parameters=70 * 10**9)
    small = predict_reference(shape_of(outline("8b")), work, cluster_of("H100", 8), WAY, 8192)
    sharded = predict_reference(large, work, cluster_of("H100", 8), WAY, 8192)
    assert (small.sharded, sharded.sharded) == (False, True) and sharded.memory < cluster_of("H100", 8).gpu.memory
    assert small.pairs == sharded.pairs > 10_000
    assert small.seconds > predict_reference(shape_of(outline("8b")), work, cluster_of("H100", 64), WAY, 8192).seconds


@pytest.mark.parametrize("packed", (True, False))
def test_a_planned_steps_micro_batches_are_those_of_training(tmp_path, tiny_model, tiny_log, packed):
    prepared = prepare(tiny_config(tmp_path, tiny_model, tiny_log), Console())
    work = of_rows(prepared)
    assert work.rows == len(prepared.train) and work.steps == prepared.plan.steps
    rows = step_rows(prepared.plan, 0)
    # of the very rows: their order does not count
    work = replace(work, prompts=work.prompts[rows], answers=work.answers[rows])
    for tokens, ranks in ((128, 1), (256, 2), (4096, 2)):
        cutting = Cutting(
            max_length=96,
            prompt_limit=prepared.plan.prompt_limit,
            tokens=tokens,
            packed=packed,
            apart=None,
            multiple=1 if packed else 64,
        )
        real = microbatches(prepared.train, rows, rows, cutting, rank=0, ranks=ranks)
        planned = step_load(work, ranks, tokens, packed=packed, multiple=cutting.multiple)
        assert len(planned.batches) == len(real)
        wide = [-(-batch.longest // cutting.multiple) * cutting.multiple for batch in real]
        expected = [
            batch.input_ids.shape[0] * width if not packed else batch.tokens
            for batch, width in zip(real, wide, strict=True)
        ]
        assert [int(lengths.sum()) for lengths, _ in planned.batches] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "V100"], "--gpu (V100) is none that is known: there are A100"),
        (["--gpus", "5000"], "--gpus (5000) must be from 1 to 4,096"),
        (["--gpus", "12"], "--gpus (12) must be a multiple of --per-node (8)"),
        (["--rows", "5"], "go together"),
        (["train.dtype=fp32"], "train.dtype (fp32) is not planned for"),
        (["--measure"], "--measure runs steps of the config on the GPUs of this machine, and torch finds none"),
    ],
)
def test_a_mistake_is_told(tmp_path, tiny_model, tiny_log, words, message):
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(tiny_config(tmp_path, tiny_model, tiny_log, train__dtype="auto")))
    done = CliRunner().invoke(main, ["plan", str(path), *words])
    assert done.exit_code == 2 and message in done.output, done.output


def test_rows_of_given_means_are_cut_as_training_cuts_them_and_that_is_said(tmp_path, tiny_model):
    work = of_means(config_of(data__max_length=256), 10_000, 300, 300)
    both_long = (work.prompts == 128) & (work.answers == 128)  # then each keeps half
    assert both_long.mean() > 0.5 and work.prompts.max() > 200 and 0.9 < work.cut < 1
    assert of_means(config_of(data__max_length=4096), 10_000, 300, 300).cut == 0
    path = tmp_path / "c.yaml"
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": "x.jsonl", "max_length": 256}}
    path.write_text(yaml.safe_dump(tree))
    words = ["--rows", "1000", "--prompt-tokens", "300", "--completion-tokens", "300", "--gpu", "H100"]
    done = CliRunner().invoke(main, ["plan", str(path), *words])
    assert "% of these rows are longer than data.max_length (256) and are cut to it" in done.output, done.output


def test_the_command_needs_no_weights_and_no_data(tmp_path, tiny_model):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    path = tmp_path / "c.yaml"
    tree = {"model": {"path": str(folder)}, "data": {"train": "nowhere.jsonl", "max_length": 200}}
    path.write_text(yaml.safe_dump(tree))
    words = ["--rows", "10000", "--prompt-tokens", "50", "--completion-tokens", "60", "--price", "2", "--gpu", "H200"]
    out, ready = tmp_path / "plan.json", tmp_path / "ready.yaml"
    done = CliRunner().invoke(main, ["plan", str(path), *words, "--json", str(out), "--write", str(ready)])
    assert done.exit_code == 0, done.output
    assert "computed, not measured" in done.output and "assumed:" in done.output and "best" in done.output
    made = json.loads(out.read_text())
    assert made["computed"] and made["ways"][0]["fits"] and made["ways"][0]["cost"] > 0
    assert Config.load(ready).train.tokens_per_microbatch == made["ways"][0]["way"]["tokens"]

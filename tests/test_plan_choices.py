"""What a plan chooses, and what is said and written of it."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from real_configs import WAY, config_of, outline, planned, write
from tiny_runs import tiny_config

from kto_dist.base.config import to_yaml
from kto_dist.base.errors import UserError
from kto_dist.cluster import page
from kto_dist.cluster.hardware import cluster_of
from kto_dist.cluster.plan import (
    Layers,
    method_of,
    plan,
    ready_config,
    shape_for,
)
from kto_dist.cluster.predict import predict
from kto_dist.cluster.reference_pass import predict_reference
from kto_dist.cluster.workload import of_means
from kto_dist.commands.cli import main
from kto_dist.model.footprint import (
    shape_of,
)


def test_a_packed_model_is_its_own_reference_and_lies_whole_on_every_gpu():
    config, lm = config_of(), outline("Llama-3.1-70B")
    work = of_means(config, 1000, 300, 300)
    way, gpu = replace(WAY, zero_stage=1), cluster_of("H100", 1)
    packed = predict_reference(shape_for(lm, "qlora", 16), work, gpu, way, 8192)
    assert not packed.sharded and packed.memory < 45 * 2**30
    # what one GPU does not hold no sharding over one helps
    whole = predict_reference(shape_for(lm, "lora", 16), work, gpu, way, 8192)
    assert whole.offload and whole.memory < gpu.gpu.memory
    shared = predict_reference(shape_for(lm, "lora", 16), work, cluster_of("H100", 8), way, 8192)
    assert shared.sharded and not shared.offload and shared.seconds < whole.seconds / 8
    assert shared.memory > 2 * 70e9 / 8 + 2e9  # and the layers at hand
    made = planned(shape_for(lm, "lora", 16), "H100", 1, method="lora", reference__tokens_per_batch=8192)
    assert ready_config(config, made, rank=16).reference.offload == "cpu"


def test_a_config_is_planned_as_what_it_trains():
    assert method_of(config_of()) == "full" and method_of(config_of(adapter__type="lora")) == "lora"
    packed = config_of(adapter__type="lora", model__quantization="fp4", deepspeed__zero_stage=1)
    assert method_of(packed) == "qlora"


def test_a_plan_in_16_bits_of_a_packed_config_is_one_in_16_bits():
    packed = config_of(adapter__type="lora", model__quantization="fp4", deepspeed__zero_stage=1)
    lm = outline("Llama-3.1-8B")
    for method, kept in (("qlora", "fp4"), ("lora", "none"), ("full", "none")):
        ready = ready_config(packed, planned(shape_for(lm, method, 16), "H100", 8, method=method), rank=16)
        assert ready.model.quantization == kept


def test_the_best_way_has_room_for_rows_that_no_one_has_seen():
    """A config refuses micro-batches that are shorter than its longest row."""
    config = config_of(data__max_length=8192, train__global_batch=4096, reference__tokens_per_batch=8192)
    work = of_means(config, 10_000, 100, 100)
    made = plan(config, shape_of(outline("Llama-3.1-8B")), work, cluster_of("H100", 4096))
    assert work.longest < 8192 and {way.way.tokens for way in made.ways} == {8192}
    assert ready_config(config, made, rank=16).train.tokens_per_microbatch == 8192


def test_gpus_without_a_row_are_counted_and_said():
    shape = shape_of(outline("gpt2"))
    few = planned(shape, "H100", 64, train__global_batch=48)
    assert few.idle == 16 and "16 of the 64 GPUs have no row in a step of 48" in "\n".join(page.above(few))
    enough = planned(shape, "H100", 64, train__global_batch=64)
    assert enough.idle == 0 and "no row" not in "\n".join(page.above(enough))
    assert few.best.seconds.total == pytest.approx(enough.best.seconds.total, rel=0.5)
    assert page.to_dict(few)["gpus_without_a_row"] == 16


def test_a_node_has_as_many_network_cards_as_gpus():
    whole, half, single = (cluster_of("H100", 64, per_node) for per_node in (8, 4, 1))
    assert half.gather(1e12) == pytest.approx(2 * whole.gather(1e12), rel=1e-2)
    assert single.gather(1e12) == pytest.approx(8 * whole.gather(1e12), rel=1e-2)


def test_parts_of_the_memory_add_up_to_what_a_gpu_takes():
    made = planned(shape_of(outline("Llama-3.1-8B")), "H100", 8)
    first, last = page.COLUMNS.index("weights"), page.COLUMNS.index("at hand")
    margin = made.ways[0].memory.margin / 2**30
    for cells in page.lines(made):
        parts = [float(cell) for cell in cells[first : last + 1]]
        assert sum(parts) + margin == pytest.approx(float(cells[last + 1]), abs=0.4)
        assert min(parts) >= 0  # gradients that come when activations go are no negative memory


def test_gradients_take_the_place_of_activations_only_where_a_step_is_surely_one_micro_batch():
    shape, way, cluster = shape_of(outline("Llama-3.1-8B")), replace(WAY, zero_stage=1), cluster_of("H100", 32)
    work = of_means(config_of(train__global_batch=64), 1000, 150, 150)  # two a rank, of 1,024 at the most
    few, enough = (predict(shape, work, cluster, replace(way, tokens=tokens)) for tokens in (1024, 2048))
    assert few.microbatches == enough.microbatches == 2  # of usual rows: one, and its KL pairs
    assert (few.memory.to_come, enough.memory.to_come) == (0, 2 * shape.trained)
    assert few.memory.peak > enough.memory.peak


def test_who_reads_one_line_reads_the_best():
    made = planned(shape_of(outline("Llama-3.1-8B")), "H100", 8)
    (line,) = [line for line in page.above(made) if line.startswith("best:")]
    assert page.above(made)[-1] == line and f"{made.hours(made.best):.2g} hours" in line
    assert all(word in line for word in ("ZeRO", "of 79 GiB a GPU", "s a step", "tokens/s", "mfu"))
    assert any(each.startswith("assumed: 70% of 989 TFLOP/s") for each in page.below(made))


def test_long_rows_cost_their_attention_and_what_checkpointing_keeps_of_them():
    shape, row = shape_of(outline("Llama-3.1-8B")), 131072
    changes: dict[str, Any] = {"data__max_length": row, "reference__tokens_per_batch": row, "train__global_batch": 64}
    config = config_of(**changes)
    work = of_means(config, 1000, 4e6, 1e6)
    assert work.prompts.sum() + work.answers.sum() == 1000 * row
    made = plan(config, shape, work, cluster_of("H200", 64))
    best = made.best
    assert best is not None and best.way.checkpointing and best.way.tokens == row
    # the input of every layer: 32 layers of 4096 in bf16
    assert best.memory.activations == pytest.approx(2 * 32 * 4096 * row, rel=0.1)
    of_row = shape.cost.forward(np.array([row]), 0)
    assert of_row > 1.9 * 2 * shape.cost.decoder * row  # more than half of it is attention
    assert plan(config, shape, work, cluster_of("A100-40GB", 64)).best is None


def test_four_thousand_gpus_are_planned_in_seconds():
    shape = shape_of(outline("Llama-3.1-405B"))
    made = planned(shape, "H100", 4096, train__global_batch=16384)
    assert made.best is not None and made.best.way.zero_stage == 3


def test_what_does_not_fit_is_told_by_what_is_lacking_and_by_what_takes_less():
    lm = outline("Llama-3.1-405B")
    for method, message in (
        (
            "full",
            "takes .* of 79 GiB a GPU and 6,.* of 1,863 GiB of a node's own memory; take .*, or --method lora$",
        ),
        (
            "qlora",
            "takes 2.. of 79 GiB a GPU and for the reference 2.. of 79 GiB a GPU; take larger .* ZeRO 3 shards$",
        ),
    ):
        made = planned(shape_for(lm, method, 16), "H100", 8, method=method)
        assert made.best is None
        with pytest.raises(UserError, match=message):
            ready_config(config_of(), made, rank=16)


@pytest.mark.parametrize("method", ("full", "lora"))
def test_what_a_plan_writes_passes_the_check_of_a_run(tmp_path, tiny_model, tiny_log, method):
    given, ready = tmp_path / "given.yaml", tmp_path / "ready.yaml"
    given.write_text(to_yaml(tiny_config(tmp_path, tiny_model, tiny_log, train__dtype="auto")))
    words = ["--method", method, "--gpu", "H100", "--gpus", "16", "--write", str(ready)]
    done = CliRunner().invoke(main, ["plan", str(given), *words])
    assert done.exit_code == 0 and f"config: {ready}" in done.output, done.output
    done = CliRunner().invoke(main, ["train", str(ready), "--check"])
    assert done.exit_code == 0 and "check: passed" in done.output, done.output


def test_a_rank_that_is_not_the_configs_is_a_mistake(tmp_path, tiny_model, tiny_log):
    given = tmp_path / "given.yaml"
    given.write_text(to_yaml(tiny_config(tmp_path, tiny_model, tiny_log, adapter__type="lora", adapter__rank=4)))
    done = CliRunner().invoke(main, ["plan", str(given), "--rank", "8", "train.dtype=auto"])
    assert done.exit_code == 2 and "--rank (8) is not adapter.rank of CONFIG (4)" in done.output, done.output


def test_a_reference_of_its_own_is_planned_as_what_it_is(tmp_path):
    small, large = (write(name, tmp_path / name) for name in ("Llama-3.1-8B", "Llama-3.1-70B"))
    given = tmp_path / "given.yaml"
    tree = {"model": {"path": str(small)}, "reference": {"path": str(large)}, "data": {"train": "x"}}
    given.write_text(yaml.safe_dump(tree))
    words = ["--rows", "1000", "--prompt-tokens", "300", "--completion-tokens", "300", "--json", str(tmp_path / "p")]
    done = CliRunner().invoke(main, ["plan", str(given), *words])
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "p").read_text())
    reference = made["reference"]
    assert made["model"] == str(small)
    assert reference["sharded"] and reference["memory"] > 2 * 70e9 / 8


def test_a_plan_has_no_row_that_the_model_has_no_positions_for(tmp_path):
    given = tmp_path / "given.yaml"
    tree = {"model": {"path": str(write("gemma-2-9b", tmp_path / "m"))}, "data": {"train": "x", "max_length": 16384}}
    given.write_text(yaml.safe_dump(tree | {"reference": {"tokens_per_batch": 16384}}))
    done = CliRunner().invoke(
        main, ["plan", str(given), "--rows", "9", "--prompt-tokens", "9", "--completion-tokens", "9"]
    )
    assert done.exit_code == 2 and "data.max_length (16384) must be at most the model's context of 8192" in done.output


def test_what_a_family_cannot_compute_again_is_not_planned():
    config, shape = config_of(), shape_of(outline("gpt2"))
    made = plan(config, shape, of_means(config, 100, 9, 9), cluster_of("H100", 1), layers=Layers(checkpointing=False))
    assert made.ways and not any(way.way.checkpointing for way in made.ways)


def test_a_narrow_terminal_has_two_tables_that_hold_what_one_does():
    made = planned(shape_of(outline("Llama-3.1-70B")), "H100", 64)
    assert set(page.SPEED) | set(page.MEMORY) == set(page.COLUMNS)
    for columns in (page.SPEED, page.MEMORY):
        places = [page.COLUMNS.index(name) for name in columns]
        widths = [max(len(line[place]) for line in (page.COLUMNS, *page.lines(made))) for place in places]
        assert sum(widths) + len(widths) - 1 <= 80


def test_files_in_few_bits_are_planned_in_16_and_that_is_said(tmp_path):
    folder = write("gpt-oss-20b", tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(content))
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump({"model": {"path": str(folder)}, "data": {"train": "x"}}))
    words = ["--rows", "1000", "--prompt-tokens", "300", "--completion-tokens", "300", "--gpu", "B200"]
    done = CliRunner().invoke(main, ["plan", str(given), *words])
    assert done.exit_code == 0 and "are quantised (mxfp4)" in done.output, done.output
    assert "20,914,757,184 parameters" in done.output


def test_memory_is_that_of_a_step_with_the_longest_row():
    """Which a step of average rows does not have."""
    config = config_of(data__max_length=8192, train__global_batch=8, reference__tokens_per_batch=8192)
    work = of_means(config, 1000, 50, 50)
    one_long = work.prompts.copy()
    one_long[0] = 8000
    shape, way = shape_of(outline("Llama-3.1-8B")), replace(WAY, tokens=8192)
    usual, long = (
        predict(shape, replace(work, prompts=prompts), cluster_of("H100", 8), way).memory
        for prompts in (work.prompts, one_long)
    )
    assert long.activations > 8 * usual.activations

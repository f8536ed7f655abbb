"""GPUs by the names that people have for them, and those that a file describes; what the host's memory must hold."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import real_configs
import torch
import yaml
from click.testing import CliRunner
from real_configs import WAY, config_of, outline, planned
from tiny_runs import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kto_dist.base.console import Console
from kto_dist.base.errors import UserError
from kto_dist.cluster import page
from kto_dist.cluster.gpu_file import read_gpu
from kto_dist.cluster.hardware import GB, GIB, GPUS, Gpu, cluster_of, gpu_called
from kto_dist.cluster.measure import this_machine
from kto_dist.cluster.plan import plan, shape_for
from kto_dist.cluster.predict import predict
from kto_dist.cluster.rates import Rates
from kto_dist.cluster.reference_pass import predict_reference
from kto_dist.cluster.workload import of_means, of_rows, step_load
from kto_dist.commands.cli import main
from kto_dist.model.devices import PEAKS, kind
from kto_dist.model.footprint import shape_of
from kto_dist.model.loading import load_model
from kto_dist.training.prepare import prepare


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("h100", "H100"),
        ("H100-80GB", "H100"),
        ("H100-SXM5", "H100"),
        ("h100sxm", "H100"),
        ("A100 80GB", "A100"),
        ("a100-40gb", "A100-40GB"),
        ("A100-PCIE-80GB", "A100-PCIe"),
        ("RTX4090", "RTX-4090"),
        ("rtx_4090", "RTX-4090"),
        ("MI300X-192GB", "MI300X"),
        ("L40S", "L40S"),
        ("GH200", "GH200"),
        ("H20", "H20"),
        ("H100-94GB", None),
        ("H100-3g", None),
        ("V100", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_any_usual_way_to_write_it(name, known):
    found = gpu_called(name)
    assert (found and found.name) == known


@pytest.mark.parametrize(
    ("name", "gib", "known", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.25, "A100", 312e12),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 79.15, "A100-PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100", 989e12),
        ("NVIDIA H100 PCIe", 79.1, "H100-PCIe", 756e12),
        ("NVIDIA H200", 139.8, "H200", 989e12),
        ("NVIDIA GH200 480GB", 94.5, "GH200", 989e12),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090", 165.2e12),
        ("AMD Instinct MI300X", 191.9, "MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.5, None, None),
        ("Tesla V100-SXM2-16GB", 15.8, None, None),
    ],
)
def test_a_gpu_is_known_by_what_torch_calls_it(name, gib, known, peak):
    found = gpu_called(name, gib * GIB)
    assert (found and found.name) == known and PEAKS.get(kind(name)[0]) == peak


def test_every_gpu_is_named_in_the_help():
    text = CliRunner().invoke(main, ["plan", "--help"]).output
    words = text.replace(",", " ").split()
    assert all(name in words for name in GPUS) and all(gpu.flops == PEAKS[kind(gpu.name)[0]] for gpu in GPUS.values())


def test_a_file_describes_a_gpu_of_ones_own(tmp_path, tiny_model):
    path = tmp_path / "Ada-6000.yaml"
    path.write_text(yaml.safe_dump({"gpu": {"like": "l40s", "memory_gib": 47.5, "tflops": 364, "attention": 0.4}}))
    found = read_gpu(path)
    assert found == replace(GPUS["L40S"], name="Ada-6000", memory=47.5 * GIB, flops=364e12, attention=0.4)
    path.write_text(yaml.safe_dump({"gpu": {"like": "mi300x"}}))  # its shares too
    assert read_gpu(path) == replace(GPUS["MI300X"], name="Ada-6000")
    whole = {"name": "X1", "tflops": 100, "memory_gib": 32, "memory_gb_per_s": 900}
    whole |= {"link_gb_per_s": 10, "network_gb_per_s": 20, "host_gb_per_s": 5}
    path.write_text(json.dumps({"gpu": whole}))
    alone = read_gpu(path)
    assert (alone.flops, alone.bandwidth, alone.link, alone.network) == (100e12, 900 * GB, 10 * GB, 20 * GB)
    assert (alone.matmul, alone.attention) == (0.7, 0.3)
    given, out = tmp_path / "c.yaml", tmp_path / "plan.json"
    given.write_text(yaml.safe_dump({"model": {"path": str(tiny_model)}, "data": {"train": "x", "max_length": 200}}))
    words = ["--rows", "100", "--prompt-tokens", "9", "--completion-tokens", "9", "--gpu", str(path)]
    done = CliRunner().invoke(main, ["plan", str(given), *words, "--json", str(out)])
    assert done.exit_code == 0 and "on 8 X1" in done.output, done.output
    assumed = json.loads(out.read_text())["assumptions"]
    assert (assumed["gpu"]["memory"], assumed["shares"]["memory"]) == (32 * GIB, 0.7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gpu": {"memory_gib": 48}}, "lacks gpu.tflops, gpu.memory_gb_per_s, .*give them, or `like`"),
        ({"gpu": {"like": "V100"}}, r"gpu.like \(V100\) is none that is known: there are A100"),
        ({"gpu": {"like": "H100", "memory": 48}}, "memory"),
        ({"gpu": {"like": "H100", "matmul": 70}}, "matmul"),
        ({"gpu": {"like": "H100", "memory_gib": -1}}, "memory_gib"),
    ],
)
def test_a_wrong_description_of_a_gpu_is_told(tmp_path, content, message):
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        read_gpu(path)


@pytest.mark.parametrize("wanted", ("prompt-tokens", "completion-tokens"))
@pytest.mark.parametrize("value", ("nan", "inf"))
def test_a_length_is_a_number(tmp_path, tiny_model, wanted, value):
    given = tmp_path / "c.yaml"
    given.write_text(yaml.safe_dump({"model": {"path": str(tiny_model)}, "data": {"train": "x", "max_length": 200}}))
    lengths = {"prompt-tokens": "9", "completion-tokens": "9"} | {wanted: value}
    words = [word for name, each in lengths.items() for word in (f"--{name}", each)]
    done = CliRunner().invoke(main, ["plan", str(given), "--rows", "10", *words])
    assert done.exit_code == 2 and f"--{wanted}" in done.output and "Traceback" not in done.output, done.output
    work = of_means(config_of(), 100, 1e30, 1e30)  # a number, however large: cut as any long row
    assert int((work.prompts + work.answers).max()) == 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--price", "nan"], "--price (nan) must be a number"),
        (["--host-memory", "inf"], "--host-memory (inf) must be a number"),
        (["--gpu", "nowhere.yaml"], "--gpu (nowhere.yaml) is no file that exists"),
        (["--gpu", "RTX-5090"], "describe another in a file, --gpu FILE.yaml"),
        ([], "A plan without the data needs config.json alone: give --rows, --prompt-tokens and --completion-tokens"),
    ],
)
def test_a_user_is_told_what_to_give(tmp_path, words, message):
    folder = real_configs.write("Llama-3.1-8B", tmp_path / "m")
    given = tmp_path / "c.yaml"
    given.write_text(yaml.safe_dump({"model": {"path": str(folder)}, "data": {"train": "x"}}))
    done = CliRunner().invoke(main, ["plan", str(given), *words])
    assert done.exit_code == 2 and message in done.output, done.output


def test_a_machine_is_measured_as_what_it_is_or_as_what_is_planned(monkeypatch):
    found = Rates(flops=0.0, bandwidth=0.0)

    def here(name: str, gib: float, planned: Gpu | None = None) -> Gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of: SimpleNamespace(total_memory=gib * GIB))
        return this_machine(found, 1, planned).gpu

    assert here("NVIDIA A100-SXM4-40GB", 39.5) == replace(GPUS["A100-40GB"], memory=39.5 * GIB)
    own = replace(GPUS["L40S"], name="NVIDIA RTX 6000 Ada Generation", memory=48 * GIB)
    assert here("NVIDIA RTX 6000 Ada Generation", 47.5, own) == replace(own, memory=47.5 * GIB)
    assert here("NVIDIA H200", 139.8, own).name == "H200"
    assert here("NVIDIA GH200 480GB", 94.5).name == "GH200"  # whose name has its processor's memory
    with pytest.raises(UserError, match="this one is a NVIDIA X: describe it in a file with `name: NVIDIA X`"):
        here("NVIDIA X", 47.5, own)


def mapped(lm: torch.nn.Module, file: str) -> float:
    """Share of the weights that lie in pages of the file, which all processes of a machine share."""
    pages = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            if line.rstrip().endswith(file):
                pages.append([int(end, 16) for end in line.split()[0].split("-")])
    sizes = [(p.numel(), any(low <= p.data_ptr() < high for low, high in pages)) for p in lm.parameters()]
    return sum(size for size, inside in sizes if inside) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("experts", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_weights_that_a_process_copies_as_it_loads_are_those_that_are_counted(tmp_path, dtype, experts):
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "tie_word_embeddings": False,
    }
    config = MixtralConfig(num_local_experts=4, **sizes) if experts else LlamaConfig(**sizes)
    lm = (MixtralForCausalLM if experts else LlamaForCausalLM)(config).to(dtype)
    lm.save_pretrained(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), gguf_file=None, dtype=torch.bfloat16, attention="eager")
    shape = shape_of(loaded)
    config = shape_of(real_configs.hollow(tmp_path / "m"))
    assert config.copied == pytest.approx((1 - mapped(loaded, "model.safetensors")) * shape.parameters)
    assert (config.copied == 0) == (dtype == torch.bfloat16 and not experts)


def test_below_zero_3_every_process_of_a_node_copies_what_it_cannot_share():
    lm, work = outline("Llama-3.1-8B"), of_means(config_of(), 1000, 300, 300)
    shape = replace(shape_of(lm), copied=shape_of(lm).parameters)
    of_a_node = 8 * 2 * shape.parameters
    for gpus in (8, 16):
        for stage in (1, 2, 3):
            found = predict(shape, work, cluster_of("H200", gpus), replace(WAY, zero_stage=stage)).memory
            assert found.loading == (0 if stage == 3 else of_a_node)
    assert predict(replace(shape, copied=0), work, cluster_of("H200", 8), WAY).memory.loading == 0
    with torch.device("meta"):
        other = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))  # of which no dtype is known
    lora, qlora = (shape_for(other, method, 16) for method in ("lora", "qlora"))
    assert lora.copied == lora.parameters and qlora.copied == 0  # packed on the GPU, layer by layer
    config = config_of(train__global_batch=64)
    small, large = (
        plan(config, shape, work, cluster_of("H200", 8, host_memory=host)) for host in (of_a_node - 1, of_a_node)
    )
    assert {way.way.zero_stage for way in small.ways if not way.trouble} == {3}
    assert any("GiB of a node's own memory while it loads" in way.trouble for way in small.ways)
    assert small.reference.sharded and not small.reference.offload and not small.reference.loading
    assert not large.ways[0].trouble and not large.reference.sharded
    said = [line for line in page.below(large) if line.startswith("while it loads")]
    assert len(said) == 1 and "120 GiB of a node's memory, 15.0 for each of its 8 processes" in said[0]
    assert not any(line.startswith("while it loads") for line in page.below(small))


def test_a_reference_that_fits_nowhere_is_a_plan_that_does_not_fit():
    small, large = shape_of(outline("gpt2")), shape_of(outline("Llama-3.1-405B"))
    config = config_of(train__global_batch=64)
    work = of_means(config, 1000, 300, 300)
    cluster = cluster_of("A100", 8, host_memory=500 * GB)
    made = plan(config, small, work, cluster, reference=large)
    assert made.reference.offload and made.reference.host == 2 * large.parameters
    assert made.best is None and "for the reference 756 of 466 GiB of a node's own memory" in made.ways[0].trouble
    roomy = plan(config, small, work, cluster_of("A100", 8), reference=large)
    assert roomy.best is not None and not roomy.reference.trouble
    # 4 bits lie whole on every GPU
    packed = predict_reference(shape_for(outline("Llama-3.1-405B"), "qlora", 16), work, cluster, WAY, 1024)
    assert "of 79 GiB a GPU" in packed.trouble


def test_ranks_that_have_a_row_more_than_others_make_them_wait():
    for rows, most in ((4096, 1), (4100, 2), (8192, 2)):
        work = of_means(config_of(train__global_batch=rows), 10**6, 4e6, 1e6)  # all as long as they may be
        assert len(step_load(work, 4096, 1024).batches) == most
    assert of_means(config_of(train__global_batch=64), 1000, 9, 9).steps == 16  # the last one takes what is left


def test_steps_are_of_the_rows_that_the_loss_takes(tmp_path, tiny_model, tiny_log):
    config = tiny_config(tmp_path, tiny_model, tiny_log, objective__loss="sft")
    prepared = prepare(config, Console())
    units = prepared.plan.units
    assert units is not None and 0 < units.size < len(prepared.train)
    work = of_rows(prepared)
    assert work.rows == work.prompts.size == units.size and work.reference_pairs <= units.size
    every = of_rows(prepare(tiny_config(tmp_path, tiny_model, tiny_log), Console()))
    assert every.rows == len(prepared.train)


def test_a_plan_is_of_the_gpu_that_it_names():
    made = planned(shape_of(outline("Llama-3.1-8B")), "l40s", 8)
    assert page.above(made)[0].endswith("on 8 L40S, 8 a node") and made.cluster.gpu is GPUS["L40S"]

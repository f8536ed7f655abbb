"""The benchmarks run, say what fails, and count right. What they measure is not looked at here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import random_model
from reference import measure_plan
from step_profile import Span, class_of, gaps, of_kernels

ROOT = Path(__file__).parents[1]


def run_gpu(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.soak
def test_every_stage_of_a_gpus_measurement_runs_with_tiny_sizes_on_the_cpu(tmp_path):
    done = run_gpu(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    for stage in gpu.STAGES:
        content = json.loads((tmp_path / f"cpu-tiny-{stage.name}.json").read_text())
        assert content["device"] and content["versions"]["torch"], stage.name
    assert "left out: kto" not in done.stdout  # every setting that a variant of kto_dist asks for is known


def test_a_stage_asked_for_by_name_leaves_its_result_with_machine_versions_and_code(tmp_path):
    done = run_gpu(tmp_path, "--tiny", "imports")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert file.name == "cpu-tiny-imports.json"
    assert content["device"] and content["date"] and content["code"]["digests"]["kernels"]
    assert {"python", "torch", "transformers", "deepspeed"} <= set(content["versions"])


def test_an_unknown_stage_is_refused_with_those_that_exist(tmp_path):
    done = run_gpu(tmp_path, "profil")
    assert done.returncode == 2
    assert "profil" in done.stderr and "throughput-135m" in done.stderr


def stage(folder: Path, code: str, limit: float = 60) -> gpu.Stage:
    script = folder / "stage.py"
    script.write_text(f"import json, sys, time\nfile = sys.argv[sys.argv.index('--json') + 1]\n{code}")
    return gpu.Stage(name="mine", script=str(script), limit=limit)


def run_stage(folder: Path, wanted: gpu.Stage, left: float = 600) -> dict:
    return gpu.run(wanted, folder, "cpu", folder, tiny=True, left=left)


def test_a_stage_that_fails_is_said(tmp_path):
    assert run_stage(tmp_path, stage(tmp_path, "raise SystemExit(3)"))["state"] == "failed with status 3"


def test_a_stage_that_hangs_is_stopped_with_all_that_it_started_and_keeps_what_it_has(tmp_path):
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "open(file, 'w').write(json.dumps({'pid': child.pid}))\n"
        "time.sleep(100)"
    )
    line = run_stage(tmp_path, stage(tmp_path, code, limit=11))
    assert line["state"] == "stopped after 11 s"
    pid = json.loads(Path(line["file"]).read_text())["pid"]
    deadline = time.monotonic() + 240
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """A zombie that nobody waits for does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_for_which_no_time_is_left_is_not_started(tmp_path):
    line = run_stage(tmp_path, stage(tmp_path, "open(file, 'w').write('{}')"), left=5)
    assert line["state"] == "no time was left" and not Path(line["file"]).exists()


# As torch 2.11 and 2.13 name them on a Hopper GPU.
@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>", "matmul"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>, false, true>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("_row_kernel", "head's own kernels"),
        ("_rms_norm_forward_kernel", "layer kernels"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int>",
            "copies and casts",
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float>>>", "reductions"),
        ("void at::native::vectorized_elementwise_kernel<8, BinaryFunctor<MulFunctor<float>>>", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("void something_else()", "other"),
    ],
)
def test_kernels_are_classed_by_their_names(kernel, wanted):
    assert class_of(kernel) == wanted


def span(begin: float, end: float, name: str = "") -> Span:
    return Span(name=name, begin=begin, end=end)


def test_gaps_are_where_no_kernel_runs_on_any_stream():
    kernels = [span(1, 4), span(2, 3), span(3.5, 5), span(7, 8)]
    assert [(gap.begin, gap.end) for gap in gaps(kernels, 0, 10)] == [(0, 1), (5, 7), (8, 10)]


def test_a_profile_counts_one_step_and_names_what_the_host_did_in_a_gap():
    steps = [span(0, 5), span(5, 10)]
    kernels = [span(0, 4, "nvjet"), span(5, 9, "nvjet"), span(9, 10, "_row_kernel")]
    found = of_kernels(steps, kernels, [span(3, 6, "outer"), span(4.2, 4.8, "inner")])
    assert found["busy"] == pytest.approx(0.9)
    assert [(line["name"], line["seconds"]) for line in found["classes"]] == [
        ("matmul", 4),
        ("head's own kernels", 0.5),
    ]
    assert found["gaps"]["longest"][0]["host"] == ["inner", "outer"]


@pytest.mark.parametrize("lengths", random_model.LENGTHS)
def test_random_rows_keep_to_the_lengths_they_were_asked_for(tmp_path, lengths):
    random_model.write_log("tiny", lengths, 400, 1024, tmp_path / "log.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    words = sorted((len(row["prompt"].split()), len(row["completion"].split())) for row in rows)
    wanted = random_model.LENGTHS[lengths]
    # rows that are too long are drawn again, which takes from the longer of the two
    assert 0.7 * wanted.prompt < words[200][0] < 1.2 * wanted.prompt
    assert max(sum(pair) for pair in words) < 1024 and len(rows) == 400


def test_a_plans_pairs_are_found_and_counted():
    measured = measure_plan(640)
    # an epoch of 20 steps: each row with its own completion, and with another's
    assert measured["rows"] == 640 and 640 < measured["pairs"] <= 2 * 640
    assert measured["find_seconds"] > 0 and measured["hash_seconds"] > 0

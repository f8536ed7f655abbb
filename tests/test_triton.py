"""The Triton kernels compile for a GPU: its compiler knows types that the interpreter lets pass."""

import os
import subprocess
import sys
from pathlib import Path

import kto_kernels
import pytest
import torch
from kernel_cases import device_of

pytest.importorskip("triton")

from kto_kernels import triton_scale

COMPILE = """
import itertools
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kto_kernels import LOSSES, triton_rows, triton_scale, triton_sequences

def compile(kernel, signature, constants, warps, aligned=()):
    signature = signature | dict.fromkeys(constants, "constexpr")
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert ptx
    return ptx

for logits, gradient, options in (
    ("fp32", "bf16", dict(HAS_BIAS=False, GRADIENT=True, ENTROPY=False)),
    ("fp32", "fp32", dict(HAS_BIAS=True, GRADIENT=True, ENTROPY=True)),
    ("bf16", "bf16", dict(HAS_BIAS=False, GRADIENT=True, ENTROPY=False)),
    ("bf16", "bf16", dict(HAS_BIAS=False, GRADIENT=False, ENTROPY=True)),
    ("fp32", "fp32", dict(HAS_BIAS=False, GRADIENT=False, ENTROPY=False)),
):
    signature = dict(logits="*" + logits, gradient="*" + gradient, target="*i64", bias="*" + gradient, logps="*fp32")
    signature |= dict(scales="*fp32", entropies="*fp32", V="i32", logits_stride="i32", gradient_stride="i32")
    capped = dict(SCALE=0.3, SOFTCAP=30.0, TEMPERATURE=0.7) if options["HAS_BIAS"] else {}
    constants = dict(SCALE=1.0, SOFTCAP=None, TEMPERATURE=1.0, WIDE=tl.float32, BLOCK=4096, STAGES=1)
    aligned = ("logits", "gradient", "V", "logits_stride", "gradient_stride")
    ptx = compile(triton_rows._row_kernel, signature, constants | capped | options, 8, aligned)
    # 16 bytes at a time: a mask over single columns would take that from the kernel, which lives on memory bandwidth
    assert any("ld.global" in line and ".v4." in line for line in ptx.splitlines())
    assert not options["GRADIENT"] or any("st.global" in line and ".v4." in line for line in ptx.splitlines())

signature = dict(token_logps="*fp32", starts="*i64", first="i32", scales="*fp32", row_slope="*fp32")
terms = ("ref_logps", "sign", "row_weight", "z0", "beta", "nll_weight", "other_weight")
found = ("logps", "losses", "slopes", "others")
signature |= dict.fromkeys(terms + found, "*fp64")
order = ("token_logps", "starts", *terms, "scales", *found, "row_slope", "first")
for loss, has_nll, has_other in itertools.product(LOSSES.values(), (False, True), (False, True)):
    if has_other and loss.unit > 1:
        continue
    constants = dict(UNIT=loss.unit, CURVE=loss.curve.name, HAS_REFERENCE=loss.has_reference, HAS_Z0=loss.has_z0)
    constants |= dict(HAS_NLL=has_nll, HAS_OTHER=has_other, HAS_SCALES=loss.unit == 2, BLOCK=1024)
    compile(triton_sequences._sequence_kernel, {name: signature[name] for name in order}, constants, 4)

signature = dict(source="*fp32", factor="*fp32", into="*bf16", count="i32")
compile(triton_scale._scale_kernel, signature, dict(BLOCK=8192), 8)
signature = dict(source="*bf16", factors="*fp32", into="*bf16", width="i32", source_stride="i32", into_stride="i32")
compile(triton_scale._scale_rows_kernel, signature, dict(BLOCK=2048), 4)
"""


def test_every_variant_in_use_compiles_for_hopper_with_wide_loads_and_stores(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(kto_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("shape", ((0, 3), (5, 1), (3, 5000)))
def test_rows_are_scaled_each_by_its_own_factor(shape, in_place, dtype):
    device = device_of("triton")
    rows = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    if not in_place:
        rows = torch.stack([rows, rows], dim=-1)[..., 0]  # what lies apart is read where it lies
    factor = torch.rand(shape[0], dtype=torch.promote_types(dtype, torch.float32), device=device) + 0.5
    wanted = rows.double() * factor.double()[:, None]
    found = triton_scale.scaled_rows(rows, factor, in_place=in_place)
    assert (found.data_ptr() == rows.data_ptr()) == (in_place or not rows.numel())
    # the interpreter truncates to bf16
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)

"""What the tests of the kernels share: transforms, backends, errors by name, and counting products and memory."""

import importlib.util

import torch
from kto_kernels import LogitTransform
from torch.utils._python_dispatch import TorchDispatchMode

INPUTS = ("hidden", "weight", "bias")
TRANSFORMS = {
    "none": LogitTransform(),
    "scale": LogitTransform(scale=0.3),
    "softcap": LogitTransform(softcap=0.7),
    "temperature": LogitTransform(temperature=1.7),
    "all": LogitTransform(scale=-1.9, softcap=3.0, temperature=0.6),
}
# without a GPU the Triton kernels run in its interpreter: see conftest.py
BACKENDS = ("torch", "triton") if importlib.util.find_spec("triton") else ("torch",)


def device_of(backend):
    """Where a case of this backend runs: the Triton kernels on the GPU where there is one, torch's on the CPU."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def rounding_of(backend):
    """The interpreter truncates what it stores as bf16, where a GPU rounds: twice the error, from there on."""
    return 1 if backend == "torch" or torch.cuda.is_available() else 2


# What the row pass on the CPU takes beside the budget: a block of a few rows, and what operations make of it.
BLOCKS = 5 * 4 * 2**20


def error(found, wanted):
    """Relative, by name, in the Euclidean norm."""
    return {name: float((found[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def budget_of(rows_a_chunk, vocabulary, bytes_per_logit):
    return rows_a_chunk * vocabulary * bytes_per_logit


def products(run):
    """Multiplications in matrix products while `run` runs: n * h * v for one of (n, h) and (h, v)."""
    with _Products() as counter:
        run()
    return counter.total


class _Products(TorchDispatchMode):
    """Counts mm and addmm, whatever their overload; another way to multiply two matrices is an error."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__.rstrip("_")
        assert name not in ("matmul", "linear", "bmm", "baddbmm", "einsum", "dot"), name
        if name in ("mm", "addmm"):
            left, right = arguments[-2:] if name == "mm" else arguments[1:3]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*arguments, **(options or {}))


def measured(run):
    """Most bytes that the CPU allocator had given out at a time while `run` ran, beyond what it had before."""
    run()  # what the first call alone allocates, and gradients that then are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak

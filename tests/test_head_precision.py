"""How far the fused head's results lie from the definition in fp64, in each dtype and for extreme logits."""

import pytest
import torch
from head_cases import agree, case, exact, plain_pytorch, run
from kernel_cases import BACKENDS, TRANSFORMS, budget_of, device_of, error, rounding_of
from kto_kernels import kto_head

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", (5, 1000))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_fp32_errs_by_less_than_1e6th(transform, rows_a_chunk, backend):
    leaves, others = case([9, 1, 0, 12, 3], 32, 333, dtype=torch.float32, spread=0.2, backend=backend)
    options = {"transform": TRANSFORMS[transform], "entropy": True}
    wanted = exact(leaves, others, **options)
    budget = budget_of(rows_a_chunk, 333, 4)
    errors = error(run(kto_head, leaves, others, budget=budget, backend=backend, **options), wanted)
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", (5, 1000))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_bf16_errs_at_most_twice_as_much_as_plain_pytorch_does(transform, rows_a_chunk, backend):
    """Over five draws: a single error is the sum of a few roundings, and may happen to cancel."""
    ours, theirs = {}, {}
    for seed in range(5):
        leaves, others = case([9, 1, 12, 3], 32, 333, dtype=torch.bfloat16, spread=0.2, seed=seed, backend=backend)
        options = {"transform": TRANSFORMS[transform]}
        wanted = exact(leaves, others, **options)
        budget = budget_of(rows_a_chunk, 333, 2)
        found = error(run(kto_head, leaves, others, budget=budget, backend=backend, **options), wanted)
        peer = error(run(plain_pytorch, leaves, others, **options), wanted)
        for name in wanted:
            ours[name] = ours.get(name, 0) + found[name]
            theirs[name] = theirs.get(name, 0) + peer[name]
    limit = 2 * rounding_of(backend)
    assert all(ours[name] <= limit * theirs[name] for name in ours), (ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits_dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocabulary", (2048, 2049))  # rows that are aligned, and rows that are padded to be
def test_on_a_gpu_bf16_errs_at_most_twice_as_much_as_plain_pytorch_does(vocabulary, logits_dtype, backend):
    lengths = [130, 1, 90, 200, 77]
    leaves, others = case(
        lengths, 256, vocabulary, bias=False, dtype=torch.bfloat16, spread=0.2, backend=backend, device="cuda"
    )
    others["ref_logps"] = exact(leaves, others)["logps"].cuda() + 1  # so that no sigmoid is saturated
    wanted = exact(leaves, others)
    budget = budget_of(150, vocabulary, 6)
    found = error(run(kto_head, leaves, others, budget=budget, logits_dtype=logits_dtype, backend=backend), wanted)
    peer = error(run(plain_pytorch, leaves, others, wide=logits_dtype == torch.float32), wanted)
    # What plain PyTorch rounds once, at its end, we round three times; and tensor cores add up fp32 a little less
    # exactly than the product of fp32 matrices does. Both are far below what bf16 logits cost.
    floors = {name: 2**-9 if name.endswith("grad") else 5e-5 for name in peer}
    assert all(found[name] <= 2 * max(peer[name], floors[name]) for name in wanted), (found, peer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (1e5, 1e30))
def test_hopeless_targets_stay_finite(size, backend):
    # the target's logit is `size` below another, so exp underflows
    device = device_of(backend)
    leaves = {
        "hidden": torch.tensor([[size / 2, 0.0]], device=device, requires_grad=True),
        "weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True),
        "bias": None,
    }
    _, others = case([1], 2, 3, bias=False, backend=backend)
    others["target"] = torch.tensor([1], device=device)
    found = run(kto_head, leaves, others, backend=backend)
    assert found["logps"].item() == pytest.approx(-size, rel=1e-6)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", (2, 8, 100, 1e4))
def test_improbable_targets_are_as_exact_as_any(spread, backend):
    # log-probs down to some -10, -40, -500 and -50,000: on both sides of where the kernel does a row again
    leaves, others = case([40, 3], bias=False, spread=spread, backend=backend)
    options = {"entropy": True, "transform": TRANSFORMS["scale"]}
    found = run(kto_head, leaves, others, backend=backend, **options)
    agree(found, exact(leaves, others, **options), tolerance=1e-11)


def test_many_bf16_chunks_add_up_as_exactly_as_one():
    """Gradients of one sign, over 3,000 sequences of one row: a bf16 sum stops growing after some 256 of them."""
    leaves, others = case([1] * 3000, 8, 11, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        leaves["hidden"].abs_().add_(1)
    others |= {"target": torch.zeros(3000, dtype=torch.int64), "sign": torch.ones(3000)}
    wanted = exact(leaves, others)["weight.grad"]

    def err(rows_a_chunk):
        found = run(kto_head, leaves, others, budget=budget_of(rows_a_chunk, 11, 2))
        return float((found["weight.grad"].double() - wanted).norm())

    assert err(1) <= 2 * err(3000) + 4e-3 * float(wanted.norm())


def test_under_autocast_it_is_the_head_of_the_cast_tensors():
    leaves, others = case([4, 3], bias=False, dtype=torch.float32)
    narrow = {name: None if t is None else t.detach().bfloat16().requires_grad_() for name, t in leaves.items()}
    wanted = run(kto_head, narrow, others)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kto_head, leaves, others)
    assert found["logps"].equal(wanted["logps"])
    assert found["weight.grad"].dtype == torch.float32
    torch.testing.assert_close(found["weight.grad"], wanted["weight.grad"].float())

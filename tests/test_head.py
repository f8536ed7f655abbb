"""The fused head against its definition: every output and gradient, the matmuls it takes, and the memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    BLOCKS,
    INPUTS,
    TRANSFORMS,
    budget_of,
    device_of,
    error,
    measured,
    products,
    rounding_of,
)
from kto_kernels import LOSSES, SATURATED_SLOPE, kto_head, reference, sequence_lengths
from kto_kernels.chunks import cut, even_rows
from kto_kernels.rows import Rows, row_pass
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

OUTPUTS = ("loss", "logps", "losses", "entropy")


def case(
    lengths,
    width=6,
    vocabulary=53,
    *,
    bias=True,
    dtype=torch.float64,
    seed=0,
    spread=0.3,
    frozen=(),
    backend="torch",
    device=None,
):
    """Leaves by name, and the other arguments of the head, where this backend runs."""
    device = device or device_of(backend)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows, sequences = sum(lengths), len(lengths)
    leaves = {
        "hidden": spread * normal(rows, width),
        "weight": normal(vocabulary, width),
        "bias": normal(vocabulary) if bias else None,
    }
    for name, tensor in leaves.items():
        if tensor is not None:
            leaves[name] = tensor.to(device, dtype).requires_grad_(name not in frozen)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    others = {
        "target": torch.randint(vocabulary, (rows,), generator=draw),
        "lengths": sizes,
        # near the log-probs of a uniform guess, so that no sigmoid is saturated
        "ref_logps": -4.0 * sizes + normal(sequences),
        "sign": torch.where(torch.rand(sequences, generator=draw) < 0.5, 1.0, -1.0),
        "row_weight": torch.rand(sequences, generator=draw, dtype=torch.float64) + 0.5,
        "z0": torch.tensor(0.4, dtype=torch.float64),
    }
    others = {name: value if name == "lengths" else value.to(device) for name, value in others.items()}
    return leaves, others | {"beta": 0.1}


def run(head, leaves, others, *, grad_out=1.0, **options):
    """Outputs and gradients by name."""
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    result = head(*positional, **arguments, **options)
    for leaf in leaves.values():
        if leaf is not None:
            leaf.grad = None
    if result.loss.requires_grad:
        (result.loss * grad_out).backward()
    found = {name: getattr(result, name) for name in OUTPUTS if getattr(result, name) is not None}
    found = {name: value.detach().cpu() for name, value in found.items()}
    return found | {
        f"{name}.grad": leaf.grad.cpu().clone()
        for name, leaf in leaves.items()
        if leaf is not None and leaf.grad is not None
    }


def exact(leaves, others, **options):
    wide = {name: None if t is None else t.detach().cpu().double().requires_grad_() for name, t in leaves.items()}
    others = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in others.items()}
    return run(reference.kto_head, wide, others, **options)


def agree(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    width=st.integers(1, 7),
    vocabulary=st.integers(1, 60),
    rows_a_chunk=st.integers(1, 30),
    bias=st.booleans(),
    entropy=st.booleans(),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_are_the_definitions_whatever_the_chunks(
    backend, lengths, width, vocabulary, rows_a_chunk, bias, entropy, transform, loss, seed
):
    leaves, others = case(lengths, width, vocabulary, bias=bias, seed=seed, backend=backend)
    options = {"transform": TRANSFORMS[transform], "loss": loss, "entropy": entropy, "grad_out": 1.7}
    wanted = exact(leaves, others, **options)
    budget = budget_of(rows_a_chunk, vocabulary, 8)
    agree(run(kto_head, leaves, others, budget=budget, backend=backend, **options), wanted)


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

    def plain(hidden, weight, target, lengths, *, bias, transform, **others):
        logits = transform((hidden @ weight.T + bias).float())
        logps = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0].double()
        summed = torch.stack([part.sum() for part in logps.split(lengths.tolist())])
        losses = reference.kto_loss(summed, others["ref_logps"], others["sign"], z0=others["z0"], beta=others["beta"])
        loss = (others["row_weight"] * losses).sum()
        return reference.HeadOutput(loss=loss, logps=summed, losses=losses, entropy=None)

    ours, theirs = {}, {}
    for seed in range(5):
        leaves, others = case([9, 1, 12, 3], 32, 333, dtype=torch.bfloat16, spread=0.2, seed=seed, backend=backend)
        options = {"transform": TRANSFORMS[transform]}
        wanted = exact(leaves, others, **options)
        budget = budget_of(rows_a_chunk, 333, 2)
        found = error(run(kto_head, leaves, others, budget=budget, backend=backend, **options), wanted)
        peer = error(run(plain, leaves, others, **options), wanted)
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
    def plain(hidden, weight, target, lengths, *, bias, **others):
        wide = [t.float() if logits_dtype == torch.float32 else t for t in (hidden, weight)]
        logps = (wide[0] @ wide[1].T).float().log_softmax(-1).gather(-1, target[:, None])[:, 0].double()
        summed = torch.stack([part.sum() for part in logps.split(lengths.tolist())])
        losses = reference.kto_loss(summed, others["ref_logps"], others["sign"], z0=others["z0"], beta=others["beta"])
        loss = (others["row_weight"] * losses).sum()
        return reference.HeadOutput(loss=loss, logps=summed, losses=losses, entropy=None)

    lengths = [300, 1, 900, 500, 77]
    leaves, others = case(
        lengths, 256, vocabulary, bias=False, dtype=torch.bfloat16, spread=0.2, backend=backend, device="cuda"
    )
    wanted = exact(leaves, others)
    budget = budget_of(600, vocabulary, 6)
    found = error(run(kto_head, leaves, others, budget=budget, logits_dtype=logits_dtype, backend=backend), wanted)
    peer = error(run(plain, leaves, others), wanted)
    # a gradient that plain PyTorch keeps in fp32 until its end, we round once more
    limits = {name: 2 * max(value, 2**-9) if name.endswith("grad") else 2 * value for name, value in peer.items()}
    assert all(found[name] <= limits[name] + 1e-7 for name in wanted), (found, peer)


@pytest.mark.parametrize("rows_a_chunk", (4, 11, 1000))
@pytest.mark.parametrize(("frozen", "count"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)])
def test_forward_and_backward_take_three_matmuls_and_one_less_for_each_frozen_input(frozen, count, rows_a_chunk):
    leaves, others = case([9, 1, 0, 12, 3], bias=False, dtype=torch.float32, frozen=frozen)
    size = leaves["hidden"].numel() * leaves["weight"].shape[0]
    budget = budget_of(rows_a_chunk, 53, 4)
    assert products(lambda: run(kto_head, leaves, others, budget=budget)) == count * size


def test_without_gradients_it_takes_one_matmul():
    leaves, others = case([9, 1, 0, 12, 3], bias=False, dtype=torch.float32)
    size = leaves["hidden"].numel() * leaves["weight"].shape[0]
    with torch.no_grad():
        assert products(lambda: run(kto_head, leaves, others, budget=1)) == size


@pytest.mark.parametrize("trained", INPUTS)
def test_a_frozen_input_gets_no_gradient_and_the_other_keeps_its_own(trained):
    frozen = tuple(name for name in INPUTS if name != trained)
    leaves, others = case([5, 2, 4], frozen=frozen)
    wanted = exact(leaves, others)[f"{trained}.grad"]
    found = run(kto_head, leaves, others, budget=budget_of(3, 53, 8))
    torch.testing.assert_close(found.pop(f"{trained}.grad"), wanted, rtol=1e-12, atol=1e-12)
    assert not [name for name in found if name.endswith(".grad")]


def test_a_tied_weight_gets_the_sum_of_both_gradients():
    leaves, others = case([5, 2, 4], bias=False)
    ids = torch.arange(11)

    def gradient(head):
        tied = leaves["weight"].detach().clone().requires_grad_()
        run(head, {"hidden": tied[ids].tanh(), "weight": tied, "bias": None}, others)
        return tied.grad

    # `run` clears what it is given; the embedding is no leaf
    torch.testing.assert_close(gradient(kto_head), gradient(reference.kto_head), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", (False, True), ids=("no bias", "bias"))
@pytest.mark.parametrize(
    "lengths", ([40] * 3, [4] * 30, [40, 120]), ids=("one a chunk", "many a chunk", "one is longer")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_memory_beyond_inputs_and_gradients_is_the_budget_and_fp32_sums(dtype, lengths, bias):
    width, vocabulary = 1024, 40_001
    leaves, others = case(lengths, width, vocabulary, bias=bias, dtype=dtype)
    budget = budget_of(40, vocabulary, dtype.itemsize)
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]

    def both_ways():
        kto_head(*positional, **arguments, budget=budget).loss.backward()
        leaves["hidden"].grad = leaves["weight"].grad = None

    fp32_sum = 4 * width * vocabulary
    # the sums become the gradients where those are fp32; a bf16 gradient is made beside its sum
    gradient = 0 if dtype == torch.float32 else leaves["weight"].nbytes
    # of a bf16 sum's product a block of the vocabulary is there at a time, and once more in fp32
    block = 0 if dtype == torch.float32 else 6 * 8192 * width
    sums = 2 if max(lengths) > 40 else 1
    peak = measured(both_ways)
    assert budget + block + BLOCKS < fp32_sum  # so that one more sum shows
    assert sums * fp32_sum <= peak <= budget + sums * fp32_sum + gradient + block + BLOCKS


def test_memory_does_not_grow_with_the_rows():
    def peak(sequences):
        leaves, others = case([50] * sequences, 8, 20_001, bias=False, dtype=torch.float32)
        return measured(lambda: run(kto_head, leaves, others, budget=budget_of(50, 20_001, 4)))

    assert peak(40) - peak(4) < 50 * 36 * 8 * 4 * 8  # a few (N, H)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", ([], [0, 0]), ids=("no sequence", "empty sequences"))
def test_a_rank_without_tokens_gets_zero_gradients(lengths, backend):
    leaves, others = case(lengths, backend=backend)
    found = run(kto_head, leaves, others, backend=backend)
    assert found["logps"].tolist() == [0.0] * len(lengths)
    assert not any(found[f"{name}.grad"].any() for name in INPUTS)
    assert found["weight.grad"].shape == leaves["weight"].shape


def test_more_rows_and_sequences_than_16_bits_count():
    lengths = [70_000] + [1] * 70_000
    # in one chunk where a GPU's grid is to hold them
    backend = "triton" if torch.cuda.is_available() else "torch"
    leaves, others = case(lengths, 2, 3, bias=False, backend=backend)
    found = run(kto_head, leaves, others, budget=2**24, backend=backend)
    agree(found, exact(leaves, others), tolerance=1e-10)


@pytest.mark.gpu  # the interpreter counts in 64 bits anyway
def test_a_chunk_of_more_elements_than_32_bits_count_is_addressed_in_64():
    vocabulary = 65_537
    logits = torch.randn(32_800, vocabulary, dtype=torch.bfloat16, device="cuda")
    target = torch.randint(vocabulary, (len(logits),), device="cuda")
    found = Rows.empty(len(logits), logits, scale=False, entropy=False)
    row_pass(logits, target, found, bias=None, transform=TRANSFORMS["none"], gradient=None, backend="triton")
    last = slice(len(logits) - 5, None)
    wanted = logits[last].float().log_softmax(-1).gather(1, target[last, None])[:, 0]
    torch.testing.assert_close(found.logps[last], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_apart_in_memory_is_read_where_it_lies(backend):
    leaves, others = case([3, 0, 5], backend=backend)
    wanted = exact(leaves, others)
    for name in ("target", "ref_logps", "sign", "row_weight"):
        others[name] = torch.stack([others[name], torch.zeros_like(others[name])], dim=1)[:, 0]
    for name in leaves:
        apart = torch.stack([leaves[name].detach(), torch.zeros_like(leaves[name])], dim=-1)[..., 0]
        leaves[name] = apart.requires_grad_()
    agree(run(kto_head, leaves, others, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_a_bias_rules_out_take_no_part(backend):
    leaves, others = case([3, 5], vocabulary=5000, spread=0.1, backend=backend)
    others["target"] = others["target"] % 100 + 4700
    with torch.no_grad():
        leaves["bias"][:4500] = float("-inf")  # more than a block of the kernel
    found = run(kto_head, leaves, others, backend=backend, entropy=True)
    for name in ("weight", "bias"):
        leaves[name] = leaves[name].detach()[4500:].clone().requires_grad_()
    others["target"] = others["target"] - 4500
    wanted = exact(leaves, others, entropy=True)
    for name in ("loss", "logps", "entropy", "hidden.grad"):
        torch.testing.assert_close(found[name], wanted[name])


def test_a_second_backward_is_refused_since_gradients_are_scaled_in_place():
    leaves, others = case([2])
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    loss = kto_head(*positional, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_under_autocast_it_is_the_head_of_the_cast_tensors():
    leaves, others = case([4, 3], bias=False, dtype=torch.float32)
    narrow = {name: None if t is None else t.detach().bfloat16().requires_grad_() for name, t in leaves.items()}
    wanted = run(kto_head, narrow, others)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kto_head, leaves, others)
    assert found["logps"].equal(wanted["logps"])
    assert found["weight.grad"].dtype == torch.float32
    torch.testing.assert_close(found["weight.grad"], wanted["weight.grad"].float())


def test_only_the_loss_carries_a_gradient():
    leaves, others = case([2, 3])
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    result = kto_head(*positional, **arguments, entropy=True)
    carrying = [name for name in OUTPUTS if getattr(result, name).requires_grad]
    assert carrying == ["loss"]
    assert result.count == 2


def test_a_sequence_is_saturated_where_its_sigmoid_is_flat():
    leaves, others = case([1, 1, 1])
    others["ref_logps"] = torch.tensor([-4.0, 300.0, -300.0])
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    result = kto_head(*positional, **arguments)
    assert result.saturated.tolist() == [False, True, True]
    assert (result.losses * (1 - result.losses) < SATURATED_SLOPE).equal(result.saturated)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "lengths sum to 4.*hidden has 5 rows"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "4 targets.*5 rows"),
        ({"row_weight": torch.ones(1)}, r"row_weight has shape \(1,\).*2 lengths"),
        ({"loss": "dpo"}, "'dpo'.*kto, apo_zero_unpaired"),
        ({"backend": "cuda"}, "'cuda'.*auto, torch, triton"),
        ({"weight": torch.zeros(53, 6)}, "float64.*float32.*one dtype"),
        ({"logits_dtype": torch.float16}, "float16.*float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_told_with_its_rule(changes, message):
    leaves, others = case([2, 3])
    arguments = {**leaves, **others, **changes}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    with pytest.raises(ValueError, match=message):
        kto_head(*positional, **arguments)


@pytest.mark.skipif("triton" not in BACKENDS or torch.cuda.is_available(), reason="needs triton and no GPU")
def test_triton_without_a_gpu_or_its_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    leaves, others = case([2])
    with pytest.raises(ValueError, match="needs a GPU"):
        run(kto_head, leaves, others, backend="triton")


@given(lengths=st.lists(st.integers(0, 12), max_size=12), rows=st.integers(1, 15))
def test_chunks_cover_every_row_once_and_cut_only_what_does_not_fit(lengths, rows):
    chunks = list(cut(lengths, rows))
    edges = [chunk.start for chunk in chunks] + [sum(lengths)]
    assert all(chunk.stop == after for chunk, after in zip(chunks, edges[1:], strict=True))
    assert all(chunk.stop - chunk.start <= rows for chunk in chunks)
    assert [s for chunk in chunks if chunk.complete for s in range(chunk.first, chunk.last)] == list(
        range(len(lengths))
    )
    for chunk in chunks:
        if chunk.piece:
            assert chunk.last == chunk.first + 1 and lengths[chunk.first] > rows
        else:
            assert chunk.complete and sum(lengths[chunk.first : chunk.last]) == chunk.stop - chunk.start


@given(
    total=st.integers(0, 40_000),
    most=st.integers(1, 20_000),
    width=st.integers(1, 9000),
    processors=st.integers(1, 200),
)
def test_a_gpus_chunks_stay_within_the_budget_and_take_no_more_waves_than_full_ones(total, most, width, processors):
    def waves(rows):  # of tiles of 128 x 256
        return -(-(-(-rows // 128) * -(-width // 256)) // processors)

    def cost(rows):
        return -(-total // rows) * waves(rows)

    rows = even_rows(total, most, width, processors)
    assert 1 <= rows <= most
    fewest = -(-total // most)
    # a chunk costs something beside its waves: a tenth of one
    assert not total or cost(-(-total // -(-total // rows))) <= cost(-(-total // fewest)) + 0.1 * fewest
    assert even_rows(16384, 6000, 1024, 132) == 4224


@given(lengths=st.lists(st.integers(0, 4), max_size=6))
def test_sequence_ids_become_lengths(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    assert sequence_lengths(ids, len(lengths)).tolist() == lengths


@pytest.mark.parametrize(("ids", "message"), [([1, 0], "must not decrease"), ([0, 3], "0 to 1"), ([-1, 0], "0 to 1")])
def test_sequence_ids_that_name_no_order_or_no_sequence_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        sequence_lengths(Tensor(ids).long(), 2)

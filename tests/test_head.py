"""The fused head against its definition: every output and gradient, the matmuls it takes, and the memory."""

import pytest
import torch
from head_cases import OUTPUTS, agree, case, exact, nll_weight_of, other_weight_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, BLOCKS, INPUTS, TRANSFORMS, budget_of, measured, products
from kto_kernels import LOSSES, SATURATED_SLOPE, kto_head, reference
from kto_kernels.rows import Rows, row_pass

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


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
    loss=st.sampled_from(sorted(LOSSES)),
    with_nll=st.booleans(),
    with_other=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_values_and_gradients_are_the_definitions_whatever_the_chunks(
    backend, lengths, width, vocabulary, rows_a_chunk, bias, entropy, transform, loss, with_nll, with_other, seed
):
    lengths = lengths[: len(lengths) // LOSSES[loss].unit * LOSSES[loss].unit]
    leaves, others = case(lengths, width, vocabulary, bias=bias, seed=seed, backend=backend)
    others |= nll_weight_of(others) if with_nll else {}
    others |= other_weight_of(others) if with_other and LOSSES[loss].unit == 1 else {}
    options = {"transform": TRANSFORMS[transform], "loss": loss, "entropy": entropy, "grad_out": 1.7}
    wanted = exact(leaves, others, **options)
    budget = budget_of(rows_a_chunk, vocabulary, 8)
    agree(run(kto_head, leaves, others, budget=budget, backend=backend, **options), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", (3, 1000))
@pytest.mark.parametrize("loss", ("kto", "apo_zero_unpaired", "sft"))
def test_a_label_that_is_certain_is_the_same_in_every_bit_whether_it_may_be_a_probability_or_not(
    loss, rows_a_chunk, backend
):
    leaves, others = case([5, 1, 0, 4, 2], backend=backend)
    options = {"loss": loss, "budget": budget_of(rows_a_chunk, 53, 8), "backend": backend}
    hard = run(kto_head, leaves, others, **options)
    soft = run(kto_head, leaves, others | {"other_weight": torch.zeros_like(others["row_weight"])}, **options)
    assert hard.keys() == soft.keys()
    assert not [name for name, value in hard.items() if not value.equal(soft[name])]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows_a_chunk", (4, 11, 1000))
@pytest.mark.parametrize(("frozen", "count"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)])
def test_forward_and_backward_take_three_matmuls_and_one_less_for_each_frozen_input(frozen, count, rows_a_chunk, loss):
    leaves, others = case([9, 1, 0, 12, 3, 2], bias=False, dtype=torch.float32, frozen=frozen)
    size = leaves["hidden"].numel() * leaves["weight"].shape[0]
    budget = budget_of(rows_a_chunk, 53, 4)
    assert products(lambda: run(kto_head, leaves, others, budget=budget, loss=loss)) == count * size


@pytest.mark.parametrize("loss", LOSSES)
def test_a_term_of_log_probs_costs_no_matmul_but_for_pairs_longer_than_a_chunk(loss):
    leaves, others = case([9, 1, 0, 12, 3, 2], bias=False, dtype=torch.float32)
    others |= nll_weight_of(others)
    size = leaves["hidden"].numel() * leaves["weight"].shape[0]

    def matmuls(rows_a_chunk):
        return products(lambda: run(kto_head, leaves, others, budget=budget_of(rows_a_chunk, 53, 4), loss=loss)) / size

    assert matmuls(1000) == matmuls(13) == 3
    assert matmuls(4) == (3 if LOSSES[loss].unit == 1 else pytest.approx(3 + 27 / 27))


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
def test_matrices_may_lie_the_other_way_round_in_memory(backend):
    leaves, others = case([3, 0, 5], backend=backend)
    wanted = exact(leaves, others)
    for name in ("hidden", "weight"):
        leaves[name] = leaves[name].detach().T.contiguous().T.requires_grad_()
    agree(run(kto_head, leaves, others, backend=backend), wanted)


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


def test_a_pair_is_saturated_where_it_is_told_apart_and_not_where_it_is_turned_round():
    leaves, others = case([1, 1, 1, 1, 1, 1])
    others["ref_logps"] = torch.tensor([-4.0, -4.0, -300.0, 300.0, 300.0, -300.0])
    others["sign"] = torch.tensor([1.0, -1.0] * 3)
    arguments = {**leaves, **others}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target", "lengths")]
    result = kto_head(*positional, **arguments, loss="dpo")
    assert result.saturated.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "lengths sum to 4.*hidden has 5 rows"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "4 targets.*5 rows"),
        ({"row_weight": torch.ones(1)}, r"row_weight has shape \(1,\).*2 lengths"),
        ({"loss": "orpo"}, "'orpo'.*kto, apo_zero_unpaired, dpo"),
        ({"loss": "dpo", "lengths": torch.tensor([5])}, "'dpo'.*units of 2 sequences.*there are 1"),
        ({"loss": "dpo", "other_weight": torch.ones(2)}, "'dpo'.*units of 2.*one label.*other_weight"),
        ({"other_weight": torch.ones(1)}, r"other_weight has shape \(1,\).*2 lengths"),
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

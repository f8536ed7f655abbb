"""`token_logps` against the definition, and the loss against its formula: values, gradients, memory, precision."""

import math

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
from kto_kernels import LOSSES, LogitTransform, kto_loss, reference, sequence_logps, token_logps

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def case(rows, width, vocabulary, *, bias=True, dtype=torch.float64, seed=0, spread=1.0):
    """hidden, weight, bias (or None), target and a gradient for each row's log-prob, on the CPU."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden = spread * normal(rows, width)
    weight = normal(vocabulary, width)
    shift = normal(vocabulary) if bias else None
    target = torch.randint(vocabulary, (rows,), generator=draw)
    grad = normal(rows)
    return [None if t is None else t.to(dtype) for t in (hidden, weight, shift)], target, grad


def value_and_gradients(function, inputs, target, grad, **options):
    """By name: the log-probs, and the gradient of their sum weighted by `grad` in each input that there is.

    Computed where the backend among `options` runs, and returned on the CPU.
    """
    device = device_of(options.get("backend", "torch"))
    leaves = [None if t is None else t.detach().clone().to(device).requires_grad_() for t in inputs]
    logps = function(leaves[0], leaves[1], target.to(device), bias=leaves[2], **options)
    (logps.double() * grad.to(device)).sum().backward()
    found = {name: leaf.grad.cpu() for name, leaf in zip(INPUTS, leaves, strict=True) if leaf is not None}
    return {"logps": logps.detach().cpu(), **found}


def exact(inputs, target, grad, **options):
    wide = [None if t is None else t.double() for t in inputs]
    return value_and_gradients(reference.token_logps, wide, target, grad, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 12),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 40).map(lambda half: 2 * half + 1),
    budget=st.integers(1, 8000),
    bias=st.booleans(),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    seed=st.integers(0, 2**32),
)
def test_chunked_value_and_gradients_are_the_definitions_in_fp64(
    backend, rows, width, vocabulary, budget, bias, transform, seed
):
    inputs, target, grad = case(rows, width, vocabulary, bias=bias, seed=seed)
    options = {"transform": TRANSFORMS[transform]}
    wanted = exact(inputs, target, grad, **options)
    found = value_and_gradients(token_logps, inputs, target, grad, budget=budget, backend=backend, **options)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", (7, 1000))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_fp32_errs_by_less_than_1e6th(transform, rows_a_chunk, backend):
    inputs, target, grad = case(30, 32, 333, dtype=torch.float32, spread=0.2)
    options = {"transform": TRANSFORMS[transform]}
    budget = budget_of(rows_a_chunk, 333, 4)
    found = value_and_gradients(token_logps, inputs, target, grad, budget=budget, backend=backend, **options)
    errors = error(found, exact(inputs, target, grad, **options))
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", (7, 1000))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_bf16_errs_at_most_twice_as_much_as_plain_pytorch_does(transform, rows_a_chunk, backend):
    inputs, target, grad = case(30, 32, 333, dtype=torch.bfloat16, spread=0.2)
    options = {"transform": TRANSFORMS[transform]}

    def plain(hidden, weight, target, *, bias, transform):
        return transform((hidden @ weight.T + bias).float()).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    wanted = exact(inputs, target, grad, **options)
    peer = error(value_and_gradients(plain, inputs, target, grad, **options), wanted)
    found = value_and_gradients(
        token_logps, inputs, target, grad, budget=budget_of(rows_a_chunk, 333, 2), backend=backend, **options
    )
    ours = error(found, wanted)
    limit = 2 * rounding_of(backend)
    assert all(ours[name] <= limit * peer[name] for name in wanted), (ours, peer)


@pytest.mark.parametrize("rows_a_chunk", (300, 600))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_memory_beyond_inputs_and_gradients_is_the_budget_and_one_fp32_sum(dtype, rows_a_chunk):
    rows, width, vocabulary = 1200, 8, 40_001
    (hidden, weight, _), target, grad = case(rows, width, vocabulary, bias=False, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    budget = budget_of(rows_a_chunk, vocabulary, dtype.itemsize)

    def run():
        logps = token_logps(hidden, weight, target, budget=budget)
        logps.backward(grad.to(logps.dtype))

    peak = measured(run)
    gradients = hidden.nbytes + weight.nbytes
    sums = 4 * weight.numel() if dtype == torch.bfloat16 else 0
    assert peak <= budget + gradients + sums + weight.nbytes + BLOCKS
    assert peak > budget  # the budget is used


@pytest.mark.parametrize(
    ("trained", "rows_a_chunk", "count"),
    [
        ((), 7, 1),
        ((0,), 7, 2),
        ((0, 1), 7, 4),
        ((0, 1), 40, 3),
        ((1,), 7, 3),
    ],
)
def test_the_matmuls_are_those_that_are_documented(trained, rows_a_chunk, count):
    inputs, target, _ = case(40, 6, 51, bias=False, dtype=torch.float32)
    for index in trained:
        inputs[index].requires_grad_()

    def run():
        logps = token_logps(inputs[0], inputs[1], target, budget=budget_of(rows_a_chunk, 51, 4))
        if trained:
            logps.sum().backward()

    assert products(run) == count * 40 * 6 * 51


@pytest.mark.parametrize("trained", INPUTS)
def test_a_frozen_input_gets_no_gradient_and_the_other_keeps_its_own(trained):
    inputs, target, grad = case(9, 5, 21)
    wanted = exact(inputs, target, grad)[trained]
    for name, tensor in zip(INPUTS, inputs, strict=True):
        tensor.requires_grad_(name == trained)
    (token_logps(inputs[0], inputs[1], target, bias=inputs[2], budget=1) * grad).sum().backward()
    found = dict(zip(INPUTS, (tensor.grad for tensor in inputs), strict=True))
    torch.testing.assert_close(found.pop(trained), wanted, rtol=1e-12, atol=1e-12)
    assert list(found.values()) == [None, None]


def test_no_gradient_is_kept_when_nothing_is_trained():
    inputs, target, _ = case(9, 5, 21)
    assert not token_logps(inputs[0], inputs[1], target, bias=inputs[2]).requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", (1e5, 1e30))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hopeless_targets_stay_finite(dtype, size, backend):
    # the target's logit is `size` below another, so exp underflows
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    inputs = [torch.tensor([[size / 2, 0.0]], dtype=dtype), weight, None]
    found = value_and_gradients(
        token_logps, inputs, torch.tensor([1]), torch.ones(1, dtype=torch.float64), backend=backend
    )
    assert found["logps"].item() == pytest.approx(-size, rel=0.01)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_many_bf16_chunks_add_up_as_exactly_as_one():
    """Gradients of one sign, over 3,000 chunks of one row: a bf16 sum stops growing after some 256 of them."""
    draw = torch.Generator().manual_seed(0)
    hidden = (1 + 0.1 * torch.randn(3000, 8, generator=draw)).bfloat16()
    inputs = [hidden, (0.01 * torch.randn(11, 8, generator=draw)).bfloat16(), None]
    target, grad = torch.zeros(3000, dtype=torch.int64), torch.ones(3000, dtype=torch.float64)
    wanted = exact(inputs, target, grad)["weight"]

    def err(rows_a_chunk):
        options = {"budget": budget_of(rows_a_chunk, 11, 2)}
        return float((value_and_gradients(token_logps, inputs, target, grad, **options)["weight"] - wanted).norm())

    in_bf16 = torch.zeros(11, 8, dtype=torch.bfloat16)
    for row in range(3000):
        one = [inputs[0][row : row + 1], inputs[1], None]
        in_bf16 += value_and_gradients(token_logps, one, target[:1], grad[:1])["weight"]
    assert err(1) <= 2 * err(3000)
    assert (in_bf16 - wanted).norm() > 20 * err(1)  # the case tells the two apart


def test_no_rows_give_no_log_probs_and_zero_gradients():
    inputs, target, grad = case(0, 5, 21)
    found = value_and_gradients(token_logps, inputs, target, grad)
    assert found["logps"].shape == (0,)
    assert not found["weight"].any() and not found["bias"].any()


@pytest.mark.parametrize("options", ({"temperature": 0.0}, {"temperature": -1.0}, {"softcap": 0.0}))
def test_an_impossible_transform_raises(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LogitTransform(**options)


def test_a_long_sequence_is_summed_in_fp64():
    tokens = torch.full((20_000,), -7.123456, dtype=torch.float32)
    wanted = math.fsum(tokens.tolist())
    found = sequence_logps(tokens, torch.tensor([20_000]))
    narrow = torch.zeros(1).index_add(0, torch.zeros(20_000, dtype=torch.int64), tokens)
    assert abs(narrow.item() - wanted) > 0.001  # what it would be in fp32
    assert found.item() == pytest.approx(wanted, abs=1e-7)


@given(lengths=st.lists(st.integers(0, 4), max_size=8))
def test_every_sequence_keeps_its_place_even_an_empty_one(lengths):
    tokens = torch.arange(1, sum(lengths) + 1, dtype=torch.float64)
    found = sequence_logps(tokens, torch.tensor(lengths, dtype=torch.int64))
    assert found.tolist() == [sum(part.tolist()) for part in tokens.split(lengths)]


def test_every_token_gets_its_sequences_gradient():
    tokens = torch.zeros(5, requires_grad=True)
    (sequence_logps(tokens, torch.tensor([2, 0, 3])) * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert tokens.grad.tolist() == [10, 10, 30, 30, 30]


def _loss(log_ratio, sign, **options):
    settings = {"z0": torch.tensor(0.0), "beta": 0.1, **options}
    return kto_loss(torch.tensor(log_ratio), torch.zeros(len(log_ratio)), torch.tensor(sign), **settings)


@pytest.mark.parametrize("loss", ("kto", "apo_zero_unpaired"))
def test_the_loss_is_one_minus_the_value_of_the_paper(loss):
    ratios, signs, z0, beta = [3.0, -8.0, 3.0, -8.0], [1.0, 1.0, -1.0, -1.0], 2.5, 0.3
    anchor = z0 if loss == "kto" else 0.0
    wanted = [1 - 1 / (1 + math.exp(-beta * s * (r - anchor))) for r, s in zip(ratios, signs, strict=True)]
    found = _loss(ratios, signs, z0=torch.tensor(z0), beta=beta, loss=loss)
    assert found.tolist() == pytest.approx(wanted, rel=1e-7)


def test_dpo_is_minus_the_log_sigmoid_of_the_pairs_difference_for_both_of_a_pair():
    found = _loss([3.0, -8.0, -2.0, 5.0], [1.0, -1.0, -1.0, 1.0], beta=0.3, loss="dpo")
    wanted = [math.log1p(math.exp(-0.3 * difference)) for difference in (11.0, 11.0, 7.0, 7.0)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_ipo_is_the_square_of_what_the_pairs_difference_of_means_lacks_to_its_target():
    ratios, tokens, beta = [3.0, -8.0, -2.0, 5.0], torch.tensor([2, 4, 1, 10]), 0.25
    found = _loss(ratios, [1.0, -1.0, -1.0, 1.0], beta=beta, loss="ipo", lengths=tokens)
    wanted = [(difference - 2.0) ** 2 for difference in (1.5 + 2.0, 1.5 + 2.0, 0.5 + 2.0, 0.5 + 2.0)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_a_loss_of_means_needs_the_number_of_tokens():
    with pytest.raises(ValueError, match="'ipo'.*means over a completion's tokens: give their number as lengths"):
        _loss([3.0, -8.0], [1.0, -1.0], loss="ipo")


def test_sft_is_minus_the_log_prob_whatever_the_reference_and_beta():
    found = kto_loss(torch.tensor([-3.0]), torch.tensor([-5.0]), torch.ones(1), z0=torch.ones(()), beta=0.7, loss="sft")
    assert found.tolist() == [3.0]


@pytest.mark.parametrize("loss", ("kto", "dpo"))
def test_a_nearly_satisfied_row_keeps_its_digits(loss):
    # 1 - sigmoid(50) would be exactly 0 in fp64, and so would -log(sigmoid(50))
    found = _loss([500.0, 0.0], [1.0, -1.0], loss=loss)[0].item()
    assert found == pytest.approx(math.exp(-50), rel=1e-12, abs=0)


@pytest.mark.parametrize("loss", LOSSES)
@given(margin=st.floats(-700, 700), beta=st.floats(0.01, 1))
def test_the_slope_of_a_loss_is_what_autograd_finds(loss, margin, beta):
    curve = LOSSES[loss].curve
    at = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    value = curve.value(at, beta)
    value.backward()
    found = curve.slope(at.detach(), value.detach(), beta)
    torch.testing.assert_close(found, -at.grad, rtol=1e-9, atol=1e-16)
    at_one = curve.value(at.detach(), 1.0)
    steep = curve.slope(at.detach(), at_one, 1.0).abs()
    torch.testing.assert_close(curve.steepness(at_one), steep, rtol=1e-7, atol=1e-12)


def test_no_gradient_flows_into_z0():
    z0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    logps = torch.zeros(1, requires_grad=True)
    kto_loss(logps, torch.zeros(1), torch.ones(1), z0=z0, beta=0.1).sum().backward()
    assert logps.grad is not None and z0.grad is None


def test_an_unknown_loss_raises_with_the_known_ones():
    with pytest.raises(ValueError, match="'orpo'.*kto, apo_zero_unpaired"):
        _loss([0.0], [1.0], loss="orpo")


def test_under_autocast_log_probs_are_those_of_the_cast_tensors():
    (hidden, weight, _), target, grad = case(9, 5, 21, bias=False, dtype=torch.float32)
    narrow = value_and_gradients(token_logps, [hidden.bfloat16(), weight.bfloat16(), None], target, grad, budget=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(token_logps, [hidden, weight, None], target, grad, budget=1)
    assert found["logps"].equal(narrow["logps"])
    torch.testing.assert_close(found["weight"], narrow["weight"].float())

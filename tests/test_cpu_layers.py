"""A CPU's own layers give what the plain ones do, and gradients at least as exact."""

import copy

import pytest
import torch
from kto_kernels import onednn
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kto_dist.model.cpu_layers import quicken


def plain_norm(width, dtype):
    norm = LlamaRMSNorm(width, 1e-5)
    norm.weight.data = 1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(1))
    return norm.to(dtype)


def gradients(module, rows, given, dtype):
    module, rows = copy.deepcopy(module).to(dtype), rows.to(dtype, copy=True).requires_grad_()
    out = module(rows)
    out.backward(given.to(dtype))
    return [out.detach(), rows.grad, *(parameter.grad for parameter in module.parameters())]


def exact_norm(norm):
    exact = copy.deepcopy(norm).double()
    exact.forward = lambda x: exact.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + exact.variance_epsilon)
    return exact


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_quick_norm_has_the_plain_one_s_bits_and_no_worse_gradients(dtype):
    draw = torch.Generator().manual_seed(0)
    rows, given = (torch.randn(1, 70, 96, generator=draw).to(dtype) for _ in range(2))
    norm = plain_norm(96, dtype)
    plain = gradients(norm, rows, given, dtype)
    exact = exact_norm(norm)
    precise = rows.double().requires_grad_()
    exact(precise).backward(given.double())
    quicken(norm)
    assert "forward" in norm.__dict__
    quick = gradients(norm, rows, given, dtype)
    assert torch.equal(quick[0], plain[0])
    for ours, theirs, right in zip(quick[1:], plain[1:], (precise.grad, exact.weight.grad), strict=True):
        assert (ours.double() - right).norm() <= 1.5 * (theirs.double() - right).norm()


def test_a_quick_norm_treats_a_row_alike_whatever_lies_beside_it():
    draw = torch.Generator().manual_seed(0)
    rows, given = (torch.randn(33, 96, generator=draw) for _ in range(2))
    norm = plain_norm(96, torch.float32)
    quicken(norm)
    together = gradients(norm, rows, given, torch.float32)[1]
    alone = torch.cat([gradients(norm, rows[i : i + 1], given[i : i + 1], torch.float32)[1] for i in range(33)])
    assert torch.equal(together, alone)


def test_a_norm_of_another_formula_stays_as_it_is():
    class OneMoreRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return (1 + self.weight) * super().forward(hidden_states)

    norm = OneMoreRMSNorm(8)
    quicken(norm)
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("bias", (True, False))
def test_products_of_onednn_are_those_of_a_plain_layer(monkeypatch, bias):
    monkeypatch.setattr(onednn, "pays", lambda tensor: tensor.dtype == torch.float32)
    draw = torch.Generator().manual_seed(0)
    rows, given = torch.randn(2, 30, 24, generator=draw), torch.randn(2, 30, 40, generator=draw)
    layer = nn.Linear(24, 40, bias=bias)
    plain = gradients(layer, rows, given, torch.float32)
    quicken(layer)
    for ours, theirs in zip(gradients(layer, rows, given, torch.float32), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert layer(torch.zeros(0, 24)).shape == (0, 40)


def test_what_onednn_returns_may_be_changed_in_place_as_llama4_does(monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda tensor: tensor.dtype == torch.float32)
    layer, rows = nn.Linear(4, 3), torch.randn(2, 5, 4, requires_grad=True)
    quicken(layer)
    layer(rows).add_(1.0).sum().backward()
    torch.testing.assert_close(rows.grad, layer.weight.sum(0).expand(2, 5, 4))


def test_gradients_of_what_attends_in_groups_are_those_of_the_definition():
    from kto_dist.model.slices import by_slices

    draw = torch.Generator().manual_seed(0)
    lengths, heads, shared = (3, 40, 33, 64, 1), 4, 2
    q, k, v, given = (
        torch.randn(sum(lengths), count, size, generator=draw).bfloat16()
        for count, size in ((heads, 8), (shared, 8), (shared, 6), (heads, 6))
    )

    def grads(attend, dtype):
        parts = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        attend(*parts).backward(given.to(dtype))
        return [x.grad.double() for x in parts]

    def definition(q, k, v):
        found = []
        for of_q, of_k, of_v in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            ago = torch.arange(len(of_q))[:, None] - torch.arange(len(of_q))
            seen = (ago >= 0) & (ago < 9)
            of_k, of_v = (x.repeat_interleave(heads // shared, 1).transpose(0, 1) for x in (of_k, of_v))
            out = functional.scaled_dot_product_attention(of_q.transpose(0, 1), of_k, of_v, seen, scale=0.3)
            found.append(out.transpose(0, 1))
        return torch.cat(found)

    wanted = grads(definition, torch.float64)
    for ours, right in zip(grads(lambda *x: by_slices(*x, lengths, 0.3, 9), torch.bfloat16), wanted, strict=True):
        assert (ours - right).norm() <= 0.02 * right.norm()

"""What the tests of the fused head share: cases, and runs of a head by name, also in fp64 and in plain PyTorch."""

import torch
from kernel_cases import TRANSFORMS, device_of
from kto_kernels import LOSSES, HeadOutput, kto_loss, reference
from torch import Tensor

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


def nll_weight_of(others):
    """For `others`: a weight of each sequence's -logp, 0 for those that are to become less likely."""
    sign = others["sign"].double()
    return {"nll_weight": (sign > 0) * torch.linspace(0.05, 0.4, len(sign), dtype=torch.float64, device=sign.device)}


def other_weight_of(others):
    """For `others`: a weight of each sequence's loss with the other sign, 0 for some."""
    weight = others["row_weight"]
    return {"other_weight": torch.linspace(0, 1.4, len(weight), dtype=torch.float64, device=weight.device)}


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


def plain_pytorch(
    hidden,
    weight,
    target,
    lengths,
    *,
    bias,
    transform=TRANSFORMS["none"],
    wide=False,
    ref_logps,
    sign,
    row_weight,
    **terms,
):
    """The loss as one would write it, in the dtype that comes in; `wide`: the logits are a product in fp32."""
    logits = hidden.float() @ weight.float().T if wide else hidden @ weight.T
    logits = transform((logits if bias is None else logits + bias).float())
    logps = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0].double()
    summed = torch.stack([part.sum() for part in logps.split(lengths.tolist())])
    losses = kto_loss(summed, ref_logps, sign, lengths=lengths, **terms)
    return HeadOutput(
        kind=LOSSES["kto"],
        loss=(row_weight * losses).sum(),
        logps=summed.detach(),
        losses=losses.detach(),
        entropy=None,
    )


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

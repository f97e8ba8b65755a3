"""Each kernel's fast form equals its plain formula in value and gradient; gradients also against finite differences."""

import pytest
import torch
from comparisons import assert_same_value_and_gradient
from torch import nn
from torch.nn import functional as F

from dalle_cli.models import kernels
from dalle_cli.models.attention import Pattern, rotary_angles
from dalle_cli.models.kernels import apply_rotary, gelu_linear, rms_norm, swiglu

ROTARY = rotary_angles(3, 2, 4, torch.device("cpu"))


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def streams(n_queries, n_keys):
    return [numbers(2, 3, n, 4, seed=n + i) for i, n in enumerate((n_queries, n_keys, n_keys))]


def linear(dtype=torch.double):
    layer = nn.Linear(12, 5).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer


def sparse(kind):
    return lambda q, k, v: kernels.sparse_attention(q, k, v, Pattern(kind, 3, 5, 3))


def rotary(x):
    return torch.cat([y.flatten(2) for y in apply_rotary(x, ROTARY)], dim=-1)


LAYER, TARGETS = linear(), torch.tensor([4, 0, 2])
CASES = {
    "attention": (kernels.attention, streams(5, 7)),
    "causal": (kernels.causal_attention, streams(7, 7)),
    "causal-long": (kernels.causal_attention, streams(600, 600)),
    "causal-last": (kernels.causal_attention, streams(2, 7)),
    **{kind: (sparse(kind), streams(28, 28)) for kind in ("full", "row", "column", "conv")},
    "window": (sparse("window"), streams(28, 28)),
    "gelu_linear": (lambda x: gelu_linear(x, LAYER), [numbers(3, 7, 12)]),
    "gelu_tanh_linear": (lambda x: gelu_linear(x, LAYER, "tanh"), [numbers(3, 7, 12)]),
    "rms_norm": (rms_norm, [numbers(3, 5, 8)]),
    "swiglu": (swiglu, [numbers(3, 10)]),
    "apply_rotary": (rotary, [numbers(2, 6, 3 * 8)]),
    "float32_linear": (lambda x: kernels.float32_linear(x, LAYER.weight, LAYER.bias), [numbers(3, 12)]),
    "head_loss": (lambda x: kernels.head_loss(LAYER, x, TARGETS), [numbers(3, 12)]),
}
WITH_LAYER = ("gelu_linear", "gelu_tanh_linear", "float32_linear", "head_loss")


@pytest.mark.parametrize("name", CASES)
def test_fast_equals_plain(name, monkeypatch):
    kernel, inputs = CASES[name]
    fast = kernel(*inputs)
    monkeypatch.setattr(kernels, "FAST", False)
    assert_same_value_and_gradient(
        fast, kernel(*inputs), [*inputs, *(LAYER.parameters() if name in WITH_LAYER else ())]
    )


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "apply_rotary"])
def test_gradients_equal_finite_differences(name):
    kernel, inputs = CASES[name]
    assert torch.autograd.gradcheck(kernel, inputs, atol=1e-6)


def test_rms_norm_takes_autocasts_dtype():
    x = numbers(3, 8).float().detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_turned_values_are_not_touched():
    x = numbers(2, 6, 3 * 8)
    values = apply_rotary(x, rotary_angles(3, 2, 4, torch.device("cpu")))[2]
    torch.testing.assert_close(values.transpose(1, 2).flatten(2), x[..., 16:])


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (2, 1)])
def test_products_depend_on_distance_only(shift):
    """The same query and key, moved by the same rows and columns, meet in the same score."""
    grid, width = 5, 8
    rotary = rotary_angles(4, grid, width, torch.device("cpu"))
    content = numbers(1, 1, 3 * width).expand(1, rotary.shape[1], -1)
    q, k, _ = apply_rotary(content, rotary)

    def score(a, b):
        return q[0, 0, 4 + a[0] * grid + a[1]] @ k[0, 0, 4 + b[0] * grid + b[1]]

    here, there = (1, 1), (0, 2)
    moved = [(r + shift[0], c + shift[1]) for r, c in (here, there)]
    torch.testing.assert_close(score(here, there), score(*moved), rtol=0, atol=1e-6)
    assert not torch.isclose(score(here, there), score(here, here), atol=1e-3)


def test_gelu_linear_under_autocast_gradients_have_their_tensors_dtypes():
    layer, x = linear(torch.float32), numbers(3, 7, 12).float().detach()
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_linear(low, layer)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad[0], F.gelu(x).flatten(0, 1).sum(0), rtol=3e-2, atol=3e-2)


def test_gelu_linear_keeps_its_input_alone():
    layer, x = linear(), numbers(3, 7, 12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gelu_linear(x, layer)
    assert sum(kept) == x.numel() + layer.weight.numel()

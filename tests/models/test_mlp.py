"""The MLP's second half against torch's own, in value, gradient and what it keeps."""

import torch
from comparisons import assert_same_value_and_gradient
from torch import nn
from torch.nn import functional as F

from dalle_cli.models.mlp import gelu_linear


def inputs(dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 5).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer, torch.randn(3, 7, 12, dtype=dtype, generator=generator).requires_grad_()


def test_equals_gelu_and_a_linear_layer_in_value_and_gradient():
    layer, x = inputs()
    assert_same_value_and_gradient(gelu_linear(x, layer), layer(F.gelu(x)), [x, *layer.parameters()])


def test_under_autocast_gradients_have_their_tensors_dtypes():
    layer, x = inputs(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_linear(low, layer)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad[0], F.gelu(x).flatten(0, 1).sum(0), rtol=3e-2, atol=3e-2)


def test_keeps_its_input_alone():
    layer, x = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gelu_linear(x, layer)
    assert sum(kept) == x.numel() + layer.weight.numel()

"""The head's cross-entropy against torch's own, in value and gradient, in one chunk and in many."""

import pytest
import torch
from comparisons import assert_same_value_and_gradient
from torch import nn
from torch.nn import functional as F

from dalle_cli.models import head as module
from dalle_cli.models.head import float32_linear, head_logits, head_loss


def inputs(dtype=torch.double, rows=23):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 31).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    x = torch.randn(rows, 8, dtype=dtype, generator=generator).requires_grad_()
    return head, x, torch.randint(31, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 31 * 2, 31 * 5, 1 << 20])
def test_equals_cross_entropy_in_value_and_gradient(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    head, x, targets = inputs()
    expected = F.cross_entropy(head(x), targets, reduction="sum")
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, x, targets), expected, rtol=0, atol=1e-12)
    assert_same_value_and_gradient(head_loss(head, x, targets), expected, [x, *head.parameters()])


def test_no_rows_cost_nothing():
    head, x, targets = inputs(rows=0)
    loss = head_loss(head, x, targets)
    assert loss.item() == 0
    loss.backward()
    assert not head.weight.grad.any()


def test_logits_keep_32_bits_under_autocast():
    head, x, targets = inputs(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert head_logits(head, low).dtype == torch.float32
        loss = head_loss(head, low, targets)
    expected = F.cross_entropy(head(low.detach().float()), targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)  # processors with bfloat16 products round the weights
    loss.backward()
    assert low.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32


def test_never_holds_all_logits():
    """What autograd keeps is as large as the inputs' gradients, whatever the number of rows times the vocabulary."""
    head, x, targets = inputs(rows=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head_loss(head, x, targets)
    assert sum(kept) == x.numel() + sum(p.numel() for p in head.parameters())


def test_float32_linear_equals_a_linear_layer_in_value_and_gradient():
    head, x, _ = inputs()
    got = float32_linear(x, head.weight, head.bias)
    assert_same_value_and_gradient(got, head(x), [x, *head.parameters()])


def test_float32_linear_takes_half_precision_and_gives_32_bits():
    head, x, _ = inputs(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = float32_linear(low, head.weight, head.bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, head(low.float()), rtol=1e-2, atol=2e-2)
    y.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32


def test_a_second_backward_pass_is_refused():
    head, x, targets = inputs()
    loss = head_loss(head, x, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        loss.backward()

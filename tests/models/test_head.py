"""The head's cross-entropy against torch's own, in value and gradient, in one chunk and in many."""

import pytest
import torch
from comparisons import assert_same_value_and_gradient
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
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
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
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
    torch.testing.assert_close(y, head(low.float()), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32


class Settings(TorchDispatchMode):
    """Records the process-wide precision of float32 products at every operator."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="a torch without the setting")
def test_no_process_wide_setting_changes():
    head, x, targets = inputs(torch.float32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with Settings() as settings, torch.autocast("cpu", torch.bfloat16):
        head_loss(head, x, targets).backward()
        float32_linear(x, head.weight, head.bias).sum().backward()
    assert settings.seen == {before}


@pytest.mark.parametrize("missing", [False, True], ids=["oneDNN", "plain"])
def test_any_shape_of_rows(missing, monkeypatch):
    if missing:
        monkeypatch.setattr(module, "ONEDNN_LINEAR", None)
    head = nn.Linear(8, 31)
    for x in (torch.randn(0, 8), torch.randn(8), torch.randn(2, 8, 3, 3).permute(0, 2, 3, 1)):
        for bias in (head.bias, None):
            with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
                y = float32_linear(x, head.weight, bias)
            assert counter.get_total_flops() == 2 * x.numel() * 31
            torch.testing.assert_close(y, F.linear(x, head.weight, bias), rtol=1e-5, atol=1e-5)


def test_chunks_are_larger_on_an_accelerator():
    cpu, cuda = (module._chunk_rows(torch.device(kind), 1000) for kind in ("cpu", "cuda"))
    assert (cpu, cuda) == (module.CPU_CHUNK // 1000, module.DEVICE_CHUNK // 1000)
    assert cuda > 10 * cpu


def test_a_second_backward_pass_is_refused():
    head, x, targets = inputs()
    loss = head_loss(head, x, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        loss.backward()

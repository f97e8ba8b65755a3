"""Attention that costs what it attends to equals dense attention under the pattern's mask, in value and gradient."""

import pytest
import torch
from comparisons import assert_same_value_and_gradient
from torch.nn import functional as F

from dalle_cli.models import attention
from dalle_cli.models import local_attention as local_attention_module
from dalle_cli.models.attention import Pattern
from dalle_cli.models.local_attention import causal_attention, column_attention, local_attention


def streams(n_text, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, n_text + grid**2, 4)
    return [torch.randn(shape, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]


def local(pattern, q, k, v):
    if pattern.kind == "column":
        return column_attention(q, k, v, pattern.n_text + 1, pattern.grid)
    distances = pattern.offsets if pattern.kind == "conv" else tuple(range(pattern.grid + 1))
    return local_attention(q, k, v, pattern.n_text + 1, pattern.grid, distances)


@pytest.mark.parametrize("n_text", [1, 6])
@pytest.mark.parametrize("grid", [2, 4, 5])
@pytest.mark.parametrize(("kind", "kernel"), [("row", 1), ("column", 1), ("conv", 3), ("conv", 5), ("conv", 11)])
def test_equals_dense_attention_in_value_and_gradient(kind, kernel, grid, n_text):
    pattern = Pattern(kind, n_text, grid, kernel)
    inputs = streams(n_text, grid)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=pattern.mask(torch.device("cpu")))
    assert_same_value_and_gradient(local(pattern, *inputs), expected, inputs)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 21])
def test_causal_attention_by_blocks_equals_the_fused_one(length, monkeypatch):
    monkeypatch.setattr(local_attention_module, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, length, 4)
    inputs = [torch.randn(shape, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert_same_value_and_gradient(causal_attention(*inputs), expected, inputs)


@pytest.mark.parametrize("kind", ["row", "column", "conv", "full"])
def test_every_way_to_attend_on_cpu_agrees(kind, monkeypatch):
    """Short streams in training, long streams in training, and no gradient at all take three ways."""
    pattern = Pattern(kind, 6, 4, 3)
    inputs = streams(6, 4)
    short = pattern.attend(*inputs)
    monkeypatch.setattr(attention, "LONG_STREAM", 1)
    long = pattern.attend(*inputs)
    with torch.no_grad():
        none = pattern.attend(*inputs)
    torch.testing.assert_close(long, short, rtol=0, atol=1e-12)
    torch.testing.assert_close(none, short, rtol=0, atol=1e-12)


def test_a_long_row_stream_takes_memory_like_the_pattern():
    """At 32x32 codes the dense weights of one head are 1280^2 numbers; the window's are 1024 x (257 + 64)."""
    pattern = Pattern("row", 256, 32, 11)
    assert attention.LONG_STREAM < 256 + 32**2
    q, k, v = (torch.randn(1, 1, 1280, 8) for _ in range(3))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    pattern.attend(q, k, v)
    with Watch():
        pattern.attend(q, k, v)
    assert max(sizes) <= 1024 * (257 + 64)

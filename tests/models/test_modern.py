"""Backward passes written out, against autograd over the plain formulas and finite differences."""

import pytest
import torch
from torch.nn import functional as F

from dalle_cli.models.modern import EPSILON, apply_rotary, rms_norm, rotary_angles, swiglu


def numbers(*shape):
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_rms_norm():
    x = numbers(3, 5, 8)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (8,), eps=EPSILON))
    assert torch.autograd.gradcheck(rms_norm, (x,))


def test_rms_norm_takes_autocasts_dtype():
    x = numbers(3, 8).float().detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_swiglu():
    x = numbers(3, 10)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(a) * b)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_turned_gradients():
    rotary = rotary_angles(3, 2, 4, torch.device("cpu"))
    x = numbers(2, 6, 3 * 8)
    assert torch.autograd.gradcheck(lambda t: apply_rotary(t, rotary), (x,), atol=1e-6)


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

"""Tensors against tensors: those of two models by name, and a function's value and gradients against another's."""

import torch


def assert_equal(ours, theirs, **tolerance):
    """Two state dicts, name by name."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda said, name=name: f"{name}: {said}", **tolerance)


def assert_same_value_and_gradient(got, expected, inputs):
    """Equal values, and equal gradients for all `inputs` of one sum of them with random weights; in float64."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
